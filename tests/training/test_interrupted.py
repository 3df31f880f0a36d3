"""A trainer that is killed or interrupted goes on with the same command and ends bit-identical."""

import json
import shutil

import numpy as np
import pytest
from test_train import SLM, TINY, distance, log, same

import score
import train_ref
import train_slm
from conftest import finish, launch, write_model, write_set
from data import Loader
from killed import Point, arm_call, killed
from training import states


@pytest.fixture
def scored(stage, vocabulary, tmp_path):
    """A corpus d, a validation set v, a model m, and the losses of another model."""
    write_set(tmp_path / "d", vocabulary, 3000, kind=np.arange(3000) % 2)
    write_set(tmp_path / "v", vocabulary, 300, seed=1)
    write_model(tmp_path / "m", vocabulary)
    write_model(tmp_path / "r", vocabulary, seed=5)
    args = "--model r --data d --out ref_loss.bin --seq-len 16 --device cpu --threads 1"
    assert stage(score, args)[0] == 0
    return tmp_path


# Of 40 steps; a state is saved after every seventh, each kill comes further than the one before.
KILLS = (
    "call:training.run:Run.save_state:1",  # the first steps are logged, nothing is saved
    "inside:train_state.pt:1",
    "after:train_state.pt:1",  # step 7
    "call:data:Loader.micro_batches:10",  # steps after the state are in the log
    "inside:train_state.pt:2",
    "before:train_state.pt:3",
    "moment:cut/log.jsonl:1",  # before the log is cut back
    "inside:cut/model.safetensors:1",
    "after:cut/model.safetensors:1",
    "before:config.json:1",
    "after:cut/README.md:1",
    "inside:summary.json:1",
)


@pytest.mark.slow  # a sample of every moment is in tests/reliability
@pytest.mark.parametrize(
    "module, flags",
    [(train_ref, "--moments bfloat16"), (train_slm, "--k 0.6 --ref-loss ref_loss.bin")],
)
def test_kill_9_and_the_same_command_end_bit_identical(stage, scored, module, flags):
    args = f"--data d --val v --init m {TINY} {flags} --steps 40 --eval-every 20 --save-every 7"
    assert stage(module, f"{args} --out whole")[0] == 0
    for point in KILLS:
        killed(point, f"{module.__name__}.py {args} --out cut", scored)
        assert not (scored / "cut/summary.json").exists()
    assert stage(module, f"{args} --out cut")[0] == 0
    assert same(scored / "whole", scored / "cut") and log(scored / "whole") == log(scored / "cut")
    a, b = (json.loads((scored / f / "summary.json").read_text()) for f in ("whole", "cut"))
    assert all(a[k] == b[k] for k in ("val_loss", "tokens_seen", "tokens_selected"))


def interrupted_run(stage, folder, interrupt, kept=10):
    """Interrupt a run of 20 steps, a state saved after every fifth, and go on with it.

    `kept`: the steps that are not lost.
    """
    args = f"--data d --init m {TINY} --steps 20 --save-every 5"
    out = interrupt(args)
    assert "interrupted" in out and "Traceback" not in out
    assert states.read(states.newest_of(folder / "a"))["step"] == kept
    assert not list(folder.glob("a/*-tmp"))
    assert stage(train_ref, f"{args} --out a")[0] == 0
    assert stage(train_ref, f"{args} --out whole")[0] == 0
    assert same(folder / "whole", folder / "a") and log(folder / "whole") == log(folder / "a")


def test_interrupted_by_the_user_is_130_and_keeps_what_was_done(stage, scored, monkeypatch):
    """In this process: the signal comes at step 13."""
    point = Point("call:data:Loader.micro_batches:13", "SIGINT")

    def interrupt(args):
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "micro_batches", arm_call(point, Loader.micro_batches))
            code, _, err = stage(train_ref, f"{args} --out a")
        assert code == 130
        return err

    interrupted_run(stage, scored, interrupt)


@pytest.mark.parametrize(
    "sent, point, kept",
    [
        ("SIGINT", "call:data:Loader.micro_batches:13", 10),
        ("SIGINT", "inside:train_state.pt:3", 10),
        ("SIGTERM", "call:data:Loader.micro_batches:13", 13),  # the step is ended and saved
        ("SIGTERM", "before:train_state.pt:3", 16),  # a state that was being written, too
    ],
)
@pytest.mark.slow
def test_signals_end_a_process_with_130(stage, scored, sent, point, kept):
    def interrupt(args):
        return killed(point, f"train_ref.py {args} --out a", scored, sent=sent)

    interrupted_run(stage, scored, interrupt, kept)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.slow
def test_killed_on_two_ranks_goes_on_with_any_number(stage, scored, parallel):
    """The same windows in the same order, however many ranks go on: one rank's result."""
    args = (
        f"{SLM} --steps 30 --save-every 5 --micro-batch-size 1 --parallel {parallel} --scope batch"
    )
    assert stage(train_slm, f"{args} --out whole")[0] == 0
    point = "call:training.run:Run.save_state:4"  # on both ranks
    killed(point, f"train_slm.py {args} --out cut", scored, ranks=2)
    assert states.newest_of(scored / "cut").name == "state-000015"
    assert log(scored / "cut")[-1]["step"] == 20
    for n in (1, 2, 4):
        shutil.copytree(scored / "cut", scored / f"on{n}")
        finish(launch(f"train_slm.py {args} --out on{n}", scored, ranks=n))
    assert stage(train_slm, f"{args} --out cut")[0] == 0
    for folder in ("cut", "on1", "on2", "on4"):
        assert distance(scored / "whole", scored / folder) < 1e-5
        assert [r["tokens_seen"] for r in log(scored / folder)] == [
            r["tokens_seen"] for r in log(scored / "whole")
        ]
