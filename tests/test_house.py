"""The house: which room may import which, what lies at the root, and lines that read at once."""

import ast
import graphlib
from collections import Counter
from functools import cache

import pytest

from conftest import ROOT

STAGES = {"prepare", "train_ref", "score", "train_slm", "eval_math"}
METHOD = {"slm", "methods", "model", "data"}
# Each room imports itself and what stands before it. The method's files import common alone.
ROOMS = ["common", "method", "hf", "text", "training", "evaluation", "integrations", "demo"]
ABOVE = {"stage", "tools", "runs", "tests", "package"}  # what is run, not built upon

MAY_IMPORT = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
MAY_IMPORT["stage"] = set(ROOMS)
MAY_IMPORT["tools"] = {*ROOMS, "tools", "stage"}
MAY_IMPORT["runs"] = {*ROOMS, "tools", "runs"}
MAY_IMPORT["tests"] = MAY_IMPORT["package"] = {*ROOMS, *ABOVE}

FOLDERS = [*ROOMS, "tools", "runs", "tests", "package"]
BOOLEAN_CALLS = {"bool", "isinstance", "any", "all", "hasattr"}
BOOLEAN_METHODS = {"exists", "is_dir", "is_file", "startswith", "endswith"}


def python_files():
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    return [path.relative_to(ROOT) for path in sorted([*ROOT.glob("*.py"), *found])]


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(), str(path))


@cache
def nodes(path):
    return list(ast.walk(tree(path)))


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files()}


def room_of(module):
    first = module.partition(".")[0]
    if first in STAGES:
        return "stage"
    if first in METHOD:
        return "method"
    return first


def named_in(node):
    """The modules that one import statement, or importlib.import_module("..."), may name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in inner]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return []


@cache
def imports(module):
    """{imported module of the kit: line}, imports inside functions too."""
    found = {}
    for node in nodes(MODULES[module]):
        for name in named_in(node):
            if name in MODULES and name != module:
                found.setdefault(name, node.lineno)
    return found


def listed(problems):
    return f"{len(problems)} places:\n" + "\n".join(problems)


def everywhere(wrong):
    """ "file:line: code" of each node in all files for which wrong(node) is true."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)[:90]}"
        for path in python_files()
        for node in nodes(path)
        if wrong(node)
    ]


def test_the_root_holds_the_method_and_the_stages():
    assert {path.stem for path in ROOT.glob("*.py")} == METHOD | STAGES


def test_rooms_import_what_stands_before_them():
    problems = []
    for module, path in MODULES.items():
        for name, line in imports(module).items():
            if room_of(name) not in MAY_IMPORT[room_of(module)]:
                problems.append(f"{path}:{line}: imports {name}")
    assert not problems, listed(problems)


def test_no_import_runs_in_a_circle():
    """Imports inside functions count: a circle that is hidden there is one all the same."""
    graph = {module: imports(module) for module in MODULES if not module.startswith("tests.")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_every_room_says_what_it_is_for():
    problems = []
    for path in python_files():
        docstring = ast.get_docstring(tree(path)) or ""
        if path.name == "__init__.py" and (not docstring or "\n" in docstring):
            problems.append(f"{path}: wants a docstring of one line")
    assert not problems, listed(problems)


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by their name alone: the second would stop the whole suite."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, times in names.items() if times > 1] == []


def test_no_line_is_over_100_columns():
    problems = [
        f"{path}:{number}: {len(line)} columns"
        for path in python_files()
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if len(line) > 100 and "://" not in line
    ]
    assert not problems, listed(problems)


@cache
def switches():
    """The names of the command line's switches: each of them holds a truth value."""
    names = set()
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and "'store_true'" in ast.unparse(node):
                flag = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value
                if isinstance(flag, str) and flag.startswith("--"):
                    names.add(flag[2:].replace("-", "_"))
    return names


def is_truth_value(node):
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):
            return function.attr in BOOLEAN_METHODS
        return isinstance(function, ast.Name) and function.id in BOOLEAN_CALLS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return getattr(node, "id", None) in switches() or getattr(node, "attr", None) in switches()
    return isinstance(node, (ast.Compare, ast.BoolOp))


def is_literal(node):
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes))
    return isinstance(node, (ast.List, ast.Tuple, ast.JoinedStr))


def literal_times_truth_value(node):
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    left, right = node.left, node.right
    either = (
        is_literal(left) and is_truth_value(right),
        is_literal(right) and is_truth_value(left),
    )
    return any(either)


def test_no_literal_is_multiplied_by_a_truth_value():
    problems = everywhere(literal_times_truth_value)
    assert not problems, listed(problems)


def nested_conditional(node):
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)


def test_no_conditional_expression_stands_in_another():
    problems = everywhere(nested_conditional)
    assert not problems, listed(problems)


def statement_in_disguise(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.IfExp, ast.BoolOp))


def test_no_conditional_expression_is_a_statement():
    problems = everywhere(statement_in_disguise)
    assert not problems, listed(problems)


def class_swap(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(t, ast.Attribute) and t.attr == "__class__" for t in targets)


def test_no_object_changes_its_class():
    problems = everywhere(class_swap)
    assert not problems, listed(problems)


@pytest.mark.parametrize(
    "code, wrong",
    [
        ("'--entropy' * (n > 1)", literal_times_truth_value),
        ("[a] * args.entropy", literal_times_truth_value),
        ("path.exists() * f'{x}'", literal_times_truth_value),
        ("(a, b) * (not c)", literal_times_truth_value),
        ("a if b else c if d else e", nested_conditional),
        ("f(a if b else c) if d else e", nested_conditional),
        ("a if b else c", statement_in_disguise),
        ("a and b()", statement_in_disguise),
        ("a.__class__ = b", class_swap),
    ],
)
def test_these_tests_find_what_they_look_for(code, wrong):
    assert any(map(wrong, ast.walk(ast.parse(code))))


@pytest.mark.parametrize("code", ["'-' * 80", "[a] * n", "a if b else c", "x = a and b"])
def test_these_tests_let_pass_what_is_good(code):
    (node,) = ast.parse(code).body
    inner = node.value
    assert not literal_times_truth_value(inner) and not nested_conditional(inner)
