"""Outputs on, in and around inputs and other people's files: nothing of theirs is touched.

Each arrangement is a few files of somebody else's and a command. Bytes, mode and time of change of
every file that was there are the same afterwards; only what the command's own earlier output was
may differ. Most are refused, with one line and exit code 2.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from common import owned
from conftest import HANGS, ROOT
from contents import untouched
from stages import (  # noqa: F401 (fixtures)
    EVAL,
    FILES,
    MACHINE,
    SETTINGS,
    fresh,
    hub_fixture,
    inputs_fixture,
    warm_fixture,
)

TRAIN = f"--data d --val v --init m --seq-len 16 --batch-size 4 --steps 2 {MACHINE}"
SLM = f"{TRAIN} --ref-loss ref_loss.bin"
SCORE = f"--model m --data d --seq-len 16 --batch-size 4 {MACHINE}"
CLEAN = "--source a.jsonl --tasks gsm8k --data-dir tests"
FOREIGN = "did not write it"
OVERLAP = "overlaps with"
KIND = "wanted a .*folder|lies in a .*'s folder"


@dataclass
class At:
    """One arrangement. `plant`: {path: text, "dir" or "-> target"}; `refused`: a part of the line.

    `refused` None: the command is right. Where it has --overwrite, that is tried, too.
    """

    stage: str
    command: str
    plant: dict = field(default_factory=dict)
    refused: str | None = FOREIGN


def train(out, plant=(), refused=FOREIGN, more=""):
    return At("train_ref", f"{TRAIN} {more} --out {out}", dict(plant), refused)


def score(out, plant=(), refused=FOREIGN, more=""):
    return At("score", f"{SCORE} {more} --out {out}", dict(plant), refused)


def prepare(out, plant=(), refused=FOREIGN, more=f"{FILES} --tokenizer d"):
    return At("prepare", f"{more} --out {out}", dict(plant), refused)


def evaluate(out, plant=(), refused=FOREIGN, more="--tasks p.jsonl"):
    return At("eval_math", f"{EVAL} {more} --out {out}", dict(plant), refused)


def clean(words, plant=(), refused=FOREIGN):
    return At("tools.decontaminate", f"{CLEAN} {words}", dict(plant), refused)


ARRANGEMENTS = {
    # training
    "another program's args.json": train("o", {"o/args.json": '{"lr": 1}'}),
    "another program's args.json and model": train(
        "o", {"o/args.json": "{}", "o/model.safetensors": "years"}
    ),
    "a folder with notes": train("o", {"o/notes.txt": "x"}, "is not a run of this kit"),
    "a folder with a leftover args.json.tmp": train(
        "o", {"o/args.json.tmp": "x"}, "is not a run of this kit"
    ),
    "an empty folder": train("o", {"o": "dir"}, None),
    "a file": train("o", {"o": "years of work"}, "is a file, wanted a folder"),
    "below a file": train("o/run", {"o": "years of work"}, "is a file, wanted a folder"),
    "a link to an empty folder": train("o", {"real": "dir", "o": "-> real"}, None),
    "a link to a folder with notes": train(
        "o", {"real/notes.txt": "x", "o": "-> real"}, "is not a run of this kit"
    ),
    "a link to a file": train("o", {"real": "x", "o": "-> real"}, "is a file"),
    "a link to nothing": train("o", {"o": "-> nowhere"}, "is a file"),
    "a link to the init": train("o", {"o": "-> m"}, OVERLAP),
    "on the init": train("m", (), OVERLAP),
    "in the init": train("m/new", (), OVERLAP),
    "around the init": train("deep", {"deep/readme": "x"}, OVERLAP, "--init deep/m"),
    "around everything": train(".", (), OVERLAP),
    "on the data": train("d", (), OVERLAP),
    "in the data": train("d/new", (), OVERLAP),
    "on the validation set": train("v", (), OVERLAP),
    "on the stored losses": At("train_slm", f"{SLM} --out ref_loss.bin", {}, OVERLAP),
    "on another token set": train("other/v", (), KIND),
    "on an evaluation": train("run/eval", (), KIND),
    "on a model of somebody else's": train(
        "o", {"o/config.json": "{}", "o/model.safetensors": "x"}, "is not a run of this kit"
    ),
    "on the folder of stored losses": train("scores", (), KIND),
    "where nobody may write": train("/proc/kit", (), "error:"),
    "an older kit's folder": train("o", {"o/args.json": "{}", "o/log.jsonl": ""}),
    "another program's list": train("o", {"o/.slm-kit": "a plan\n"}, "another program's file"),
    # scoring
    "losses on a table": score("results.bin", {"results.bin": "a,b\n"}),
    "losses on a text": score("notes.bin", {"notes.bin": "years of work"}),
    "losses beside another program's note": score("r.bin", {"r.json": "{}"}),
    "entropies on another program's file": score(
        "ref_loss_2.bin", {"ref_entropy_2.bin": "x"}, more="--entropy"
    ),
    "losses on the model": score("m/model.safetensors", (), OVERLAP),
    "losses in the model's folder": score("m/r.bin", (), OVERLAP),
    "losses on the tokens": score("d/tokens.bin", (), OVERLAP),
    "losses on another set's tokens": score("other/v/tokens.bin", (), KIND),
    "losses in another set's folder": score("other/v/r.bin", (), KIND),
    "losses on a run's model": score("run/model.safetensors", (), KIND),
    "losses on a run's log": score("run/log.jsonl", (), KIND),
    "losses on a folder": score("o", {"o": "dir"}, "is a folder"),
    "losses on a folder of the kit's": score("run", (), "is a folder"),
    "losses named as their note": score("o.json", (), "wanted a file that ends in .bin"),
    "losses on a link": score("o.bin", {"real": "x", "o.bin": "-> real"}),
    "losses on a page of the kit's": score("cleaned.jsonl", (), "no note of losses"),
    "losses below a file": score("o/r.bin", {"o": "x"}, "is a file"),
    "losses beside a folder for the old ones": score(
        "r.bin", {".before-r.bin/x": "x"}, more="--overwrite"
    ),
    "losses among other files": score("o/r.bin", {"o/a.csv": "x", "o/r.bin.txt": "x"}, None),
    # token sets
    "a set on a model": prepare("m", (), KIND),
    "a set on a run": prepare("run", (), KIND),
    "a set on its source": prepare("a.jsonl", (), OVERLAP),
    "a set around its source": prepare(".", (), OVERLAP),
    "a set on its tokenizer": prepare("d", (), OVERLAP),
    "a set in its tokenizer": prepare("d/new", (), OVERLAP),
    "a set on somebody's progress.json": prepare("o", {"o/progress.json": "{}"}),
    "a set on somebody's meta.json": prepare("o", {"o/meta.json": "{}"}),
    "a set on somebody's tokenizer.json": prepare("o", {"o/tokenizer.json": "{}"}),
    "a set on somebody's tokens.bin": prepare("o", {"o/tokens.bin": "x"}),
    "a set on somebody's tokens.bin.partial": prepare("o", {"o/tokens.bin.partial": "x"}),
    "a set on somebody's loss_mask.bin": prepare("o", {"o/loss_mask.bin": "x"}),
    "a set on a file": prepare("o", {"o": "x"}, "is a file"),
    "a set in a folder with notes": prepare("o", {"o/notes.txt": "x"}, None),
    "a set on an evaluation": prepare("run/eval", (), KIND),
    # evaluation
    "answers on the problems' folder": evaluate(
        "problems", (), OVERLAP, "--tasks problems/p.jsonl"
    ),
    "answers on a file": evaluate("o", {"o": "x"}, "is a file"),
    "answers on somebody's": evaluate("o", {"o/p.jsonl": "{}"}),
    "answers on somebody's unfinished ones": evaluate("o", {"o/p.partial-0.jsonl": "{}"}),
    "answers on somebody's results.json": evaluate("o", {"o/results.json": "{}"}),
    "answers on somebody's results.md": evaluate("o", {"o/results.md": "x"}),
    "answers in a run": evaluate("run", (), KIND),
    "answers in a token set": evaluate("other/v", (), KIND),
    "answers among other files": evaluate(
        "o", {"o/notes.txt": "x", "o/q.jsonl": "x"}, None, "--tasks p.jsonl --limit 2"
    ),
    "graded again over the source": At(
        "eval_math", "--regrade o/p.jsonl --tasks p.jsonl --out o", {"o/p.jsonl": "{}"}, OVERLAP
    ),
    # tools
    "clean text on its source": clean("--out a.jsonl", (), OVERLAP),
    "clean text on another text": clean("--out b.jsonl"),
    "clean text on a run's log": clean("--out run/log.jsonl", (), KIND),
    "clean text below a file": clean("--out o/x.jsonl", {"o": "x"}, "is a file"),
    "a report on somebody's": clean("--report o.json", {"o.json": "{}"}),
    "a report on the clean text": clean("--out o.json --report o.json", (), "is --out, too"),
    "a report on a run's summary": clean("--report run/summary.json", (), KIND),
    "clean text beside other text": clean("--out o.jsonl", {"o.jsonl.txt": "x"}, None),
    "measurements on somebody's": At(
        "tools.bench.__main__", f"score --json o.json {MACHINE}", {"o.json": "{}"}
    ),
    "measurements on a run's summary": At(
        "tools.bench.__main__", f"score --json run/summary.json {MACHINE}", {}, KIND
    ),
    "a figure on somebody's": At(
        "tools.explore.__main__",
        "curves --run a=run --baseline a --out o",
        {"o-kept.png": "x"},
    ),
    "a page on somebody's": At(
        "tools.explore.__main__",
        "tokens --run run --data d --ref-loss ref_loss.bin --out o.html",
        {"o.html": "x"},
    ),
    "a page on a run's model card": At(
        "tools.explore.__main__",
        "tokens --run run --data d --ref-loss ref_loss.bin --out run/README.md",
        {},
        KIND,
    ),
}
FAST = (  # one for each rule and stage; the others are slow
    "another program's args.json",
    "around everything",
    "on another token set",
    "losses on a table",
    "losses on another set's tokens",
    "losses on a link",
    "a set on a run",
    "a set on somebody's tokens.bin.partial",
    "answers on somebody's results.md",
    "clean text on its source",
    "measurements on a run's summary",
)


@pytest.fixture(scope="module")
def start(warm, inputs, tmp_path_factory):
    """The inputs, and more of the kit's: a set in other/v, an evaluation, losses, clean text."""
    root = tmp_path_factory.mktemp("start") / "start"
    fresh(inputs, root)
    for stage, command in (
        ("prepare", f"{FILES} --tokenizer d --out other/v"),
        ("score", f"{SCORE} --out scores/ref_loss.bin"),
        ("eval_math", f"{EVAL} --tasks p.jsonl"),
        ("tools.decontaminate", f"{CLEAN} --out cleaned.jsonl"),
    ):
        code, printed = warm.run(stage, command.split(), root, settings=SETTINGS)
        assert code == 0, printed
    (root / "problems").mkdir()
    (root / "problems/p.jsonl").write_bytes((root / "p.jsonl").read_bytes())
    fresh(root / "m", root / "deep/m")
    return root


def place(root, plant):
    for name, text in plant.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text == "dir":
            path.mkdir()
        elif text.startswith("-> "):
            path.symlink_to(text.removeprefix("-> "))
        else:
            path.write_text(text)


def all_files(root):
    return [path for path in sorted(root.rglob("*")) if path.is_symlink() or path.is_file()]


def commands(at):
    """The command, and the same with --overwrite where the stage has that."""
    if at.stage.startswith("tools") or "--regrade" in at.command or "--overwrite" in at.command:
        return [at.command]
    return [at.command, at.command + " --overwrite"]


def some_fast(names):
    """Parameters for a test: those in FAST, and the others under `slow`."""
    assert set(FAST) <= set(names)
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_fast(ARRANGEMENTS))
def test_nothing_of_theirs_is_touched(name, warm, start, tmp_path):
    at = ARRANGEMENTS[name]
    for command in commands(at):
        work = tmp_path / "work"
        fresh(start, work)
        place(work, at.plant)
        there = [path for path in all_files(work) if path.name != owned.LIST]
        before = untouched(there)
        code, printed = warm.run(at.stage, command.split(), work, settings=SETTINGS)
        assert untouched(path for path in there if os.path.lexists(path)) == before, command
        if at.refused is None:
            assert code == 0, printed
            continue
        lines = printed.strip().splitlines()
        assert code == 2, (command, code, printed)
        assert lines[-1].startswith("error: ") and "Traceback" not in printed, printed
        pattern = re.search(at.refused, lines[-1])
        assert pattern, f"{command}: {lines[-1]}"
        made = {path for path in all_files(work) if path.name != owned.LIST} - set(there)
        assert not made, f"{command}: left {sorted(made)}"


def test_there_are_enough_arrangements():
    assert len(ARRANGEMENTS) >= 60


# --------------------------------------------------------------------------------------------------
# two processes at once

PAIRS = {
    "train_ref": ("train_ref.py", f"{TRAIN} --out o", "before:o/train_state.pt:1"),
    "score": ("score.py", f"{SCORE} --out o.bin", "before:o.json:2"),
    "prepare": ("prepare.py", f"{FILES} --tokenizer d --out o", "before:o/meta.json:1"),
    "eval_math": ("eval_math.py", f"{EVAL} --tasks p.jsonl --out o", "before:o/results.json:1"),
    "tools.decontaminate": ("tools/decontaminate.py", f"{CLEAN} --out o.jsonl", "before:o.jsonl:1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_the_second_of_two_processes_is_refused_and_the_first_unharmed(name, warm, start, tmp_path):
    """The first one is stopped at a moment (SIGSTOP) while the second tries, twice."""
    script, command, point = PAIRS[name]
    work, alone = tmp_path / "work", tmp_path / "alone"
    fresh(start, alone)
    assert warm.run(name, command.split(), alone)[0] == 0
    fresh(start, work)
    driver = [sys.executable, ROOT / "tests/killed.py", "--send", "SIGSTOP", point, script]
    first = subprocess.Popen(
        [*map(str, driver), *command.split()],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), first.stdout.read()
    before = untouched(all_files(work))
    more = [] if name.startswith("tools") else [" --overwrite"]
    for again in ["", *more]:
        code, printed = warm.run(name, (command + again).split(), work)
        assert code == 2 and "another process is writing to it" in printed, printed
        assert untouched(all_files(work)) == before
    first.send_signal(signal.SIGCONT)
    out, _ = first.communicate(timeout=HANGS)
    assert first.returncode == 0, out
    assert untouched_names(work) == untouched_names(alone)


def untouched_names(root):
    return [str(path.relative_to(root)) for path in all_files(root)]
