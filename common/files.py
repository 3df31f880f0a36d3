"""All that the kit writes to a disk, and the rule that it never touches anybody else's files.

Nothing else in the kit opens a file for writing, renames or deletes one. Each change passes
`reached` before and after it, where tests stop a stage.

Every folder that is written into gets a list, LIST: `+name` before a file is first made, `-name`
after it was deleted, `=kind` for what the whole folder is. A file that the list does not name is
somebody else's. It is never replaced, never deleted, whatever it is called. The list is only ever
appended to, so a kill cannot harm it. A folder with a kind, a run or a token set, is written to by
whoever holds its lock, and by nobody else: no other output lands on a model by a slip of the hand.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

import safetensors

from common.errors import UserError
from common.records import read_json  # noqa: F401  (until every caller has moved)

LIST = ".slm-kit"
FIRST_LINE = "files that slm-kit wrote here, 1"
ROOM = "-folder"  # behind that: a folder that a library fills
TEMPORARY = ".slm-kit-tmp"  # behind the name of a file that is not whole yet; nobody else's


def reached(moment, path):
    """A moment before or after a change of the disk. Tests replace this function."""


@contextlib.contextmanager
def change(kind, path):
    """Around a change: "create", "write", "append", "cut", "rename", "remove", "folder"."""
    reached(f"before {kind}", path)
    yield
    reached(f"after {kind}", path)


# --------------------------------------------------------------------------------------------------
# whose a file is


def _listed(folder):
    """The lines of a folder's list below the first. Raises UserError."""
    try:
        with open(Path(folder) / LIST, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = text.split("\n")[:-1]  # a last line that was cut short does not count
    if lines and lines[0] != FIRST_LINE:
        raise UserError(
            f"{folder}/{LIST}: got {lines[0]!r}, wanted {FIRST_LINE!r}; another program's file or "
            f"another version's: name another folder to write to"
        )
    return lines[1:]


def written(folder):
    """The names of the files (and folders) in `folder` that the kit made. Raises UserError."""
    names = set()
    for line in _listed(folder):
        if line.startswith("+"):
            names.add(line[1:])
        elif line.startswith("-"):
            names.discard(line[1:])
    return names


def kind_of(folder):
    """What a folder is, as a stage said it: "run", "token set"; None where none did."""
    kinds = [line[1:] for line in _listed(folder) if line.startswith("=")]
    return kinds[-1] if kinds else None


def is_ours(path):
    """Did the kit write this file or folder?"""
    return Path(path).name in written(Path(path).parent)


def claim(path):
    """Enter a file or folder that is about to be made into its folder's list.

    Raises UserError where something of that name is there that the kit did not write.
    """
    path = Path(path)
    make_folder(path.parent)
    if path.name != LIST:
        refuse_taken([path])
    if is_ours(path):
        return
    if path.name != LIST:
        refuse_foreign([temporary_of(path)])
    _note(path.parent, "+" + path.name)


def refuse_taken(paths):
    """Raises UserError where one of these cannot be an output.

    It is somebody else's, or lies in a run's folder or the like, which is not held by us.
    """
    for path in map(Path, paths):
        kind = kind_of(path.parent)
        if kind and _key(path.parent / LIST) not in _held:
            raise UserError(
                f"{path}: lies in a {kind}'s folder, where nothing else is written; "
                f"name another place"
            )
        refuse_foreign([path])


def own_folder(folder):
    """Make a folder of ours, which `remove_folder` will take away. One that is there stays theirs.

    Folders on the way to a file need no such note: `make_folder` makes them, nobody removes them.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        claim(folder)
    make_folder(folder)


def refuse_foreign(paths):
    """Raises UserError where one of these is there and the kit did not write it."""
    for path in paths:
        if os.path.lexists(path) and not is_ours(path):
            raise UserError(
                f"{path}: exists, and this kit did not write it; it is left as it is: move it "
                f"away, or name another place to write to"
            )


def _note(folder, line):
    """Append a line to a folder's list."""
    path = folder / LIST
    with change("append", path):
        with open(path, "a+b") as file:
            file.seek(0)
            known = file.read()
            whole = known.rfind(b"\n") + 1
            if whole < len(known):  # a power loss cut the last line
                file.truncate(whole)
            begins = "" if whole else FIRST_LINE + "\n"
            file.write((begins + line + "\n").encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())


def temporary_of(path):
    return path.with_name(path.name + TEMPORARY)


def refuse_overlap(out, inputs):
    """Raises UserError where `out` (a file or folder) lies in an input, or an input in it.

    `inputs`: {flag: path or list of paths}; what does not exist (a hub id) is passed over.
    """
    target = Path(out).resolve()
    for flag, paths in inputs.items():
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            if path is None or not os.path.exists(path):
                continue
            source = Path(path).resolve()
            if target == source or source in target.parents or target in source.parents:
                raise UserError(
                    f"--out {out}: overlaps with {flag} {path}, which is read; "
                    f"name a place outside of it"
                )


# --------------------------------------------------------------------------------------------------
# one process at a time

_held = {}  # path of a locked file -> its descriptor


def _key(path):
    """One name for a file, however its folder is spelled."""
    return Path(os.path.realpath(path.parent)) / path.name


def lock(path):
    """Keep other processes from `path` (a file of ours, made if need be) until `unlock` or the end.

    A killed process holds nothing. Raises UserError where another one holds it.
    """
    path = Path(path)
    if _key(path) in _held:
        return
    claim(path)
    descriptor = _opened(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        place = path.parent if path.name == LIST else path
        raise UserError(
            f"{place}: another process is writing to it; wait until it ends, or name another --out"
        ) from None
    _held[_key(path)] = descriptor


def _opened(path, flags):
    """The descriptor of a file that is made if need be. A link is not followed."""
    if os.path.lexists(path):
        return os.open(path, flags | os.O_NOFOLLOW)
    with change("create", path):
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def lock_folder(folder, kind):
    """`lock` for a whole folder, which becomes a `kind`; makes it where it is not there.

    Raises UserError where the kit wrote something else there.
    """
    folder = Path(folder)
    other = kind_of(folder)
    others = written(folder) - {LIST}
    if other != kind and (other or others):
        what = f"a {other}" if other else f"{sorted(others)[0]}, which the kit wrote"
        raise UserError(f"{folder}: holds {what}, wanted a {kind}'s folder; name another --out")
    make_folder(folder)
    lock(folder / LIST)
    if other is None:
        _note(folder, "=" + kind)
    for name in sorted(written(folder)):  # what a kill left
        if os.path.lexists(folder / name):
            _clear(folder / name)
        else:
            _forget(folder / name)


def unlock(path):
    """Let others have a file or a folder. Does nothing where it is not held."""
    for key in (_key(Path(path)), _key(Path(path) / LIST)):
        if key in _held:
            os.close(_held.pop(key))


@contextlib.contextmanager
def taking_turns(folder):
    """For a short time: another process that is at it is waited for."""
    path = Path(folder) / LIST
    claim(path)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held[_key(path)] = file.fileno()
        try:
            yield
        finally:
            _held.pop(_key(path), None)


def _let_go():
    """In a forked process: the lock is its parent's."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


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
            _to_disk(temporary)
        rename(temporary, path)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
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
        _to_disk(source)  # the names in it
    with change("rename", target):
        os.replace(source, target)
        _to_disk(target.parent)
    if is_ours(source):
        _forget(source)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def part(path):
    """A new file to write bytes to, in a folder that gets its name only when all of it is whole.

    The folder's list names it already (`claim`), perhaps by another rank. On the disk at the end.
    """
    with change("write", path):
        with open(path, "xb") as file:
            yield file
        _to_disk(path)


# --------------------------------------------------------------------------------------------------
# growing files


class Growing:
    """A file that is written at its end. It is opened at a size in bytes, to which it is cut."""

    def __init__(self, path, size):
        self.path = Path(path)
        claim(self.path)
        self.file = os.fdopen(_opened(self.path, os.O_RDWR), "r+b")
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
# folders and removals


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


def remove(path):
    """Delete a file of ours, if it is there. Somebody else's is left. Returns whether it went."""
    path = Path(path)
    if not is_ours(path):
        return not os.path.lexists(path)
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink()):
        _remove(path)
    _forget(path)
    return True


def _forget(path):
    """A file of ours is gone: its name, and what a kill left under its temporary one, go too."""
    _clear(path)
    _note(path.parent, "-" + path.name)


def _clear(path):
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
            _note(folder.parent, "-" + folder.name)
    elif (folder / LIST).exists() and not written(folder) - {LIST}:  # all that is left is theirs
        _remove(folder / LIST)


def remove_tree(folder):
    """Delete a folder of ours that a library filled, with all that is in it."""
    folder = Path(folder)
    if is_ours(folder):
        if folder.is_dir():
            with change("remove", folder):
                shutil.rmtree(folder)
        _note(folder.parent, "-" + folder.name)
