"""Files that a kill leaves whole: written under a temporary name, then renamed."""

import contextlib
import errno
import json
import os
from pathlib import Path

import safetensors

from common.errors import UserError


def write_atomic(path, content):
    """Write text or bytes: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def renamed_when_whole(path):
    """A temporary name to write to; it becomes `path` when the block ends well.

    Failed writes are OSErrors, also those that torch and safetensors report in their own way.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        message = f"could not be written, is the disk full? ({reason})"
        raise OSError(errno.EIO, message, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path, what):
    """The JSON object in `path`. Raises UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error})") from None
