"""Runs a stage and ends it at a chosen point: no test waits, or guesses how fast the machine is.

    python tests/killed.py POINT STAGE.py ARGS...
    python tests/killed.py --send SIGINT --set data:FORMAT=2 --rank 1 POINT STAGE.py ARGS...

POINT is KIND:WHAT:N and names the moment, counted from 1:

    before:train_state.pt:3          just before the third rename onto a file of that name
    after:train_state.pt:3           just after it
    inside:model*.safetensors:1      with half of the new file's bytes on disk, not renamed yet
    moment::17                       at the 17th moment that common.changes passes, whatever it is
    half::17                         there, too, with half of what is being done: see `halve`
    moment:__1_0.distcp:2            at the second one that is about a file of that name
    call:text.writing:TokenSetWriter.mark:2
                                     as the second call of a function (MODULE:FUNCTION) begins
    never                            not at all (for KIT_SLOW)

A file is named by a pattern for the last parts of its path: `ref/model.safetensors`, `*.json`.
common/files.py writes every file under another name first. "inside" cuts that file in half, where
the rename would come: the same bytes are on disk as after a kill in the middle of the write.
A function of the stage itself goes by the stage's name: `call:score:claim:1`.

Only the process that was started is ended; processes that it starts are left alone. Under torchrun
each rank counts for itself: only the first one writes files (but for the parts of a training
state), all of them call `Run.save_state`. `--rank 1`: the moment counts on that rank alone.

`--set MODULE:NAME=VALUE` changes a constant (VALUE is a Python literal) before the stage runs.
`KIT_SLOW=0.05` in the environment sleeps that many seconds before and after each rename.
`KIT_MOMENTS=FILE` writes a line there for each moment: `before rename out/args.json`.

In a test:

    killed("inside:train_state.pt:3", "train_ref.py --data d --init m --out a", tmp_path)
    killed("before:meta.json:1", ["prepare.py", ...], tmp_path, sent="SIGINT",
           settings=["prepare:MARK_SECONDS=0"])
    killed("call:training.run:Run.save_state:2", "train_ref.py ...", tmp_path, ranks=2)
"""

import argparse
import ast
import functools
import importlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def killed(point, arguments, cwd, sent="SIGKILL", settings=(), ranks=0, rank=None, **options):
    """Run a stage as a process of its own and assert that it ended at `point`. Returns its output.

    `arguments`: the stage and its arguments, one string or a list. `sent`: the signal's name.
    `ranks`: under torchrun; `rank`: the only one that gets the signal.
    """
    from conftest import HANGS, launch

    words = arguments.split() if isinstance(arguments, str) else arguments
    changes = [word for setting in settings for word in ("--set", setting)]
    if rank is not None:
        changes += ["--rank", str(rank)]
    driver = ["tests/killed.py", "--send", sent, *changes, point, *words]
    process = launch(driver, cwd, ranks, **options)
    out, _ = process.communicate(timeout=HANGS)
    assert f"{sent} at {point}" in out, f"the stage ended before {point}:\n{out}"
    if ranks:
        assert process.returncode != 0, out
    else:
        wanted = -signal.SIGKILL if sent == "SIGKILL" else 130
        assert process.returncode == wanted, (process.returncode, out)
    return out


class Point:
    """The moment at which this process ends itself: it counts, and ends it at the n-th time."""

    def __init__(self, text, sent):
        self.text, self.sent = text, sent
        self.kind, _, rest = text.partition(":")
        self.what, _, n = rest.rpartition(":")
        self.left = int(n or 0)
        self.process = os.getpid()

    def reached(self, kind, path=None):
        """Is it now? `path`: the file, where `kind` is about one."""
        if kind != self.kind or os.getpid() != self.process:
            return False
        if path is not None and not Path(path).match(self.what):
            return False
        self.left -= 1
        return self.left == 0

    def end(self):
        """Say so and send the signal. SIGINT and SIGTERM raise KeyboardInterrupt here."""
        os.write(2, f"killed.py: {self.sent} at {self.text}\n".encode())
        signal.raise_signal(getattr(signal, self.sent))


def wait_for_no_disk():
    """A kill loses nothing that was written, only a loss of power does: fsync is for that alone."""
    os.fsync = lambda descriptor: None


def arm_changes(point=None, seconds=0.0, record=None):
    """Watch common.changes: `point` is reached there; sleep before and after each rename.

    `record`: a file that gets a line for each moment that this process passes.
    """
    from common import changes, owned

    this = os.getpid()
    sizes = {}  # of files that are about to be appended to

    def reached(moment, path):
        when, kind = moment.split()
        if moment == "before append":
            sizes[path] = os.path.getsize(path) if os.path.exists(path) else 0
        if kind == "rename" and seconds:
            time.sleep(seconds)
        if record and os.getpid() == this:
            with open(record, "a") as file:
                file.write(f"{moment} {path}\n")
        if not point:
            return
        if moment == "before rename" and point.reached("inside", path):
            temporary = owned.temporary_of(Path(path))
            os.truncate(temporary, os.path.getsize(temporary) // 2)
            point.end()
        if kind == "rename" and point.reached(when, path):
            point.end()
        if point.reached("half"):
            halve(Path(path), sizes.get(path, 0))
            point.end()
        if point.reached("moment", path if point.what else None):
            point.end()

    changes.reached = reached


def halve(path, before=0):
    """As a kill in the middle leaves it: half of the bytes written, half of a folder removed.

    `before`: bytes of the file that were there already.
    """
    if path.is_dir():
        inside = sorted(inner for inner in path.rglob("*") if inner.is_file())
        for inner in inside[: len(inside) // 2]:
            inner.unlink()
    else:
        os.truncate(path, before + (os.path.getsize(path) - before) // 2)


def arm_call(point, function):
    """The function, so that `point` is reached where its n-th call begins."""

    @functools.wraps(function)
    def patched(*args, **more):
        if point.reached("call"):
            point.end()
        return function(*args, **more)

    return patched


def change(module, name, make):
    """Replace what `name` ("function" or "Class.method") is in the module by make(of it)."""
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    setattr(owner, last, make(getattr(owner, last)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--send", default="SIGKILL", choices=["SIGKILL", "SIGINT", "SIGTERM", "SIGSTOP"]
    )
    parser.add_argument("--set", action="append", default=[], metavar="MODULE:NAME=VALUE")
    parser.add_argument("--rank", help="the only rank that is ended")
    parser.add_argument("point")
    parser.add_argument("stage")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    sys.path[0] = str(ROOT)
    stage = ROOT / args.stage
    here = args.rank in (None, os.environ.get("RANK"))
    point = Point(args.point if here else "never", args.send)
    seconds = float(os.environ.get("KIT_SLOW", 0))
    arm_changes(point, seconds, os.environ.get("KIT_MOMENTS"))
    wait_for_no_disk()

    changes = []  # (module's name, name in it, what to make of it)
    for setting in args.set:
        name, _, value = setting.partition("=")
        value = ast.literal_eval(value)
        changes.append((*name.split(":"), lambda _, value=value: value))
    if point.kind == "call":
        changes.append((*point.what.split(":"), functools.partial(arm_call, point)))

    for module, name, make in changes:
        if module != stage.stem:
            change(importlib.import_module(module), name, make)

    # The stage's own functions are there when it calls `cli(main)`, as its last line does.
    from common import errors

    run = errors.cli

    def cli(stage_main):
        for module, name, make in changes:
            if module == stage.stem:
                change(sys.modules["__main__"], name, make)
        run(stage_main)

    errors.cli = cli
    sys.argv = [str(stage), *args.arguments]
    runpy.run_path(str(stage), run_name="__main__")


if __name__ == "__main__":
    main()
