"""Damage to files, and the rule that reading a damaged one is a success or a UserError of one line.

    content = damaged_json(rng, {"count": 3})     # bytes of JSON, nearly right
    content = damaged_bytes(rng, content)         # any file: cut, flipped, repeated
    reads_or_refuses(lambda: read(path))          # True: it was read; anything else fails

`rng` is a random.Random, or hypothesis' own, which then finds the smallest damage that fails.
"""

import contextlib
import copy
import json
import resource
import signal
from pathlib import Path

from common.errors import UserError

SECONDS = 300  # a file that keeps a reader longer makes it hang; none comes near it
MEMORY = 4 << 30  # bytes of address space that reading a small file may add
TEXTS = ["", "a", "-1", "\0", "\n", "é", "\u2581", "../../x", "/dev/zero", "<s>", "x" * 5000]
NUMBERS = [0, 1, -1, 2, 3, 255, 256, 65536, 2**31, 2**32, 2**63, -(2**63), 10**30]
FLOATS = [0.5, -0.5, 1e-300, 1e99, float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": ""}, [0], {"a": 1}]
HOSTILE = [*TEXTS, *NUMBERS, *FLOATS, *OTHERS]


class Hang(BaseException):
    """No Exception: a reader that catches everything must not catch this."""


def reads_or_refuses(read):
    """Was it read? A UserError of one line is a refusal; whatever else comes out is a failure."""
    try:
        with limited():
            read()
        return True
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 4000, message
        return False


@contextlib.contextmanager
def limited():
    """Bounded time and memory."""

    def hang(signum, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def address_space():
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# --------------------------------------------------------------------------------------------------
# JSON


def damaged_json(rng, value):
    """Bytes of JSON with one to three things wrong, mostly in its values, at times in its text."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = damaged_value(rng, value)
    text = json.dumps(value).encode()
    return damaged_text(rng, text) if rng.randrange(6) == 0 else text


def damaged_value(rng, value):
    """The value with a change at one place in it; `value` itself may change."""
    place, key = rng.choice(places(value))
    if place is None:
        return hostile(rng)
    how = rng.choice(["replace", "replace", "replace", "remove", "add", "copy", "nudge"])
    if how == "remove":
        del place[key]
    elif how == "add" and isinstance(place, dict):
        place[rng.choice(TEXTS)] = hostile(rng)
    elif how == "add":
        place.insert(key, hostile(rng))
    elif how == "copy":  # what stands elsewhere in the file
        other, inside = rng.choice(places(value))
        place[key] = copy.deepcopy(value if other is None else other[inside])
    elif how == "nudge" and type(place[key]) in (int, float):
        place[key] = rng.choice([place[key] + 1, place[key] - 1, -place[key], place[key] * 1000])
    else:
        place[key] = hostile(rng)
    return value


def hostile(rng):
    """A value of any kind; a copy, since the next change may be inside of it."""
    return copy.deepcopy(rng.choice(HOSTILE))


def places(value, most=400):
    """(container, key or index) of the values inside, in order; (None, None) is the whole."""
    found = [(None, None)]
    level = [value]
    while level and len(found) < most:
        inner = level.pop(0)
        if not isinstance(inner, (dict, list)):
            continue
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        for key in list(keys)[:50]:  # of a vocabulary not every entry
            found.append((inner, key))
            level.append(inner[key])
    return found


def damaged_text(rng, text):
    """JSON text that is none, or a trap."""
    how = rng.randrange(8)
    if how == 0:
        return text[: rng.randrange(len(text) + 1)]
    if how == 1:
        return b"\xef\xbb\xbf" + text
    if how == 2:
        return text.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    if how == 3:
        return text.replace(b"1", b"9" * 5000, 1)
    if how == 4:
        return text.replace(b":", b":" + b"[" * 100_000, 1)
    if how == 5:
        return text.replace(b'"', b'"\\ud800', 1)
    if how == 6:
        return b""
    return damaged_bytes(rng, text)


# --------------------------------------------------------------------------------------------------
# any file


def damaged_bytes(rng, content):
    """The content with one to four changes: cut, flipped, inserted, repeated, zeroed."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content) + 1)
        size = rng.choice([1, 1, 2, 8, 100])
        how = rng.randrange(6)
        if how == 0:
            del content[at:]
        elif how == 1:
            del content[at : at + size]
        elif how == 2:
            content[at:at] = bytes(rng.randrange(256) for _ in range(min(size, 8)))
        elif how == 3:
            content[at : at + size] = b"\xff" * len(content[at : at + size])
        elif how == 4:
            content[at:at] = content[at : at + size]
        elif at < len(content):
            content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def damaged_lines(rng, records):
    """Bytes of a file of JSON lines, a line or two of it damaged."""
    lines = [json.dumps(record).encode() for record in records]
    for _ in range(rng.choice([1, 2])):
        at = rng.randrange(len(lines))
        lines[at] = damaged_json(rng, records[at])
    ending = rng.choice([b"\n", b"\n", b"", b"\r\n", b"\n\n"])
    return b"\n".join(lines) + ending
