"""The kit's one reader of JSON: an object of bounded size, checked against a dataclass.

    @dataclass
    class Header:
        count: Annotated[int, at_least(0)]
        kinds: list[str] | None = None      # a default: the key may be missing

    header = read_record("meta.json", Header, "token set", "make it again with prepare.py")

An annotation is int, float, str, bool, Any, list[...], dict[str, ...], a dataclass, one of these
`| None`, or Annotated[..., bound]. A whole number is no float such as 3.0, and fits 64 bits. Keys
that the dataclass does not name are passed over: a newer kit may write more.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable

from common.errors import UserError
from common.json_files import LARGEST, ending, parse, read_json, regular_size, shown

WANTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a value must fulfil beside its type, and how a message says so."""

    holds: Callable
    words: str


def at_least(least):
    return Bound(lambda value: value >= least, f"{least} or more")


def between(least, most):
    return Bound(lambda value: least <= value <= most, f"{least} to {most}")


def one_of(*values):
    return Bound(lambda value: value in values, " or ".join(map(str, values)))


def matching(pattern, words):
    return Bound(lambda value: re.fullmatch(pattern, value) is not None, words)


FINITE = Bound(math.isfinite, "a finite number")


def read_record(path, kind, what, mend=""):
    """The object in `path` as a `kind`, a dataclass. Raises UserError where it is none.

    `mend`: what the user can do about it, the end of the message.
    """
    return as_record(read_json(path, what, mend), kind, f"{what}: {path}", mend)


def read_lines(path, kind, what, mend=""):
    """The objects of a file with one a line, as dicts; each is a `kind`, or UserError is raised.

    A last line that is not whole is left out.
    """
    regular_size(path, what, mend)
    found = []
    with open(path, "rb") as file:
        while (line := file.readline(LARGEST)).endswith(b"\n"):
            where = f"{what}: {path}, line {len(found) + 1}"
            try:
                value = parse(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON ({error}){ending(mend)}") from None
            as_record(value, kind, where, mend)
            found.append(value)
    return found


def as_record(value, kind, where, mend=""):
    """A value of JSON as a `kind`. Raises UserError that begins with `where`."""
    try:
        return _as(kind, value, "")
    except _Misfit as misfit:
        raise UserError(f"{where}: {misfit}{ending(mend)}") from None


# --------------------------------------------------------------------------------------------------
# the check


class _Misfit(Exception):
    """In words: what stands where, and what was wanted."""


def _require(ok, value, wanted, place):
    if not ok:
        place = place.lstrip(".") or "it"
        raise _Misfit(f"{place} is {shown(value)}, wanted {wanted}")


def _as(kind, value, place):
    """`value` as an annotation says; `place`: where it stands, for the message."""
    origin = typing.get_origin(kind)
    inner = typing.get_args(kind)
    if kind is typing.Any:
        return value
    if origin is typing.Annotated:
        value = _as(inner[0], value, place)
        for bound in inner[1:]:
            _require(bound.holds(value), value, bound.words, place)
        return value
    if origin in (typing.Union, types.UnionType):
        (other,) = set(inner) - {type(None)}
        return None if value is None else _as(other, value, place)
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, place)
    if origin is list:
        _require(isinstance(value, list), value, "a list", place)
        return [_as(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), value, "an object", place)
        return {key: _as(inner[1], item, f"{place}[{shown(key)}]") for key, item in value.items()}
    fits = type(value) is kind or (kind is float and type(value) is int)  # True is no int here
    if type(value) is int:
        fits = fits and -(1 << 63) <= value < 1 << 63
    _require(fits, value, WANTED[kind], place)
    return value


def _fields(kind, value, place):
    """`value` as a dataclass."""
    _require(isinstance(value, dict), value, "an object", place)
    given = {}
    for name, inner, needed in _fields_of(kind):
        if name in value:
            given[name] = _as(inner, value[name], f"{place}.{name}")
        elif needed:
            raise _Misfit(f"{place}.{name} is missing".lstrip("."))
    return kind(**given)


@functools.cache
def _fields_of(kind):
    """[(name, annotation, must it be there)] of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING is field.default_factory
        found.append((field.name, hints[field.name], needed))
    return found
