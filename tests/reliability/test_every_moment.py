"""Every stage, killed at every moment in turn: the same command gives what it would have given.

A moment is before and after each change of the disk (a write, a rename, a cut, an append, a
removal, a new folder), and in its middle, where half of it is done. After each kill files of
somebody else's are put in and beside what is there, and the command is given again. Then all that
lies there must be what an undisturbed run leaves, and nobody else's file may have changed.

    python -m pytest tests/reliability -m slow -k every_moment -s     # prints the table
"""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import owned
from contents import contents, differences, untouched
from stages import (  # noqa: F401 (fixtures)
    EVAL,
    FILES,
    HUB,
    RUN,
    SCORE,
    SETTINGS,
    SLM,
    fresh,
    hub_fixture,
    inputs_fixture,
    warm_fixture,
)

pytestmark = pytest.mark.slow
SAMPLE = 3  # moments of a case, where not all are tried
DERIVED = (owned.LIST, "results.json", "results.md")  # change with each task


@dataclass
class Case:
    """A command that is killed. `before`: what was run, or killed, before it."""

    stage: str
    command: str
    out: str
    before: tuple = ()  # (stage, command, point or None)


CASES = {
    "prepare": Case("prepare", f"{FILES} --train-vocab 280 --out new", "new"),
    "prepare, the hub": Case("prepare", f"{HUB} --out new", "new"),
    "prepare --overwrite": Case(
        "prepare",
        f"{FILES} --tokenizer d --out new --overwrite",
        "new",
        [("prepare", f"{FILES} --train-vocab 280 --out new", None)],
    ),
    "prepare --overwrite, unfinished": Case(
        "prepare",
        f"{FILES} --tokenizer d --out new --overwrite",
        "new",
        [("prepare", f"{FILES} --train-vocab 280 --out new", "before:new/meta.json:1")],
    ),
    "prepare --overwrite, the hub": Case(
        "prepare",
        f"{HUB} --out new --overwrite",
        "new",
        [("prepare", f"{HUB} --max-tokens 500 --out new", None)],
    ),
    "train_ref": Case("train_ref", f"--data d {RUN} --out new", "new"),
    "train_slm": Case("train_slm", f"{SLM} --out new", "new"),
    "train_slm --overwrite": Case(
        "train_slm",
        f"{SLM} --out new --overwrite",
        "new",
        [
            ("train_slm", f"{SLM} --lr 0.01 --snapshots 3 --out new", None),
            ("eval_math", f"{EVAL} --model new --tasks p.jsonl", None),
        ],
    ),
    "score": Case("score", f"--model m {SCORE} --out new.bin", "new.bin"),
    "score --overwrite": Case(
        "score",
        f"--model run {SCORE} --out new.bin --overwrite",
        "new.bin",
        [("score", f"--model m {SCORE} --out new.bin", None)],
    ),
    "eval_math": Case("eval_math", f"{EVAL} --tasks p.jsonl q.jsonl --out new", "new"),
    "eval_math, in the run": Case("eval_math", f"{EVAL} --tasks p.jsonl q.jsonl", "run/eval"),
    "eval_math --overwrite": Case(
        "eval_math",
        f"{EVAL} --tasks p.jsonl q.jsonl --out new --overwrite",
        "new",
        [("eval_math", f"{EVAL} --max-new-tokens 3 --tasks p.jsonl q.jsonl --out new", None)],
    ),
    "tools.decontaminate": Case(
        "tools.decontaminate",
        "--source a.jsonl b.jsonl --tasks gsm8k --data-dir tests --out new.jsonl --report new.json",
        "new.jsonl",
    ),
}


# --------------------------------------------------------------------------------------------------
# other people's files


def plant(root, out):
    """Put somebody else's files in and beside `out`. Returns their paths."""
    target = root / out
    beside = [f"{target.name}.txt", f"{target.stem}2.bin", f"my {target.name}.tmp", "notes.txt"]
    places = [target.parent / name for name in beside]
    for name in ("args.json", "tokens.bin", "ref_loss.bin", "results.json"):
        places.append(target.parent / f"{target.name}-old" / name)  # a folder beside it
    for folder in [target, *target.glob("[!.]*/")]:
        if owned.written(folder):
            places += [folder / "notes.txt", folder / "notes" / "README.md", folder / "mine.tmp"]
    planted = []
    for place in places:
        if not os.path.lexists(place):
            place.parent.mkdir(exist_ok=True)
            place.write_text(f"years of work, {place.name}")
            planted.append(place)
    return planted


# --------------------------------------------------------------------------------------------------
# the kills


class Killing:
    """One case: where it starts, where it ends, and the moments in between."""

    def __init__(self, case, warm, inputs, folder):
        self.case = case
        self.warm = warm
        self.work = folder / "work"
        self.start = folder / "start"
        fresh(inputs, self.work)
        for stage, command, point in case.before:
            code, printed = self.run(stage, command, point=point)
            assert code == (-9 if point else 0), printed
        fresh(self.work, self.start)
        self.old = contents(self.start)
        moments = folder / "moments"
        code, printed = self.run(case.stage, case.command, moments=str(moments))
        assert code == 0, printed
        self.wanted = contents(self.work)
        self.moments = moments.read_text().splitlines()

    def run(self, stage, command, **more):
        return self.warm.run(stage, command.split(), self.work, settings=SETTINGS, **more)

    def points(self):
        """[(point, the moment in words)]: all of them."""
        found = []
        for n, moment in enumerate(self.moments, 1):
            found.append((f"moment::{n}", moment))
            kind, path = moment.split(" ", 2)[1:]
            folder_goes = moment.startswith("before remove") and not Path(path).suffix
            if moment.startswith(("after write", "after append")) or folder_goes:
                found.append((f"half::{n}", f"in the middle: {moment}"))
        return found

    def check(self, point, moment, again=""):
        """Kill it there, give the command again. Returns what is wrong."""
        fresh(self.start, self.work)
        code, printed = self.run(self.case.stage, self.case.command, point=point)
        assert code == -9, f"{point}, {moment}: ended with {code}\n{printed}"
        planted = plant(self.work, self.case.out)
        before = untouched(planted)
        command = self.case.command.replace(" --overwrite", "") + again
        code, printed = self.run(self.case.stage, command)
        names = {str(path.relative_to(self.work)) for path in planted}
        got = functools.partial(contents, self.work, names)
        refused = "--overwrite" in self.case.command and not again and code == 2
        if refused:  # it was killed before all of the new work began: none of the old is lost
            wrong = lost(got(), self.old, self.wanted)
            right = printed.splitlines()[-1].startswith("error: ") and "--overwrite" in printed
        else:
            wrong = differences(got(), self.wanted)
            right = code == 0
        if not right or "Traceback" in printed:
            wrong.append(f"exit code {code}: {printed[-1000:]}")
        if untouched(path for path in planted if os.path.lexists(path)) != before:
            wrong.append("somebody else's file was touched")
        if refused and not wrong:
            code, printed = self.run(self.case.stage, command + " --overwrite")
            wrong = differences(got(), self.wanted)
            if code:
                wrong.append(f"with --overwrite again: {printed[-1000:]}")
        return [f"{point}, {moment}{again}: {line}" for line in wrong]


def lost(got, old, new):
    """What was there of the old work, and is neither there any more nor replaced by the new."""
    values = list(got.values())
    return [
        f"lost: {name}"
        for name, value in old.items()
        if Path(name).name not in DERIVED and value not in values and got.get(name) != new.get(name)
    ]


def telling(points):
    """A fixed sample: around renames, removals and what is set aside first."""

    def weight(numbered):
        _, (_, moment) = numbered
        kinds = ("rename" in moment, "remove" in moment, "before" in moment.split()[-1])
        return -sum(kinds)

    ranked = sorted(enumerate(points), key=weight)
    best = ranked[: max(SAMPLE, len(ranked) // 3)]
    best.sort()
    step = len(best) / SAMPLE
    return [best[int(i * step)][1] for i in range(SAMPLE)]


@pytest.mark.parametrize("name", CASES)
def test_killed_at_some_moments(name, warm, inputs, tmp_path):
    killing = Killing(CASES[name], warm, inputs, tmp_path)
    wrong = []
    for point, moment in telling(killing.points()):
        wrong += killing.check(point, moment)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_moment(name, warm, inputs, tmp_path):
    case = CASES[name]
    killing = Killing(case, warm, inputs, tmp_path)
    wrong = []
    started = time.time()
    kills = 0
    for again in ["", " --overwrite"] if "--overwrite" in case.command else [""]:
        for point, moment in killing.points():
            wrong += killing.check(point, moment, again)
            kills += 1
    seconds = time.time() - started
    print(f"\n| {name} | {len(killing.moments)} | {kills} | {seconds:.0f} |")
    assert not wrong, f"{len(wrong)} of {kills}:\n" + "\n".join(wrong)
