"""Files of JSON, read with suspicion: who made them is not known, nor whether they are whole.

Everything wrong with a file is a UserError of one line: missing, no regular file (a FIFO would be
waited for for ever), too large for its kind, not UTF-8, cut, nested too deeply, a key twice.
"""

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path

from common.errors import UserError

LARGEST = 64 << 20  # bytes of a file, above the largest tokenizer.json that is known
DEEPEST = 50  # levels of objects and lists in one another
SHOWN = 80  # characters of a wrong value
START_OVER = "bring it back, or start over with --overwrite"  # how a stage mends one
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # of half a character, where the other is missing


def regular_size(path, what, mend=""):
    """Bytes of a file. Raises UserError for what is none: a FIFO would be waited for for ever."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist{ending(mend)}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what}: {path} cannot be read ({reason})") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{what}: {path} is a folder, wanted a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what}: {path} is a pipe or a device, wanted a file")
    return status.st_size


def read_json(path, what, mend=""):
    """The JSON object in `path`, a dict. Raises UserError where it is missing or broken.

    `mend`: what the user can do about it, the end of the message.
    """
    size = regular_size(path, what, mend)
    try:
        if size > LARGEST:
            raise ValueError(f"it has {size:,} bytes, wanted at most {LARGEST:,}")
        value = parse(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}){ending(mend)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} holds {shown(value)}, wanted an object{ending(mend)}")
    return value


def parse(content):
    """The value of JSON text (bytes), which a stranger may have made. Raises ValueError."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    text = content.decode("utf-8")
    value = parse_text(text)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character: a lone surrogate") from None
    return value


def parse_text(text):
    """The same of text, which may hold lone surrogates."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"over {DEEPEST} levels of lists and objects") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's own message advises to allow them
            raise ValueError("a number of thousands of digits") from None
        raise
    _check_depth(value)
    return value


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, n in times.items() if n > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return found


def _check_depth(value):
    level = [value]
    for _ in range(DEEPEST):
        lists = [inner for inner in level if isinstance(inner, list)]
        lists += [inner.values() for inner in level if isinstance(inner, dict)]
        level = [inner for values in lists for inner in values if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"over {DEEPEST} levels of lists and objects")


def shown(value):
    """A wrong value, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def ending(mend):
    return f"; {mend}" if mend else ""
