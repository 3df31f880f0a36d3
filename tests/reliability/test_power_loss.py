"""What a power loss or a bad disk leaves: files that are cut, empty, full of zeros, or garbage.

A training state is replaced by the one before it, and the run ends bit-identical. Of every other
file that is damaged one line says what to do, or the work goes on from what is whole.
"""

import json
import os
import shutil

import pytest

from contents import contents, differences
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

RUN = f"--data d --val v --init m --seq-len 16 --batch-size 4 --steps 6 --save-every 2 {MACHINE}"
SCORE = f"--model m --data d --seq-len 16 --batch-size 4 {MACHINE} --out new.bin"
EVALUATE = f"{EVAL} --tasks p.jsonl --out new"
PREPARE = f"{FILES} --tokenizer d --out new"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def zeros_at_its_end(path):
    size = path.stat().st_size
    os.truncate(path, size * 2 // 3)
    os.truncate(path, size)


def zeros_inside(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(200))


def garbage(path):
    path.write_bytes(bytes(i * 7 % 256 for i in range(path.stat().st_size)))


def another_json(path):
    path.write_text("[1, 2]\n")


DAMAGES = [cut, empty, zeros_at_its_end, garbage]
pytestmark = pytest.mark.slow


def by_name(function):
    return function.__name__


@pytest.fixture(scope="module")
def stopped(warm, inputs, tmp_path_factory):
    """stopped(stage, command, point): (a copy of where it was killed, what it would have made)."""
    made = {}
    root = tmp_path_factory.mktemp("stopped")

    def at(stage, command, point, work):
        key = stage, command, point
        if key not in made:
            folder = root / str(len(made))
            fresh(inputs, folder)
            code, printed = warm.run(stage, command.split(), folder, settings=SETTINGS)
            assert code == 0, printed
            whole = contents(folder)
            fresh(inputs, folder)
            code, printed = warm.run(stage, command.split(), folder, settings=SETTINGS, point=point)
            assert code == -9, printed
            made[key] = folder, whole
        folder, whole = made[key]
        fresh(folder, work)
        return whole

    return at


def again(warm, stage, command, work):
    code, printed = warm.run(stage, command.split(), work, settings=SETTINGS)
    assert "Traceback" not in printed, printed
    return code, printed


STATE = "new/train_state.pt"


@pytest.mark.parametrize("damage", (zeros_inside, *DAMAGES), ids=by_name)
def test_a_damaged_state_is_replaced_by_the_one_before_it(warm, stopped, tmp_path, damage):
    work = tmp_path / "work"
    # Killed behind the second save: train_state.pt is of step 4, train_state.before.pt of step 2.
    whole = stopped("train_ref", f"{RUN} --out new", "after:new/train_state.pt:2", work)
    damage(work / STATE)
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    said = [line for line in printed.splitlines() if "damaged" in line]
    assert code == 0 and len(said) == 1 and "going on from train_state.before.pt" in said[0]
    assert not differences(contents(work), whole)


@pytest.mark.parametrize("damage", (cut, zeros_inside), ids=by_name)
def test_a_damaged_state_never_takes_the_place_of_the_good_one(warm, stopped, tmp_path, damage):
    """Killed again, just before the next state is there: the good one still is."""
    work = tmp_path / "work"
    whole = stopped("train_ref", f"{RUN} --out new", "after:new/train_state.pt:2", work)
    damage(work / STATE)
    point = "before:new/train_state.pt:1"
    code, printed = warm.run("train_ref", f"{RUN} --out new".split(), work, point=point)
    assert code == -9, printed
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    assert code == 0, printed
    assert not differences(contents(work), whole)


def test_both_states_damaged_is_one_line_and_overwrite_mends_it(warm, stopped, tmp_path):
    work = tmp_path / "work"
    whole = stopped("train_ref", f"{RUN} --out new", "after:new/train_state.pt:2", work)
    for name in ("train_state.pt", "train_state.before.pt"):
        cut(work / "new" / name)
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    assert code == 2 and len(printed.strip().splitlines()) == 1
    assert "no older one is left: start over with --overwrite" in printed
    code, printed = again(warm, "train_ref", f"{RUN} --out new --overwrite", work)
    assert code == 0 and not differences(contents(work), whole), printed


# Each: the stage, its command, where it was killed, the file, what the line says.
TRAIN = ("train_ref", f"{RUN} --out new", "after:new/train_state.pt:2")
TRAINED = ("train_ref", f"{RUN} --out new", "after:new/summary.json:1")
SCORED = ("score", SCORE, "after:new.json:3")
PREPARED = ("prepare", PREPARE, "after:new/progress.json:4")
MADE = ("prepare", PREPARE, "after:new/meta.json:1")
ANSWERED = ("eval_math", EVALUATE, "before:new/results.json:1")
EVALUATED = ("eval_math", EVALUATE, "after:new/results.md:1")
OTHERS = {
    "args.json": (*TRAIN, "new/args.json", "--overwrite"),
    "log.jsonl": (*TRAIN, "new/log.jsonl", "log.jsonl"),
    "summary.json": (*TRAINED, "new/summary.json", "--overwrite"),
    "the note of losses": (*SCORED, "new.json", "--overwrite"),
    "progress.json": (*PREPARED, "new/progress.json", "--overwrite"),
    "meta.json": (*MADE, "new/meta.json", "--overwrite"),
    "results.json": (*EVALUATED, "new/results.json", "choose another --out"),
}


@pytest.mark.parametrize("damage", (cut, *DAMAGES[1:], another_json), ids=by_name)
@pytest.mark.parametrize("name", OTHERS)
def test_another_damaged_file_is_one_line_that_says_what_to_do(
    warm, stopped, tmp_path, name, damage
):
    stage, command, point, path, message = OTHERS[name]
    work = tmp_path / "work"
    whole = stopped(stage, command, point, work)
    damage(work / path)
    code, printed = again(warm, stage, command, work)
    last = printed.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, printed
    another = message == "choose another --out"
    command = command.replace("--out new", "--out other") if another else f"{command} --overwrite"
    code, printed = again(warm, stage, command, work)
    assert code == 0, printed
    if another:
        shutil.rmtree(work / "new")
        (work / "other").rename(work / "new")
    assert not differences(contents(work), whole)


@pytest.mark.parametrize("damage", (zeros_inside, *DAMAGES), ids=by_name)
def test_damaged_losses_are_refused(warm, stopped, tmp_path, damage):
    """At once where they are too short, else by their checksums, at the latest by the student."""
    work = tmp_path / "work"
    stage, command, point = SCORED
    whole = stopped(stage, command, point, work)
    damage(work / "new.bin")
    code, printed = again(warm, stage, command, work)
    if code == 0:
        train = f"{RUN} --ref-loss new.bin --out student"
        code, printed = again(warm, "train_slm", train, work)
    last = printed.strip().splitlines()[-1]
    assert code == 2 and "new.bin" in last and "--overwrite" in last, printed
    code, printed = again(warm, stage, f"{command} --overwrite", work)
    assert code == 0 and not differences(contents(work), whole), printed


@pytest.mark.parametrize("damage", (cut, empty), ids=by_name)
def test_tokens_that_a_power_loss_cut_are_made_again(warm, stopped, tmp_path, damage):
    work = tmp_path / "work"
    whole = stopped(*PREPARED, work)
    damage(work / "new/tokens.bin.partial")
    code, printed = again(warm, "prepare", PREPARE, work)
    assert code == 0, printed
    assert not differences(contents(work), whole)


@pytest.mark.parametrize("damage", (garbage, cut, empty, zeros_at_its_end), ids=by_name)
def test_unfinished_answers_that_are_damaged(warm, stopped, tmp_path, damage):
    """Whole lines before the damage count; a line that is broken is named."""
    work = tmp_path / "work"
    stage, command, point = ANSWERED
    whole = stopped(stage, command, point, work)
    damage(work / "new/p.partial-0.jsonl")
    code, printed = again(warm, stage, command, work)
    if code:
        last = printed.strip().splitlines()[-1]
        assert code == 2 and "is broken" in last and "--overwrite" in last, printed
        code, printed = again(warm, stage, f"{command} --overwrite", work)
    assert code == 0, printed
    assert not differences(contents(work), whole)


def test_a_list_that_lost_its_end_makes_our_files_somebody_else_s(warm, stopped, tmp_path):
    """The safe side: they are refused in one line, and not replaced."""
    work = tmp_path / "work"
    stopped(*TRAINED, work)
    cut(work / "new/.slm-kit")
    before = contents(work)
    code, printed = again(warm, "train_ref", f"{RUN} --lr 0.1 --out new --overwrite", work)
    assert code == 2 and "did not write it" in printed, printed
    kept = contents(work)
    assert before["new/model.safetensors"] in kept.values()


def test_the_log_s_records_are_what_was_trained(warm, stopped, tmp_path):
    """A cut behind the saved state's step is no damage: those steps are made again."""
    work = tmp_path / "work"
    whole = stopped("train_ref", f"{RUN} --out new", "before:new/train_state.pt:3", work)
    path = work / "new/log.jsonl"
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 6
    os.truncate(path, path.stat().st_size - 30)
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    assert code == 0 and not differences(contents(work), whole), printed


def test_a_damaged_line_of_the_log_may_be_deleted_as_its_message_says(warm, stopped, tmp_path):
    """Also that of the saved state's own step: no step stands there twice."""
    work = tmp_path / "work"
    stopped("train_ref", f"{RUN} --out new", "before:new/train_state.pt:3", work)
    path = work / "new/log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines]
    damaged = steps.index(4)  # the saved state's
    path.write_bytes(b"".join([*lines[:damaged], b"garbage\n", *lines[damaged + 1 :]]))
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    assert code == 2 and "the run goes on when the line is deleted" in printed, printed
    path.write_bytes(b"".join([*lines[:damaged], *lines[damaged + 1 :]]))
    code, printed = again(warm, "train_ref", f"{RUN} --out new", work)
    assert code == 0, printed
    made = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert made == [*steps[:damaged], *range(5, made[-1] + 1)]
