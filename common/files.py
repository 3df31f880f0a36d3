"""What every stage shares and what needs no torch: users' errors and exit codes, files that a kill leaves whole."""

import contextlib
import errno
import json
import os
from pathlib import Path

import safetensors

from common.errors import UserError


def write_atomic(path, content):
    """Write text or bytes under a temporary name, then rename: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def renamed_when_whole(path):
    """A temporary name to write to; it becomes `path` when the block ends well. Failed writes are OSErrors."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:  # how torch and safetensors report a full disk
        raise OSError(
            errno.EIO,
            f"could not be written, is the disk full? ({str(error).splitlines()[0]})",
            str(path),
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path, what):
    """The JSON object in `path`. Raises UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error})") from None


def is_demo_folder(path):
    """Is this one of the demo's default folders, where a finished or interrupted stage is taken up without a flag?"""
    parts = Path(path).parts
    return (
        len(parts) > 1
        and parts[0] in ("data", "out")
        and (parts[1] == "demo" or parts[1].startswith("demo-seed"))
    )
