"""The code that a method consists of, as a hash: a run goes on with the code that it began with."""

import ast
import dis
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import textwrap
import types

import slm

VERSION = "3:"  # of what is hashed: hashes of other versions cannot be compared
GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}  # and no attribute, such as t.loss beside a function loss
PLAIN = (bool, int, float, str, bytes, type(None))


def source_hash(method):
    """sha256 of a slm.Score's functions, of what they call in their own file, and of its settings.

    The choice that slm.py makes of what they give is part of it.

    Comments, docstrings and layout do not count. Where there is no source, as of a compiled
    function, the version of its package stands for it. None of no method.
    """
    if method is None:
        return None
    functions = [method.function, method.choose or slm.keep_top, method.remember]
    functions += [slm.n_keep, slm.weights_of]
    functions += [slm.PREDICTION[name] for name in method.needs if name in slm.PREDICTION]
    seen = {}
    for function in functions:
        if function is not None:
            describe(function, seen)
    settings = repr((type(method).__name__, method.needs, method.per))
    text = "\n".join([settings, *seen.values()])
    return VERSION + hashlib.sha256(text.encode()).hexdigest()


def describe(value, seen):
    """Add the text of a function, class or callable, and of what it uses, to {id: text}."""
    if id(value) in seen:
        return
    if isinstance(value, functools.partial):
        seen[id(value)] = f"partial {plain(value.args)} {plain(value.keywords)}"
        describe(value.func, seen)
        return
    if isinstance(value, types.MethodType):
        seen[id(value)] = f"method {plain(vars(value.__self__))}"
        describe(value.__func__, seen)
        return
    if not isinstance(value, (types.FunctionType, type)):
        if not callable(value) or isinstance(value, types.BuiltinFunctionType):
            seen[id(value)] = f"{name_of(value)} {version_of(value)}"
            return
        seen[id(value)] = f"instance {plain(getattr(value, '__dict__', {}))}"
        describe(type(value), seen)
        return
    seen[id(value)] = text_of(value)
    functions = [value] if isinstance(value, types.FunctionType) else vars(value).values()
    for function in functions:
        if isinstance(function, types.FunctionType):
            describe_used(function, seen)


def describe_used(function, seen):
    """What a function's text names: defaults as they are, its file's functions, plain values."""
    defaults = plain(function.__defaults__), plain(function.__kwdefaults__)
    seen[f"{id(function)} defaults"] = f"{defaults[0]} {defaults[1]}"
    for name, used in uses(function):
        if isinstance(used, (types.FunctionType, type)) and same_file(used, function):
            describe(used, seen)
        elif (text := plain(used)) is not None:
            seen[f"{id(function)} {name}"] = f"{name} = {text}"


def uses(function):
    """(name, value) of the globals and of the outer variables that a function names."""
    names = set()
    codes = [function.__code__]
    for code in codes:
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in GLOBAL}
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    for name in sorted(names & set(function.__globals__)):
        yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        yield name, cell.cell_contents


def same_file(used, function):
    return getattr(used, "__module__", None) == function.__module__


def plain(value):
    """The text of numbers, words, and lists of them; None of anything else."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        parts = [plain(item) for item in value]
        return None if None in parts else f"[{', '.join(parts)}]"
    if isinstance(value, dict):
        return repr({str(key): plain(item) for key, item in sorted(value.items())})
    return None


def text_of(value):
    """The source of a function or class, without comments and docstrings."""
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        return f"{name_of(value)} {version_of(value)}"
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a statement
        return source
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def name_of(value):
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"


def version_of(value):
    """What stands for a source that cannot be read: the compiled code, or the package's version."""
    code = getattr(value, "__code__", None)
    if code:
        constants = [const for const in code.co_consts if not isinstance(const, types.CodeType)]
        return f"Python {platform.python_version()} {code.co_code} {code.co_names} {constants}"
    package = (getattr(value, "__module__", None) or "").partition(".")[0]
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return platform.python_version()
