"""Whose a file is: the kit never touches anybody else's.

Every folder that is written into gets a list, LIST: `+name` before a file is first made, `-name`
after it was deleted, `=kind` for what the whole folder is. A file that the list does not name is
somebody else's. It is never replaced, never deleted, whatever it is called. The list is only ever
appended to, so a kill cannot harm it. A folder with a kind, a run or a token set, is written to by
whoever holds its lock, and by nobody else: no other output lands on a model by a slip of the hand.
"""

import os
from pathlib import Path

from common.changes import change, make_folder
from common.errors import UserError
from common.json_files import shown

LIST = ".slm-kit"
FIRST_LINE = "files that slm-kit wrote here, 1"
TEMPORARY = ".slm-kit-tmp"  # behind the name of a file that is not whole yet; nobody else's

locked = {}  # path of a file that this process has locked -> its descriptor (common/locks.py)


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
            f"{folder}/{LIST}: got {shown(lines[0])}, wanted {FIRST_LINE!r}; another program's "
            f"file or another version's: name another folder to write to"
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


def note(folder, line):
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
    note(path.parent, "+" + path.name)


def own_folder(folder):
    """Make a folder of ours, which `remove_folder` will take away. One that is there stays theirs.

    Folders on the way to a file need no such note: `make_folder` makes them, nobody removes them.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        claim(folder)
    make_folder(folder)


def key_of(path):
    """One name for a file, however its folder is spelled."""
    return Path(os.path.realpath(path.parent)) / path.name


# --------------------------------------------------------------------------------------------------
# what is refused


def refuse_taken(paths):
    """Raises UserError where one of these cannot be an output.

    It is somebody else's, or lies in a run's folder or the like, which is not held by us.
    """
    for path in map(Path, paths):
        kind = kind_of(path.parent)
        if kind and key_of(path.parent / LIST) not in locked:
            raise UserError(
                f"{path}: lies in a {kind}'s folder, where nothing else is written; "
                f"name another place"
            )
        refuse_foreign([path])


def refuse_foreign(paths):
    """Raises UserError where one of these is there and the kit did not write it."""
    for path in paths:
        if os.path.lexists(path) and not is_ours(path):
            raise UserError(
                f"{path}: exists, and this kit did not write it; it is left as it is: move it "
                f"away, or name another place to write to"
            )


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
