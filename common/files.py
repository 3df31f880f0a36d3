"""All that the kit writes to a disk: whole files, growing ones, renames and removals.

Nothing else in the kit opens a file for writing, renames or deletes one (but tools/results, which
writes the repository's own pages). Whose a file is: common/owned.py. Each change passes
common/changes.py.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import safetensors

from common.changes import change, make_folder, opened, to_disk
from common.errors import UserError, reason_of
from common.owned import LIST, claim, is_ours, note, temporary_of, written

ROOM = "-folder"  # behind a temporary name: a folder that a library fills


# --------------------------------------------------------------------------------------------------
# whole files


def write_atomic(path, content):
    """Write text or bytes: a kill leaves the old file or the new one. Raises UserError, OSError."""
    if isinstance(content, str):
        content = content.encode()
    with renamed_when_whole(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)


@contextlib.contextmanager
def renamed_when_whole(path):
    """A temporary name to write to; it becomes `path` when the block ends well.

    It is on the disk before it is renamed, so that a power loss leaves a whole file, too. Failed
    writes are OSErrors, also those that torch and safetensors report in their own way.
    """
    path = Path(path)
    claim(path)
    temporary = temporary_of(path)
    try:
        with change("write", temporary):
            yield temporary
            to_disk(temporary)
        rename(temporary, path)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = reason_of(error)
        message = f"could not be written, is the disk full? ({reason})"
        raise OSError(errno.EIO, message, str(path)) from None
    finally:
        if temporary.exists():
            _remove(temporary)


@contextlib.contextmanager
def room_for_library(temporary):
    """For a library that makes files of its own beside the one that it is told to write.

    In `renamed_when_whole`, whose name `temporary` is: yields a name in a folder made for it.
    """
    _remove_room(temporary)
    room = temporary.with_name(temporary.name + ROOM)
    make_folder(room)
    try:
        yield room / "file"
        os.replace(room / "file", temporary)
    finally:
        _remove_room(temporary)


def rename(source, target):
    """Give one of our files another name. Raises UserError where `target` is somebody else's."""
    claim(target)
    if source.is_dir():
        to_disk(source)  # the names in it
    with change("rename", target):
        os.replace(source, target)
        to_disk(target.parent)
    if is_ours(source):
        forget(source)


@contextlib.contextmanager
def part(path):
    """A new file to write bytes to, in a folder that gets its name only when all of it is whole.

    The folder's list names it already (`claim`), perhaps by another rank. On the disk at the end.
    """
    with change("write", path):
        with open(path, "xb") as file:
            yield file
        to_disk(path)


# --------------------------------------------------------------------------------------------------
# growing files


class Growing:
    """A file that is written at its end. It is opened at a size in bytes, to which it is cut."""

    def __init__(self, path, size):
        self.path = Path(path)
        claim(self.path)
        self.file = os.fdopen(opened(self.path, os.O_RDWR), "r+b")
        if os.path.getsize(self.path) < size:
            self.file.close()
            raise UserError(f"{self.path}: was cut, wanted at least {size} bytes")
        if os.path.getsize(self.path) > size:
            with change("cut", self.path):
                self.file.truncate(size)
        self.file.seek(size)

    def write(self, content):
        """Append bytes. After a kill they are in the file, after a power loss perhaps not."""
        with change("append", self.path):
            self.file.write(content)
            self.file.flush()

    def to_disk(self):
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


# --------------------------------------------------------------------------------------------------
# removals


def remove(path):
    """Delete a file of ours, if it is there. Somebody else's is left. Returns whether it went."""
    path = Path(path)
    if not is_ours(path):
        return not os.path.lexists(path)
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink()):
        _remove(path)
    forget(path)
    return True


def forget(path):
    """A file of ours is gone: its name, and what a kill left under its temporary one, go too."""
    clear_left_over(path)
    note(path.parent, "-" + path.name)


def clear_left_over(path):
    """Take away what a kill left under the temporary names of a file of ours."""
    if os.path.lexists(temporary_of(path)):
        _remove(temporary_of(path))
    _remove_room(temporary_of(path))


def _remove_room(temporary):
    room = temporary.with_name(temporary.name + ROOM)
    if room.is_dir() and not room.is_symlink():
        with change("remove", room):
            shutil.rmtree(room)


def _remove(path):
    with change("remove", path):
        os.unlink(path)


def remove_folder(folder):
    """Delete a folder's files that are ours, at all depths, and the folders that become empty."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for name in sorted(written(folder)):
        inner = folder / name
        if inner.is_dir() and not inner.is_symlink():
            remove_folder(inner)
        elif name != LIST:
            remove(inner)
    if {path.name for path in folder.iterdir()} <= {LIST}:
        with change("remove", folder):
            shutil.rmtree(folder)
        if is_ours(folder):
            note(folder.parent, "-" + folder.name)
    elif (folder / LIST).exists() and not written(folder) - {LIST}:  # all that is left is theirs
        _remove(folder / LIST)


def remove_tree(folder):
    """Delete a folder of ours that a library filled, with all that is in it."""
    folder = Path(folder)
    if is_ours(folder):
        if folder.is_dir():
            with change("remove", folder):
                shutil.rmtree(folder)
        note(folder.parent, "-" + folder.name)
