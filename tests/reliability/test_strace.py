"""The kernel's own record: no stage changes a file of the folders that it works in but through
the kit's own writing (common/changes.py).

Each command runs under `strace -f`. Every path below the working folder that is opened for writing,
made, renamed, cut, removed or given another mode must be one that passed `common.changes.reached`.
What is outside of it must be one of the places in EXCEPTIONS.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common import files, owned
from conftest import HANGS, ROOT
from stages import (  # noqa: F401 (fixtures)
    EVAL,
    FILES,
    HUB,
    MACHINE,
    SCORE,
    SLM,
    fresh,
    hub_fixture,
    inputs_fixture,
    warm_fixture,
)

pytestmark = pytest.mark.slow
needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="needs strace (Debian: apt-get install strace)"
)
CALLS = (
    "open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,"
    "truncate,ftruncate,chmod,fchmod,fchmodat,link,linkat,symlink,symlinkat,mknod,mknodat,chdir,"
    "fchdir,utimensat"
)
EXCEPTIONS = {  # outside of the working folder
    "/dev/": "devices: null, tty, shared memory of torch",
    "/proc/": "a process's own settings: the peak of its memory, its user namespace",
    "memfd:": "memory",
    "/box": "the sandbox's own file system, seen from inside",
}  # and the system's temporary folder: torch's and triton's caches, matplotlib, the sandbox
SHARD = "/.hub-shard/"  # a folder that was claimed; the hub's library fills it
FIGURES = "curves --run a=run --run b=slm --baseline a --out figure"
COMMANDS = {
    "prepare": [("prepare.py", f"{FILES} --train-vocab 280 --out new")],
    "prepare, the hub": [("prepare.py", f"{HUB} --out new")],
    "prepare --overwrite": [
        ("prepare.py", f"{FILES} --tokenizer d --out new"),
        ("prepare.py", f"{FILES} --tokenizer d --max-tokens 300 --out new --overwrite"),
    ],
    "train_slm": [("train_slm.py", f"{SLM} --out new")],
    "train_slm --overwrite": [
        ("train_slm.py", f"{SLM} --out new"),
        ("train_slm.py", f"{SLM} --lr 0.01 --out new --overwrite"),
    ],
    "score": [("score.py", f"--model m {SCORE} --out new.bin")],
    "score --overwrite": [
        ("score.py", f"--model m {SCORE} --out new.bin"),
        ("score.py", f"--model run {SCORE} --out new.bin --overwrite"),
    ],
    "eval_math": [("eval_math.py", f"{EVAL} --tasks p.jsonl q.jsonl")],
    "eval_math --overwrite": [
        ("eval_math.py", f"{EVAL} --tasks p.jsonl --out new"),
        ("eval_math.py", f"{EVAL} --tasks p.jsonl --out new --overwrite"),
        ("eval_math.py", "--regrade new/p.jsonl --tasks p.jsonl --out again"),
    ],
    "tools.decontaminate": [
        (
            "tools/decontaminate.py",
            "--source a.jsonl --tasks gsm8k --data-dir tests --out new.jsonl --report new.json",
        )
    ],
    "tools.bench": [
        ("tools/bench/__main__.py", f"tokenizer --json new.json {MACHINE}"),
    ],
    "tools.explore": [
        ("score.py", f"--model run {SCORE} --out losses.bin"),
        ("train_slm.py", f"{SLM} --ref-loss losses.bin --out slm"),
        ("tools/explore/__main__.py", FIGURES),
        (
            "tools/explore/__main__.py",
            "tokens --run slm --data d --ref-loss losses.bin --out page.html",
        ),
    ],
}


@needs_strace
@pytest.mark.parametrize("name", COMMANDS)
def test_every_change_of_the_disk_passed_common_changes(name, hub, inputs, tmp_path):
    work = tmp_path / "work"
    fresh(inputs, work)
    for number, (script, command) in enumerate(COMMANDS[name]):
        trace, moments = tmp_path / f"trace{number}", tmp_path / f"moments{number}"
        driver = [sys.executable, ROOT / "tests/killed.py", "never", script, *command.split()]
        tracer = ["strace", "-f", "-qq", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", trace]
        done = subprocess.run(
            [str(word) for word in [*tracer, *driver]],
            cwd=work,
            env={
                **os.environ,
                "KIT_MOMENTS": str(moments),
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HF_ENDPOINT": hub,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANGS,
        )
        assert done.returncode == 0, done.stdout
        passed = {work / line.split(" ", 2)[2] for line in moments.read_text().splitlines()}
        changed = changes(trace.read_text(errors="replace"), work)
        assert {path for path in changed if work in path.parents}, "strace saw nothing"
        strange = [
            f"{call} {path}" for path, call in changed.items() if not known(path, work, passed)
        ]
        assert not strange, f"{command}: {len(strange)} changes\n" + "\n".join(strange)


def changes(trace, work):
    """{path: system call} of what a trace says was changed; calls that failed are left out."""
    found = {}
    folders = {}  # of each process
    for line in trace.splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)\) += +(-?\d+)", line)
        if not match or match[4].startswith("-"):
            continue
        process, call, arguments, result = match.groups()
        folder = folders.get(process, work)
        if call == "chdir":
            folders[process] = folder / quoted(arguments)[0]
            continue
        if call.startswith(("open", "creat")) and not re.search(
            r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments
        ):
            continue
        for path in paths_of(arguments, folder):
            if not is_for_a_lock(call, arguments, path):
                found.setdefault(path, call)
    return found


def is_for_a_lock(call, arguments, path):
    """A list of files that is there already, opened as NFS wants it (common/locks.py)."""
    changes_it = re.search("O_WRONLY|O_CREAT|O_TRUNC", arguments)
    return call.startswith("open") and Path(path).name == owned.LIST and not changes_it


def quoted(arguments):
    return re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)


def paths_of(arguments, folder):
    """The paths in a call's arguments: strings, below the folder that a descriptor stands for."""
    names = quoted(arguments)
    if not names:  # ftruncate(5</path>, 10)
        return [Path(name) for name in re.findall(r"\d+<([^>]*)>", arguments)[:1]]
    bases = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments) or [str(folder)] * len(names)
    bases += bases[-1:] * len(names)
    return [Path(os.path.normpath(Path(base) / name)) for base, name in zip(bases, names)]


def known(path, work, passed):
    """Did the change pass common/changes.py, or is it at a place that needs not?"""
    if work not in path.parents and path != work:
        temporary = f"{tempfile.gettempdir()}/"
        return str(path).startswith((*EXCEPTIONS, f"{work.parent}/", temporary))
    if path in passed or owned.temporary_of(path) in passed:
        return True
    if any(files.ROOM in folder.name for folder in path.parents):  # a library's, in our folder
        return True
    if SHARD in f"{path}/":
        return True
    removed_with = [folder for folder in passed if folder in path.parents and not folder.exists()]
    return path.name == owned.LIST and bool(removed_with)  # the list of a folder that was removed
