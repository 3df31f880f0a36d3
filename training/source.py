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
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
RECORDS = (types.SimpleNamespace, argparse.Namespace)
DEEPEST = 8  # lists in lists
STANDARD = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, wherever they are
PACKAGES = {"torch", "numpy"}  # also where they are built in place


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
    if hasattr(value, "__wrapped__"):  # behind a decorator, such as functools.cache
        describe(value.__wrapped__, seen)
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
    for function in functions_of(value):
        describe_used(function, seen)
    for base in value.__bases__ if isinstance(value, type) else ():
        if not is_installed(base):
            describe(base, seen)


def functions_of(value):
    """A function itself; those of a class: methods, static ones too, and properties."""
    if isinstance(value, types.FunctionType):
        return [value]
    found = []
    for part in vars(value).values():
        if isinstance(part, property):
            found += [part.fget, part.fset]
        else:
            found.append(getattr(part, "__func__", part))
    return [part for part in found if isinstance(part, types.FunctionType)]


def describe_used(function, seen):
    """What a function's text names: defaults as they are, its file's functions, plain values."""
    defaults = plain(function.__defaults__), plain(function.__kwdefaults__)
    seen[f"{id(function)} defaults"] = f"{defaults[0]} {defaults[1]}"
    for name, used in uses(function):
        if isinstance(used, functools.partial) or hasattr(used, "__wrapped__"):
            describe(used, seen)
        elif isinstance(used, (types.FunctionType, type)):
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
    if name.partition(".")[0] in PACKAGES:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # built in, or made by exec
        return name in sys.builtin_module_names
    path = Path(file)
    return bool(INSTALLED.intersection(path.parts)) or any(map(path.is_relative_to, STANDARD))


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
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain_array(value, depth)
    if isinstance(value, torch.nn.Module):
        return plain(dict(value.state_dict()), depth + 1)
    if isinstance(value, (tuple, list, set, frozenset)):
        parts = [plain(item, depth + 1) for item in value]
        if None in parts:
            return None
        return f"[{', '.join(sorted(parts) if isinstance(value, (set, frozenset)) else parts)}]"
    if isinstance(value, dict):
        items = [(plain(key, depth + 1), plain(item, depth + 1)) for key, item in value.items()]
        return repr(sorted((key, str(item)) for key, item in items if key))
    return plain(vars(value), depth + 1) if has_fields(value) else None


def plain_array(value, depth):
    """Type, shape and a hash of a tensor or array; None where its bytes cannot be read."""
    said = f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, torch.Tensor):
        try:
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (RuntimeError, TypeError, NotImplementedError):  # sparse, or without data
            return None
    elif value.dtype.hasobject:
        return plain(value.tolist(), depth + 1)
    else:
        content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return f"{said} {hashlib.sha256(content).hexdigest()}"


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
