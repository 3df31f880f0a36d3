"""The validation before the first step, and what is said of the reference's lead."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import score
import train_ref
import train_slm
from conftest import write_model, write_set
from data import Loader, TokenSet
from hf import checkpoint
from killed import Point, arm_call
from training.lead import Lead

T = 16
TINY = f"--seq-len {T} --batch-size 4 --device cpu --threads 1"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    """A corpus d, two validation sets v and w, a base m."""
    write_set(tmp_path / "d", vocabulary, 3000)
    write_set(tmp_path / "v", vocabulary, 300, seed=1)
    write_set(tmp_path / "w", vocabulary, 200, seed=2)
    write_model(tmp_path / "m", vocabulary)
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def mean_loss(folder, tokens, counts=None):
    """transformers' mean loss over every target, window by window; `counts` (targets,): of some."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.array(TokenSet(tokens).tokens, np.int64))
    total = []
    for start in range(0, len(tokens) - 1, T):
        x = tokens[start : min(start + T, len(tokens) - 1)]
        y = tokens[start + 1 : start + T + 1]
        with torch.no_grad():
            total += F.cross_entropy(model(x[None]).logits[0], y, reduction="none").tolist()
    return np.mean(total if counts is None else np.array(total)[counts])


@pytest.mark.parametrize("module", [train_ref, train_slm])
def test_the_first_validation_is_the_start_s_and_changes_nothing(stage, inputs, module):
    flags = "--k 1.0" if module is train_slm else ""
    args = f"--data d --val v --init m {TINY} --steps 6 {flags}"
    assert stage(module, f"{args} --out a --eval-every 3")[0] == 0
    assert stage(module, f"{args} --out b --eval-every 0")[0] == 0
    records = log(inputs / "a")
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6]
    first = records[0]
    assert (first["tokens_seen"], first["tokens_selected"]) == (0, 0)
    assert abs(first["val_loss"] - mean_loss(inputs / "m", inputs / "v")) < 1e-5
    assert [r["step"] for r in log(inputs / "b") if "val_loss" in r] == [6]
    weights = [(inputs / run / "model.safetensors").read_bytes() for run in ("a", "b")]
    assert weights[0] == weights[1]


def test_a_run_that_goes_on_does_not_measure_its_start_again(stage, inputs):
    args = f"--data d --val v --init m {TINY} --steps 8 --eval-every 4 --save-every 3 --out a"
    point = Point("call:data:Loader.micro_batches:5", "SIGINT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "micro_batches", arm_call(point, Loader.micro_batches))
        assert stage(train_ref, args)[0] == 130
    before = log(inputs / "a")
    calls = []
    measure = train_ref.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ref, "validate", lambda *a: calls.append(1) or measure(*a))
        assert stage(train_ref, args)[0] == 0
    assert len(calls) == 2  # of steps 4 (behind the state of step 3) and 8
    records = log(inputs / "a")
    assert [r["step"] for r in records] == list(range(9))
    assert records[0] == before[0]


@pytest.fixture
def scored(stage, inputs):
    """r: a reference that a student soon passes; ref_loss.bin, its losses; its validation loss."""
    train = f"--data d --init m {TINY} --steps 8 --warmup 0 --lr 1e-2 --out r"
    assert stage(train_ref, train)[0] == 0
    code, out, err = stage(score, f"--model r --data d --val v --out ref_loss.bin {TINY}")
    assert code == 0, err
    assert "r: validation loss" in out and "on v" in out
    return inputs


STUDENT = f"--data d --init m --ref-loss ref_loss.bin {TINY} --warmup 0 --lr 1e-2 --eval-every 5"


def test_the_lead_is_said_at_the_start_logged_and_its_end_said_once(stage, scored):
    [known] = read(scored / "ref_loss.json")["validation"]
    assert known["data"] == TokenSet(scored / "v").hash
    reference = known["loss"]
    assert abs(reference - mean_loss(scored / "r", scored / "v")) < 1e-5

    code, out, err = stage(train_slm, f"{STUDENT} --val v --out a --steps 60")
    assert code == 0, err
    measured = [r for r in log(scored / "a") if "val_loss" in r]
    leads = [r["reference_lead"] for r in measured]
    assert leads == [r["val_loss"] - reference for r in measured]
    assert leads[0] > 0 > leads[-1], "the test needs a student that passes its reference"
    assert out.count(f"a lead of {leads[0]:.4f} nats") == 1
    passed = next(r["step"] for r in measured if r["reference_lead"] <= 0)
    assert out.count("has passed the reference's") == 1
    assert f"step {passed}: the student's validation loss" in out
    summary = read(scored / "a/summary.json")
    assert summary["reference_lead"] == leads[-1]


def test_two_sets_of_the_same_tokens_with_other_targets_have_two_losses(stage, scored, vocabulary):
    tokens = np.array(TokenSet(scored / "v").tokens)
    mask = (np.arange(len(tokens)) % 3 == 0).astype(np.uint8)
    write_set(scored / "w", vocabulary, tokens=tokens, loss_mask=mask)
    code, out, err = stage(score, f"--model r --data d --val v w --out ref_loss.bin {TINY}")
    assert code == 0, err
    whole, masked = read(scored / "ref_loss.json")["validation"]
    assert abs(masked["loss"] - mean_loss(scored / "r", scored / "w", mask[1:] > 0)) < 1e-5
    assert whole["loss"] != masked["loss"] and f"{masked['loss']:.4f} on w" in out
    code, out, err = stage(train_slm, f"{STUDENT} --val w --out a --steps 5")
    assert code == 0, err
    first = next(record for record in log(scored / "a") if "val_loss" in record)
    assert first["reference_lead"] == first["val_loss"] - masked["loss"]


def test_without_a_lead_the_start_says_so(stage, inputs):
    assert stage(score, f"--model m --data d --val v --out ref_loss.bin {TINY}")[0] == 0
    code, out, err = stage(train_slm, f"{STUDENT} --val v --out a --steps 5")
    assert code == 0, err
    assert "it has no lead" in out and "has passed" not in out


def test_another_set_s_lead_is_not_shown_and_the_mend_works(stage, scored):
    code, out, err = stage(train_slm, f"{STUDENT} --val w --out a --steps 5")
    assert code == 0, err
    assert "knows the reference's validation loss on v, not on --val w" in out
    assert "lead" not in read(scored / "a/summary.json") and "a lead of" not in out
    losses = (scored / "ref_loss.bin").read_bytes()
    again = f"--model r --data d --val w --out ref_loss.bin {TINY}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "score", None)  # the losses are not made again
        assert stage(score, again)[0] == 0
        patch.setattr(checkpoint, "load", None)  # nor is the model loaded for what is known
        assert stage(score, again)[0] == 0
    assert (scored / "ref_loss.bin").read_bytes() == losses
    assert [v["name"] for v in read(scored / "ref_loss.json")["validation"]] == ["v", "w"]
    _, out, _ = stage(train_slm, f"{STUDENT} --val w --out b --steps 5")
    assert "a lead of" in out and "not on --val" not in out


def test_notes_without_a_validation_loss_and_other_scores_say_nothing(stage, scored):
    note = read(scored / "ref_loss.json")
    for flags in ("--k 1.0", "--score random", "--score ref_loss", "--score loss"):
        out_folder = flags.split()[-1]
        _, out, _ = stage(train_slm, f"{STUDENT} --val w --steps 2 --out {out_folder} {flags}")
        assert "lead" not in out and "note:" not in out
    del note["validation"]  # of an older kit
    (scored / "ref_loss.json").write_text(json.dumps(note))
    code, out, err = stage(train_slm, f"{STUDENT} --val v --steps 2 --out a")
    assert code == 0, err
    assert "lead" not in out and "note:" not in out
    assert stage(score, f"--model r --data d --val v --out ref_loss.bin {TINY}")[0] == 0
    assert len(read(scored / "ref_loss.json")["validation"]) == 1


def test_a_reference_whose_validation_loss_is_no_number_is_refused(stage, inputs, vocabulary):
    """Its losses on d were made before: --val alone is new."""
    write_set(inputs / "e", vocabulary, tokens=np.arange(200) % 50)
    write_set(inputs / "x", vocabulary, tokens=np.arange(200) % 60 + 100)
    model = write_model(inputs / "bad", vocabulary, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[120:] = float("nan")
    checkpoint.save(model, inputs / "bad")
    args = f"--model bad --data e --out l.bin {TINY}"
    assert stage(score, args)[0] == 0
    code, _, err = stage(score, f"{args} --val x")
    assert code == 2 and "validation loss on x that is not finite" in err
    assert read(inputs / "l.json")["validation"] == []


def test_a_run_that_goes_on_remembers_that_it_was_said():
    """`last`: the validation loss in the saved state."""
    assert Lead(2.0, None).news(5, 1.9).startswith("step 5: ")
    assert Lead(2.0, last=1.95).news(10, 1.9) is None
    lead = Lead(2.0, last=2.1)
    assert lead.news(10, 2.05) is None
    assert "has passed" in lead.news(15, 1.99)
    assert lead.news(20, 2.01) is None and lead.news(25, 1.98) is None
    assert Lead(None, None).news(0, 1.0) is None and Lead(None, 1.0).over(1.0) is None
