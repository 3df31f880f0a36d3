"""The worlds that the sandbox is attacked in, and the table of what each of them holds.

    python tests/evaluation/worlds.py      # all attacks in all worlds, as docs/sandbox.md has them

A world is a user and what the system lacks. What this machine has and a world has not is taken away
from its processes by a filter, so that they find the same errors as on a system without it.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = [*(ROOT / "evaluation").glob("*.py"), *(ROOT / "common").glob("*.py")]
HERE = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(HERE)]

from attacks import attacks  # noqa: E402

NO_NAMESPACES = [("unshare", None, "EPERM")]
NO_LANDLOCK = [("landlock_create_ruleset", None, "ENOSYS")]
ANSWER = "    version = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)\n"
FIRST_LANDLOCK = ANSWER + "    version = min(version, 1)\n"


class World(NamedTuple):
    is_root: bool
    deny: list  # [(system call, its first argument or None, the error)]
    landlock: int = 99  # at most this version
    plain: bool = False  # no sandbox at all


WORLDS = {
    "root": World(True, []),
    "root, no namespaces": World(True, NO_NAMESPACES),
    "user": World(False, []),
    "user, no namespaces": World(False, NO_NAMESPACES),
    "user, no namespaces, first Landlock": World(False, NO_NAMESPACES, landlock=1),
    "user, no namespaces, no Landlock": World(False, NO_NAMESPACES + NO_LANDLOCK),
}
NO_SANDBOX = World(True, [], plain=True)


class CannotBeMade(Exception):
    """Why this machine has no such world."""


def as_nobody():
    """(the command that becomes nobody, a Python that nobody can run)"""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        raise CannotBeMade("becoming another user needs root and setpriv")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        # setpriv itself still starts what nobody may not, so ask once more from inside
        usable = (
            "import os, sys\n"
            "sys.exit(sys.version_info < (3, 10) or not os.access(sys.executable, os.X_OK))"
        )
        with contextlib.suppress(OSError):
            if subprocess.run([*become, python, "-c", usable], capture_output=True).returncode == 0:
                return become, python
    raise CannotBeMade("no Python >= 3.10 that nobody may run")


def command_of(world):
    """(command prefix, python) for the user of a world."""
    prefix, python = [], sys.executable
    if world.is_root and os.getuid() != 0:
        raise CannotBeMade("needs root")
    if not world.is_root and os.getuid() == 0:
        prefix, python = as_nobody()
    if world.plain:  # its own processes, queues, mounts and host name: no harm is done
        prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--kill-child"]
        if subprocess.run([*prefix, "true"], capture_output=True).returncode:
            raise CannotBeMade("needs the right to make namespaces")
    return prefix, python


def copy_kit(folder):
    """The sandbox's files where every user may read them."""
    for file in COPIED:
        copied = folder / file.relative_to(ROOT)
        copied.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def replace_line(file, line, instead):
    text = file.read_text()
    assert text.count(line) == 1, line
    file.write_text(text.replace(line, instead))


def prepare(folder, world):
    """A copy of the sandbox that may read the attacked library; and these files."""
    copy_kit(folder)
    for file in [*HERE.glob("attack*.py"), HERE / "outside.py"]:
        shutil.copyfile(file, folder / file.name)
    for name in ("home", "library", "tmp"):
        (folder / name).mkdir()
    confine = folder / "evaluation/confine.py"
    readable = f'    named = ["{folder}/library", "/usr",'
    replace_line(confine, '    named = ["/usr",', readable)
    if world.landlock == 1:
        replace_line(confine, ANSWER, FIRST_LANDLOCK)


def attacked(world, names=None):
    """({attack: what it reached}, what the sandbox states, what is left of it) in a world.

    names: of the attacks; None: all of them. Raises CannotBeMade.
    """
    prefix, python = command_of(world)
    with tempfile.TemporaryDirectory(prefix="attacked-") as name:
        folder = Path(name)
        prepare(folder, world)
        if not world.is_root and os.getuid() == 0:
            for owned in ("home", "library", "tmp"):
                shutil.chown(folder / owned, 65534, 65534)
        folder.chmod(0o755)
        options = {
            "home": f"{name}/home",
            "library": f"{name}/library",
            "deny": world.deny,
            "plain": world.plain,
            "names": names,
        }
        done = subprocess.run(
            [*prefix, python, folder / "attacked.py", json.dumps(options)],
            text=True,
            capture_output=True,
            env={"PATH": os.environ["PATH"], "TMPDIR": f"{name}/tmp"},
        )
        assert done.returncode == 0, done.stderr
        left_behind = sorted(path.name for path in (folder / "tmp").iterdir())
    answer = json.loads(done.stdout)
    stated = re.findall(r"cannot enforce: (.*)", done.stderr)
    return answer["attacks"], stated[0].split(", ") if stated else [], answer["left"] + left_behind


def escapes(found, stated):
    """{attack: what it reached} of those that got out although their kind is not stated."""
    return {
        attack: reached
        for attack, reached in found.items()
        if reached and attack.partition(": ")[0] not in stated
    }


def cell(kind, found):
    """How many attacks of a kind are held; those that are not are stated: "12" or "9, 3 stated"."""
    reached = [what for attack, what in found.items() if attack.startswith(f"{kind}: ")]
    stated = sum(map(bool, reached))
    held = len(reached) - stated
    return f"{held}, {stated} stated" if stated else str(held)


def main():
    kinds = Counter(kind for kind, *_ in attacks())
    columns = {}
    for name, world in WORLDS.items():
        try:
            found, stated, left = attacked(world)
        except CannotBeMade as reason:
            print(f"{name}: left out, {reason}", file=sys.stderr)
            continue
        print(f"{name}: {', '.join(stated) or 'everything is held'}", file=sys.stderr)
        unstated = escapes(found, stated)
        assert not unstated and not left, (unstated, left)
        columns[name] = found
    print(f"| kind of attack | attacks | {' | '.join(columns)} |")
    print("|---|" + "---:|" * (len(columns) + 1))
    for kind, n in kinds.items():
        cells = [cell(kind, found) for found in columns.values()]
        print(f"| {kind} | {n} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
