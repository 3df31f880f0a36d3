"""What lies in a folder, in a form that two runs of one command can be compared in."""

import hashlib
import json
import os
from pathlib import Path

import torch

from common import owned

TIMES = ("seconds", "tok_per_s", "peak_memory_bytes", "mfu")  # differ from run to run


def contents(root, without=()):
    """{path: what it holds} of all files under `root`, times left out; not of those in `without`.

    A list of the kit's counts as the names of the files in it.
    """
    root = Path(root)
    paths = {str(path.relative_to(root)): path for path in sorted(root.rglob("*"))}
    kept = {name: path for name, path in paths.items() if name not in without and path.is_file()}
    return {
        name: content_of(path, theirs_alone(path, kept.values())) for name, path in kept.items()
    }


def theirs_alone(path, ours):
    """The names of folders beside a list in which only other people's files are left."""
    if path.name != owned.LIST:
        return set()
    folders = {inner.name for inner in path.parent.glob("*/")}
    return {name for name in folders if not any(path.parent / name in o.parents for o in ours)}


def content_of(path, not_counted=()):
    if path.name == owned.LIST:
        names = owned.written(path.parent) - {owned.LIST, *not_counted}
        return sorted(names), owned.kind_of(path.parent)
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        return repr(plain(state))
    if path.suffix in (".json", ".jsonl"):
        try:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            return [without_times(json.loads(line)) for line in lines]
        except ValueError:
            pass
    return path.read_bytes()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return value


def plain(value):
    """A training state as text: a tensor is its type, shape and the hash of its bytes."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in sorted(value.items(), key=str) if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    return repr(value)


def differences(got, wanted):
    """What differs between two `contents`, a line each."""
    lines = [f"missing: {name}" for name in wanted.keys() - got.keys()]
    lines += [f"left over: {name}" for name in got.keys() - wanted.keys()]
    for name in sorted(got.keys() & wanted.keys()):
        if got[name] != wanted[name]:
            lines.append(
                f"differs: {name}: {str(got[name])[:300]} instead of {str(wanted[name])[:300]}"
            )
    return lines


def untouched(paths):
    """{path: (bytes, mode, time of the last change)}: to be the same later."""
    found = {}
    for path in paths:
        status = os.lstat(path)
        content = os.readlink(path) if path.is_symlink() else path.read_bytes()
        found[path] = content, status.st_mode, status.st_mtime_ns
    return found
