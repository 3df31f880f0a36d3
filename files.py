"""What every stage shares and what needs no torch: users' errors and exit codes, files that a kill leaves whole."""

import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path

import safetensors


class UserError(ValueError):
    """Something the user can mend. Stages print it as one line and exit with code 2."""


def cli(main):
    """Run a stage's `main()`. A user's error is one line and exit code 2; Ctrl-C and SIGTERM are exit code 130."""
    def interrupted(signum, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupted)
    try:
        main()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        code, line = 2, f"error: {error.strerror or error}{where}; what was finished before is kept, run again to go on"
    except KeyboardInterrupt:
        code, line = 130, "interrupted: what was done is kept; the same command goes on (a model's stages with --resume outside the demo's folders)"
    else:
        if ranks := in_a_group():
            ranks.destroy_process_group()
        return
    print("\n" + " ".join(str(line).split()) if sys.stderr.isatty() else " ".join(str(line).split()), file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code) if in_a_group() else sys.exit(code)  # other ranks must not wait for this one


def in_a_group():
    """torch.distributed where this process is one of several ranks, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


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
    except (RuntimeError, safetensors.SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(errno.EIO, f"could not be written, is the disk full? ({str(error).splitlines()[0]})",
                      str(path)) from None
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
    return len(parts) > 1 and parts[0] in ("data", "out") and (parts[1] == "demo" or parts[1].startswith("demo-seed"))
