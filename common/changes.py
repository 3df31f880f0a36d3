"""Every change of the disk passes here: the moment before it, and the one after.

Tests replace `reached`, and stop a stage there.
"""

import contextlib
import os
from pathlib import Path

from common.errors import UserError


def reached(moment, path):
    """A moment before or after a change of the disk. Tests replace this function."""


@contextlib.contextmanager
def change(kind, path):
    """Around a change: "create", "write", "append", "cut", "rename", "remove", "folder"."""
    reached(f"before {kind}", path)
    yield
    reached(f"after {kind}", path)


def make_folder(folder):
    """Make a folder, and those above it."""
    folder = Path(folder)
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise UserError(f"{folder}: is a file, wanted a folder; name another place to write to")
    make_folder(folder.parent)
    with change("folder", folder):
        folder.mkdir(exist_ok=True)


def opened(path, flags):
    """The descriptor of a file that is made if need be. A link is not followed."""
    if os.path.lexists(path):
        return os.open(path, flags | os.O_NOFOLLOW)
    with change("create", path):
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def to_disk(path):
    """A file, or the names in a folder: a power loss takes nothing of it any more."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
