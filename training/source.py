"""The code that a method consists of, as a hash: a run goes on with the code that it began with."""

import argparse
import ast
import dataclasses
import dis
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import sys
import sysconfig
import textwrap
import types
from pathlib import Path

import numpy as np
import torch

import slm

VERSION = "4:"  # of what is hashed: hashes of other versions cannot be compared
GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}  # and no attribute, such as t.loss beside a function loss
ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}  # which follow them in a.b
PLAIN = (bool, int, float, str, bytes, type(None))
RECORDS = (types.SimpleNamespace, argparse.Namespace)
DEEPEST = 8  # lists in lists
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def source_hash(method):
    """sha256 of a slm.Score's functions, of what they use, and of its settings.

    What they use: functions and classes of any file that is not of an installed package; numbers,
    words, tensors, arrays, and objects that hold such. The choice that slm.py makes of what they
    give is part of it.

    Comments, docstrings, layout and exceptions do not count. Where there is no source, as of a
    compiled function, the version of its package stands for it. None of no method.
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
        if isinstance(used, (types.FunctionType, type)):
            if not is_installed(used) and not is_error(used):
                describe(used, seen)
        elif (text := plain(used)) is not None:
            seen[f"{id(function)} {name}"] = f"{name} = {text}"
            if has_fields(used):
                describe(type(used), seen)


def uses(function):
    """(name, value) of the globals and of the outer variables that a function names.

    Of a module that is not an installed one: what the function names of it.
    """
    found = {}
    codes = [function.__code__]
    for code in codes:
        names = []  # as in a.b.c
        for step in dis.get_instructions(code):
            if step.opname in GLOBAL:
                names = [step.argval]
            elif step.opname in ATTRIBUTE and names:
                names.append(step.argval)
            else:
                names = []
            if names:
                found |= resolved(names, function.__globals__)
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    yield from sorted(found.items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        yield name, cell.cell_contents


def resolved(names, namespace):
    """{"a.b.c": its value}, where a and b are modules of no package; {} for anything else."""
    first, *others = names
    if first not in namespace:
        return {}
    value = namespace[first]
    for name in others:
        if not isinstance(value, types.ModuleType) or is_installed(value):
            return {}
        value = getattr(value, name, None)
    return {} if isinstance(value, types.ModuleType) else {".".join(names): value}


def is_installed(value):
    """Is it of Python or of an installed package? Those are known by their versions."""
    name = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # built in, or made by exec
        return name in sys.builtin_module_names
    return any(Path(file).is_relative_to(folder) for folder in INSTALLED)


def is_error(value):
    return isinstance(value, type) and issubclass(value, BaseException)


def has_fields(value):
    """Is it an object that is known by its fields, such as a configuration?"""
    if isinstance(value, (types.ModuleType, types.FunctionType, type)):
        return False
    is_record = dataclasses.is_dataclass(value) or isinstance(value, RECORDS)
    return hasattr(value, "__dict__") and (is_record or not is_installed(type(value)))


def plain(value, depth=0):
    """The text of numbers, words, tensors, arrays, lists and objects of them; None of others."""
    if isinstance(value, PLAIN):
        return repr(value)
    if depth == DEEPEST:
        return None
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} {content}"
    if isinstance(value, (tuple, list)):
        parts = [plain(item, depth + 1) for item in value]
        return None if None in parts else f"[{', '.join(parts)}]"
    if isinstance(value, dict):
        items = sorted((str(key), plain(item, depth + 1)) for key, item in value.items())
        return repr(dict(items))
    return plain(vars(value), depth + 1) if has_fields(value) else None


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
