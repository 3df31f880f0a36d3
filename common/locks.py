"""One process at a time: a second one with the same output gets one line, the first goes on.

Locks are the system's (flock): a killed process holds nothing.
"""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from common.changes import make_folder, opened
from common.errors import UserError
from common.files import clear_left_over, forget
from common.owned import LIST, claim, key_of, kind_of, locked, note, written

POLL = 0.1  # seconds


def lock(path, wait=0.0):
    """Keep other processes from `path` (a file of ours, made if need be) until `unlock` or the end.

    Raises UserError where another one holds it, and has not let go after `wait` seconds.
    """
    path = Path(path)
    if key_of(path) in locked:
        return
    claim(path)
    descriptor = _opened(path)
    last = time.monotonic() + wait
    while not _is_taken(descriptor):
        if time.monotonic() < last:
            time.sleep(POLL)
            continue
        os.close(descriptor)
        place = path.parent if path.name == LIST else path
        raise UserError(
            f"{place}: another process is writing to it; wait until it ends, or name another --out"
        )
    locked[key_of(path)] = descriptor


def _opened(path):
    """A descriptor to lock: NFS wants it open for writing, others let who may only read."""
    try:
        return opened(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return opened(path, os.O_RDONLY)


def _is_taken(descriptor):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_folder(folder, kind, wait=0.0):
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
    lock(folder / LIST, wait)
    if other is None:
        note(folder, "=" + kind)
    for name in sorted(written(folder)):  # what a kill left
        if os.path.lexists(folder / name):
            clear_left_over(folder / name)
        else:
            forget(folder / name)


def unlock(path):
    """Let others have a file or a folder. Does nothing where it is not held."""
    for key in (key_of(Path(path)), key_of(Path(path) / LIST)):
        if key in locked:
            os.close(locked.pop(key))


@contextlib.contextmanager
def taking_turns(folder):
    """For a short time: another process that is at it is waited for."""
    path = Path(folder) / LIST
    claim(path)
    descriptor = _opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        locked[key_of(path)] = descriptor
        yield
    finally:
        locked.pop(key_of(path), None)
        os.close(descriptor)


def _let_go():
    """In a forked process: the lock is its parent's."""
    for descriptor in locked.values():
        os.close(descriptor)
    locked.clear()


os.register_at_fork(after_in_child=_let_go)
