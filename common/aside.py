"""--overwrite: what was there stays aside until the new work has a first saved state.

    set_aside(folder)     # our files move into folder/.before; nobody else's are touched
    ...                   # the new work begins; until it has saved something:
    put_back(folder)      # would undo a `set_aside` that a kill ended
    discard(folder)       # the new work is safe: what was there before goes

A kill at any point is mended by the next call, whichever it is. Where the work is not the whole
folder, `names` are its files, and `place` is a name for where they go.
"""

from pathlib import Path

from common import files, owned

PLACE = ".before"
WHOLE = ".whole"  # in PLACE: everything has been moved


def set_aside(folder, keep=(), names=None, place=PLACE):
    """Move what the kit wrote in `folder`, at all depths, into `place`; not the names in `keep`.

    Where `place` holds something already, the work that came after it saved nothing: that goes.
    """
    folder = Path(folder)
    keep = {place, *keep}
    place = folder / place
    ours = [name for name in _names(folder, keep) if names is None or name in names]
    owned.refuse_foreign([place])
    if (place / WHOLE).exists():
        for name in ours:
            _remove(folder / name)
        return
    owned.own_folder(place)
    for name in ours:
        _move(folder / name, place / name)
    files.write_atomic(place / WHOLE, "")


def put_back(folder, place=PLACE):
    """Undo a `set_aside` that did not come to its end."""
    folder = Path(folder)
    place = folder / place
    if not owned.is_ours(place) or (place / WHOLE).exists():
        return
    for name in _names(place):
        _move(place / name, folder / name)
    _remove(place)


def discard(folder, place=PLACE):
    """Delete what was set aside."""
    place = Path(folder) / place
    if not owned.is_ours(place) or not (place / WHOLE).exists():
        return
    for name in _names(place):
        if name != WHOLE:
            _remove(place / name)
    _remove(place)


def _names(folder, keep=()):
    """What the kit wrote in a folder, and is there."""
    names = sorted(owned.written(folder) - {owned.LIST, *keep})
    return [name for name in names if (folder / name).exists()]


def _move(source, target):
    if not source.is_dir():
        files.rename(source, target)
        return
    owned.own_folder(target)
    for name in _names(source):
        _move(source / name, target / name)
    files.remove_folder(source)


def _remove(path):
    if path.is_dir():
        files.remove_folder(path)
    else:  # a file, or a folder that a kill left nothing of but its name in the list
        files.remove(path)
