"""Scoring against transformers, resuming, and what is refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import score
import slm
from common.errors import UserError
from conftest import finish, launch, write_model, write_set
from data import Stored, TokenSet
from hf import checkpoint
from killed import killed

ARGS = "--model m --data d --out ref_loss.bin --seq-len 16 --batch-size 4 --device cpu --threads 1"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 1000)
    write_model(tmp_path / "m", vocabulary)
    return tmp_path


def test_every_target_is_scored_once_with_its_window_as_context(stage, inputs):
    code, out, err = stage(score, ARGS + " --entropy")
    assert code == 0, err
    stored = np.fromfile(inputs / "ref_loss.bin", "<f2").astype(np.float32)
    entropy = np.fromfile(inputs / "ref_entropy.bin", "<f2").astype(np.float32)
    theirs = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)
    tokens = torch.from_numpy(np.array(TokenSet(inputs / "d").tokens, np.int64))
    expected, uncertain = np.full(1000, np.nan, np.float32), np.full(1000, np.nan, np.float32)
    for start in range(
        0, 999, 16
    ):  # by hand, one window at a time, the last one shorter instead of padded
        x, y = tokens[start : min(start + 16, 999)], tokens[start + 1 : start + 17]
        with torch.no_grad():
            log_p = theirs(x[None]).logits[0].log_softmax(-1)
        expected[start + 1 : start + 17] = F.nll_loss(log_p, y, reduction="none")
        uncertain[start + 1 : start + 17] = -(log_p.exp() * log_p).sum(-1)
    assert np.isnan(stored[0]) and not np.isnan(stored[1:]).any()
    assert np.allclose(stored[1:], expected[1:], rtol=1e-3, atol=1e-3)  # fp16
    assert np.allclose(entropy[1:], uncertain[1:], rtol=1e-3, atol=1e-3)


def test_excess_of_a_model_against_its_own_scores_is_zero(stage, inputs):
    assert stage(score, ARGS)[0] == 0
    data = TokenSet(inputs / "d")
    stored, model = (
        Stored(inputs / "ref_loss.bin", data, 16),
        slm.WithLoss(checkpoint.load(inputs / "m")),
    )
    for windows in ([0, 5, 61], [62]):
        x, y, valid = data.batch(windows, 16)
        loss = model(torch.from_numpy(x), torch.from_numpy(y)).numpy()
        ref = stored.batch(windows, valid)
        assert (
            np.abs(loss - ref)[valid] <= np.abs(loss)[valid] * 2**-10
        ).all()  # half a step of fp16, twice


def test_another_batch_size_gives_the_same_losses(stage, inputs):
    stage(score, ARGS)
    one = np.fromfile(inputs / "ref_loss.bin", "<f2")
    assert stage(score, ARGS.replace("--batch-size 4", "--batch-size 7") + " --overwrite")[0] == 0
    assert np.allclose(one[1:], np.fromfile(inputs / "ref_loss.bin", "<f2")[1:], rtol=2e-3)


KILLS = (  # ref_loss.json is written before the first chunk and after each of them
    "call:score:claim:1",  # nothing is there
    "before:ref_loss.json:1",  # the losses' file is there and no note
    "after:ref_loss.json:1",  # the note says 0
    "call:score:ValuesFile.save:2",  # the second chunk is in the file, the note says one
    "inside:ref_loss.json:2",
    "before:ref_loss.json:1",
    "after:ref_loss.json:1",
)


@pytest.mark.slow  # a sample of every moment is in tests/reliability
def test_killed_and_called_again_ends_identical(stage, vocabulary, tmp_path):
    """625 windows in chunks of 128."""
    write_set(tmp_path / "d", vocabulary, 10_000)
    write_model(tmp_path / "m", vocabulary)
    args = "--model m --data d --seq-len 16 --batch-size 2 --device cpu --threads 1"
    assert stage(score, f"{args} --out whole/ref_loss.bin")[0] == 0
    for point in KILLS:
        killed(point, f"score.py {args} --out cut/ref_loss.bin", tmp_path)
    assert json.loads((tmp_path / "cut/ref_loss.json").read_text())["n_scored"] < 625
    assert stage(score, f"{args} --out cut/ref_loss.bin")[0] == 0
    for name in ("ref_loss.bin", "ref_loss.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_killed_on_two_ranks_goes_on_with_one(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 10_000)
    write_model(tmp_path / "m", vocabulary)
    args = "--model m --data d --seq-len 16 --batch-size 2 --device cpu --threads 1"
    assert stage(score, f"{args} --out whole/ref_loss.bin")[0] == 0
    killed("after:ref_loss.json:3", f"score.py {args} --out cut/ref_loss.bin", tmp_path, ranks=2)
    # Two chunks: 64 forward passes of 2 windows on each of two ranks, twice.
    assert json.loads((tmp_path / "cut/ref_loss.json").read_text())["n_scored"] == 512
    assert stage(score, f"{args} --out cut/ref_loss.bin")[0] == 0
    for name in ("ref_loss.bin", "ref_loss.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 3000)
    write_model(tmp_path / "m", vocabulary)
    args = "score.py --model m --data d --seq-len 16 --batch-size 4 --device cpu --threads 1"
    one, two = (
        launch(f"{args} --out one.bin", tmp_path),
        launch(f"{args} --out two.bin", tmp_path, ranks=2),
    )
    finish(one), finish(two)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_nan_weights_cannot_be_a_reference(stage, inputs, vocabulary):
    model = write_model(inputs / "bad", vocabulary)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    checkpoint.save(model, inputs / "bad")
    code, _, err = stage(score, ARGS.replace("--model m", "--model bad"))
    assert code == 2 and "the loss that bad gives is not finite at token 1;" in err


@pytest.mark.parametrize(
    "change, message",
    [
        ("--batch-size 0", "--batch-size: got 0, wanted a whole number of at least 1"),
        ("--model nowhere", "nowhere"),
        ("--data nowhere", "nowhere is not a folder"),
        ("--device cuda", "sees no CUDA device"),
        ("--out ref_entropy_2.bin", "--out ref_entropy_2.bin: is named as entropies are"),
        ("--out base.entropy.bin", "--out base.entropy.bin: is named as entropies are"),
        ("--out base", "--out base: wanted a file that ends in .bin"),
        ("--device tpu9", "not a device that the kit runs on"),
    ],
)
def test_bad_arguments_are_one_line(stage, inputs, change, message):
    code, _, err = stage(score, ARGS + " " + change)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_what_is_there_already(stage, inputs, vocabulary):
    assert stage(score, ARGS)[0] == 0
    assert stage(score, ARGS)[0] == 0
    write_model(inputs / "m", vocabulary, seed=1)
    code, _, err = stage(score, ARGS)
    assert code == 2 and "reference" in err and "->" in err and "--overwrite" in err


def test_another_vocabulary_is_refused(stage, inputs):
    from hf import tokenizer

    other = tokenizer.train_bpe(["zebra quagga okapi " * 20], 290)
    write_model(inputs / "other", other)
    code, _, err = stage(score, ARGS.replace("--model m", "--model other"))
    assert code == 2 and "vocabulary" in err and "prepare.py --source TEXT --tokenizer other" in err


def test_entropies_are_added_to_losses_that_are_there(stage, inputs):
    """A pass of its own: the same entropies, and the losses' file is not touched."""
    at_once = ARGS.replace("ref_loss", "at_once/ref_loss")
    assert stage(score, at_once + " --entropy")[0] == 0
    assert stage(score, ARGS)[0] == 0
    path = inputs / "ref_loss.bin"
    before = path.read_bytes(), path.stat().st_mtime_ns
    code, out, err = stage(score, ARGS + " --entropy")
    assert code == 0 and "with entropies in ref_entropy.bin" in out, err
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    for name in ("ref_loss.bin", "ref_entropy.bin"):
        assert (inputs / name).read_bytes() == (inputs / "at_once" / name).read_bytes()
    note = json.loads((inputs / "ref_loss.json").read_text())
    assert note["entropy"] and note["entropies"]["n_scored"] == 63 and note["model"] == "m"
    same = json.loads((inputs / "at_once/ref_loss.json").read_text())
    assert note["checksums"] == same["checksums"]
    Stored(path, TokenSet(inputs / "d"), 16, entropy=True)
    assert stage(score, ARGS)[0] == 0  # asks for less than there is
    (inputs / "ref_entropy.bin").unlink()
    assert stage(score, ARGS + " --entropy")[0] == 0
    assert path.read_bytes() == before[0]
    again = (inputs / "at_once/ref_entropy.bin").read_bytes()
    assert (inputs / "ref_entropy.bin").read_bytes() == again


@pytest.mark.parametrize("out", [".", "..", "d"])
def test_a_folder_is_no_file_of_losses(stage, vocabulary, tmp_path, out):
    write_set(tmp_path / "d", vocabulary, 100)
    write_model(tmp_path / "m", vocabulary)
    code, _, err = stage(score, f"--model m --data d --out {out} --seq-len 16")
    assert code == 2 and f"--out {out}: is a folder, wanted a file such as ref_loss.bin" in err


@pytest.mark.slow
def test_a_pass_for_entropies_goes_on_after_a_kill(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 10_000)
    write_model(tmp_path / "m", vocabulary)
    args = "--model m --data d --seq-len 16 --batch-size 2 --device cpu --threads 1"
    assert stage(score, f"{args} --out at_once/ref_loss.bin --entropy")[0] == 0
    later = tmp_path / "later"
    finish(launch(f"score.py {args} --out later/ref_loss.bin", tmp_path))
    added = f"{args} --out later/ref_loss.bin --entropy"
    killed("after:ref_loss.json:2", f"score.py {added}", tmp_path)
    note = json.loads((later / "ref_loss.json").read_text())
    assert not note["entropy"] and note["entropies"]["n_scored"] == 256
    assert stage(score, f"{args} --out later/ref_loss.bin")[0] == 0  # its losses are whole
    with pytest.raises(UserError, match="is not whole; make it with python score.py"):
        Stored(later / "ref_loss.bin", TokenSet(tmp_path / "d"), 16, entropy=True)
    assert stage(score, added)[0] == 0
    for name in ("ref_loss.bin", "ref_entropy.bin"):
        assert (later / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


@pytest.mark.slow
def test_losses_that_were_interrupted_are_ended_before_their_entropies(stage, inputs):
    killed("call:score:ValuesFile.save:1", f"score.py {ARGS}", inputs)  # none is noted yet
    assert stage(score, ARGS + " --entropy")[0] == 0
    assert json.loads((inputs / "ref_loss.json").read_text()).get("entropies") is None
    whole = (inputs / "ref_loss.bin").read_bytes()
    args = f"score.py {ARGS.replace('ref_loss', 'b/ref_loss')}"
    killed("after:ref_loss.json:3", args, inputs, settings=["score:CHUNK=3"])
    code, _, err = stage(score, args.removeprefix("score.py ") + " --entropy")
    assert code == 0, err
    assert (inputs / "b/ref_loss.bin").read_bytes() == whole
    assert (inputs / "b/ref_entropy.bin").read_bytes() == (inputs / "ref_entropy.bin").read_bytes()
