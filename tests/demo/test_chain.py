"""The demo's chaining: which stages are run, and how a target is found on a curve."""

import argparse
import json

import pytest

import demo.chain as chain
import demo.corpus as corpus
import train_ref
import train_slm
from conftest import write_model, write_set


def students(**changes):
    return argparse.Namespace(**{"k": 0.6, "score": "excess", "scope": "micro", **changes})


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "slm"),
        ({"k": 1.0}, "clm"),
        ({"score": "random"}, "random"),
        ({"k": 0.7}, "slm-k0.7"),
        ({"backward": "pruned"}, "slm-pruned"),
        ({"score": "ref_loss", "scope": "batch"}, "ref_loss-batch"),
    ],
)
def test_each_setting_has_its_folder(changes, name):
    assert chain.run_name(students(**changes)) == name


def test_tokens_to_reach_interpolates_between_evaluations(tmp_path):
    lines = [
        {"tokens_seen": 100, "val_loss": 3.0},
        {"tokens_seen": 150},
        {"tokens_seen": 200, "val_loss": 2.0},
        {"tokens_seen": 300, "val_loss": 2.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chain.tokens_to_reach(tmp_path, 2.25) == 175
    assert chain.tokens_to_reach(tmp_path, 3.5) == 100
    assert chain.tokens_to_reach(tmp_path, 1.9) is None


def test_missing_stages_run_in_order_and_finished_ones_are_used_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(chain, "run", ran.append)
    args = students(
        data=None, init=None, out=None, val=None, ref_loss=None, steps=None, epochs=None, seed=0
    )
    chain.ensure(args, "slm")
    assert [command.split()[0] for command in ran] == [
        "prepare.py",
        "train_ref.py",
        "train_ref.py",
        "score.py",
        "train_slm.py",
    ]
    assert (args.data, args.init, args.out) == ("data/demo/corpus", "out/demo/base", "out/demo/slm")
    assert args.ref_loss == "out/demo/ref_loss.bin"
    monkeypatch.setattr(chain, "finished", lambda path, command: True)
    ran.clear()
    chain.ensure(
        students(
            data=None, init=None, out=None, val=None, ref_loss=None, steps=None, epochs=None, seed=3
        ),
        "slm",
    )
    assert ran == []


def test_the_plain_baseline_needs_no_reference(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(chain, "run", ran.append)
    chain.ensure(
        students(
            k=1.0,
            data=None,
            init=None,
            out=None,
            val=None,
            ref_loss=None,
            steps=None,
            epochs=None,
            seed=0,
        ),
        "slm",
    )
    assert [command.split()[0] for command in ran] == ["prepare.py", "train_ref.py"]


def test_a_named_token_set_is_left_alone(monkeypatch):
    monkeypatch.setattr(chain, "run", lambda command: pytest.fail(command))
    args = students(data="mine", seed=0)
    chain.ensure(args, "slm")
    assert vars(args) == {**vars(students(data="mine", seed=0)), "chain": False}


def test_a_stage_is_stale_when_its_inputs_or_arguments_changed(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 600)
    write_model(tmp_path / "m", vocabulary)
    flags = "--data d --init m --steps 2 --seq-len 16 --batch-size 2"
    assert stage(train_ref, f"{flags} --out out/demo/x --device cpu")[0] == 0
    path, command = tmp_path / "out/demo/x/summary.json", f"train_ref.py {flags} --out out/demo/x"
    assert chain.finished(path, command)
    assert not chain.finished(path, command.replace("--steps 2", "--steps 3"))
    write_model(tmp_path / "m", vocabulary, seed=1)  # another base under the same name
    assert not chain.finished(path, command)
    code, _, err = stage(train_ref, f"{flags} --out out/demo/x --device cpu")
    assert (
        code == 2 and "'init'" in err and "other arguments" in err
    )  # and the stage says what differs


def test_demo_problems_are_split_and_labels_do_not_reach_training(stage, vocabulary, tmp_path):
    splits = [
        {key for keys in corpus.keys(split) for key in keys} for split in ("train", "val", "test")
    ]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    tests = corpus.test_problems(1000)
    assert (
        len({tuple(p["key"]) for p in tests}) == 1000
        and {tuple(p["key"]) for p in tests} <= splits[2]
    )
    # the same run with labels and without them ends in the same weights
    import numpy as np

    from hf import checkpoint

    for name, kind in (("with", np.arange(600) % 2), ("without", None)):
        write_set(tmp_path / name, vocabulary, 600, kind=kind)
    write_model(tmp_path / "m", vocabulary)
    for name in ("with", "without"):
        assert (
            stage(
                train_slm,
                f"--k 0.5 --score loss --data {name} --init m --steps 3 --seq-len 16 --batch-size 2 "
                f"--device cpu --out o-{name}",
            )[0]
            == 0
        )
    assert checkpoint.model_hash(tmp_path / "o-with") == checkpoint.model_hash(
        tmp_path / "o-without"
    )
