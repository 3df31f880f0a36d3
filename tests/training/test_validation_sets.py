"""Several validation sets at once, the log's seconds, and a run that is called anew."""

import json
import re

import numpy as np
import pytest

import score
import slm
import train_ref
import train_slm
from conftest import write_model, write_set
from data import TokenSet
from tools import compare
from tools.explore import __main__ as explore
from training.run import Run
from training.validation import say_price

TINY = "--seq-len 16 --batch-size 4 --device cpu --threads 1"
STEPS = f"--data d --init m {TINY} --steps 4 --eval-every 2"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 1000)
    write_set(tmp_path / "v", vocabulary, 200, seed=1)
    write_set(tmp_path / "w", vocabulary, 300, seed=2)
    write_model(tmp_path / "m", vocabulary)
    return tmp_path


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_set_is_logged_by_name_and_the_first_decides(stage, inputs):
    for out, val in (("a", "v"), ("b", "w"), ("both", "v w")):
        code, printed, err = stage(train_ref, f"{STEPS} --val {val} --out {out}")
        assert code == 0, err
    assert "validation loss" in printed and "on w" in printed and " GB" in printed
    alone = {name: [r.get("val_loss") for r in log(inputs / out)] for name, out in ("va", "wb")}
    both = log(inputs / "both")
    assert [r.get("val_loss") for r in both] == alone["v"]
    for record, v, w in zip(both, alone["v"], alone["w"]):
        assert record.get("val_loss_by_set") == (None if v is None else {"v": v, "w": w})
    summary = json.loads((inputs / "both/summary.json").read_text())
    assert summary["val_loss"] == alone["v"][-1]
    assert summary["val_loss_by_set"] == {"v": alone["v"][-1], "w": alone["w"][-1]}
    seconds = [record["seconds"] for record in both if record["step"]]
    assert seconds == sorted(seconds) and seconds[-1] <= summary["seconds"]
    compared = compare.results({"both": compare.read_run(inputs / "both")})
    assert "val loss, w" in compared and f"{alone['w'][-1]:.4f}" in compared
    code, _, err = stage(explore, "curves --run both --run again=both --out figure")
    assert code == 0, err
    assert (inputs / "figure-sets.svg").exists()
    assert list(json.loads((inputs / "figure.json").read_text())) == ["both", "again"]
    code, _, err = stage(explore, "curves --run both --run both --out figure")
    assert code == 2 and "wanted names that differ" in err


def test_the_reference_is_asked_about_each_and_leads_on_the_first(stage, inputs, vocabulary):
    write_model(inputs / "r", vocabulary, seed=5)
    args = f"--model r --data d --out ref_loss.bin {TINY}"
    code, out, err = stage(score, f"{args} --val v w")
    assert code == 0 and "on v" in out and "on w" in out, err
    known = {v["name"]: v["loss"] for v in json.loads((inputs / "ref_loss.json").read_text())[
        "validation"]}  # fmt: skip
    code, _, err = stage(train_slm, f"{STEPS} --val w v --ref-loss ref_loss.bin --out s")
    assert code == 0, err
    for record in log(inputs / "s"):
        if "val_loss" in record:
            lead = record["val_loss"] - known["w"]
            assert record["reference_lead"] == pytest.approx(lead, abs=1e-9)


def test_the_price_of_large_validation_sets_is_said(capsys):
    """Of 50 steps of 0.1M tokens each, a forward pass over 9M takes 3 / 5 of the time."""
    say_price(50, 50 * 100_000, 9_000_000)
    assert "some 60% of the time of the 50 steps" in (said := capsys.readouterr().out)
    steps = int(re.search("--eval-every ([0-9]+) would be 5%", said)[1])
    assert 9_000_000 / 3 / (steps * 100_000) == pytest.approx(0.05)
    say_price(50, 50 * 100_000, 2_900_000)  # 19 %
    say_price(50, 500, 900_000)  # soon read
    assert not capsys.readouterr().out


def test_the_same_set_twice_is_refused(stage, inputs):
    code, _, err = stage(train_ref, f"{STEPS} --val v v --out a")
    assert code == 2 and "wanted folders that differ" in err and not (inputs / "a").exists()


def test_a_run_goes_on_with_the_validation_set_that_it_began_with(stage, inputs, vocabulary):
    args = f"{STEPS} --val v --out a"
    assert stage(train_ref, args)[0] == 0
    before = json.loads((inputs / "a/args.json").read_text())
    assert before["inputs"]["validation"] == TokenSet(inputs / "v").hash
    write_set(inputs / "other", vocabulary, 200, seed=3)
    (inputs / "v").rename(inputs / "old")
    (inputs / "other").rename(inputs / "v")
    code, _, err = stage(train_ref, args)
    assert code == 2 and err.count("\n") == 1
    was, now = (TokenSet(inputs / name).hash[:12] for name in ("old", "v"))
    assert f"hash of validation {was} -> {now}" in err and "hash of data" not in err
    del before["inputs"]["validation"], before["inputs"]["loss_mask"]  # as runs were noted once
    (inputs / "a/args.json").write_text(json.dumps(before))
    code, out, err = stage(train_ref, args)
    assert code == 0 and "validation loss" in out, err
    code, _, err = stage(train_ref, f"{args} --val w")  # then the name has to be the same
    assert code == 2 and "val 'v' -> 'w'" in err


def test_a_run_goes_on_with_the_targets_that_it_began_with(stage, inputs, vocabulary):
    """Whether a token may be a target is in a file of its own, which a copy may lose."""
    mask = (np.arange(1000) % 3 > 0).astype(np.uint8)
    write_set(inputs / "masked", vocabulary, 1000, loss_mask=mask)
    args = f"--data masked --val masked --init m {TINY} --steps 2 --out a"
    assert stage(train_ref, args)[0] == 0
    content = (inputs / "masked/loss_mask.bin").read_bytes()
    (inputs / "masked/loss_mask.bin").unlink()
    code, _, err = stage(train_ref, args)
    assert code == 2 and "masked/loss_mask.bin is not the file that meta.json describes" in err
    (inputs / "masked/loss_mask.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    code, _, err = stage(train_ref, args)
    assert code == 2 and "masked/loss_mask.bin is not the file that meta.json describes" in err

    # the same tokens with other targets, and a set that was made before its mask had a hash
    write_set(inputs / "other", vocabulary, 1000, loss_mask=1 - mask)
    (inputs / "masked").rename(inputs / "old")
    (inputs / "other").rename(inputs / "masked")
    code, _, err = stage(train_ref, args)
    assert code == 2 and "hash of loss_mask " in err and "hash of validation " in err
    was, now = re.search(r"hash of validation (\w+ \w+) -> (\w+ \w+)", err).groups()
    assert was != now and was.split()[0] == now.split()[0]
    assert "hash of data" not in err
    meta = json.loads((inputs / "masked/meta.json").read_text())
    known = {key: value for key, value in meta.items() if not key.startswith("loss_mask")}
    (inputs / "masked/meta.json").write_text(json.dumps(known))
    assert stage(train_ref, args.replace("--out a", "--out b"))[0] == 0
    (inputs / "masked/loss_mask.bin").write_bytes(content)
    code, _, err = stage(train_ref, args.replace("--out a", "--out b"))
    assert code == 2 and "hash of loss_mask " in err


def test_what_changes_no_result_is_no_other_run(stage, inputs):
    """Another way to name the same files, the same precision, another micro-batch."""
    (inputs / "moved").symlink_to(inputs / "d")
    args = f"{STEPS} --val v --out a"
    assert stage(train_ref, args)[0] == 0
    for change in ("--data moved", "--data ./d", "--val ./v", "--init ./m", "--dtype float32"):
        code, out, err = stage(train_ref, f"{args} {change}")
        assert code == 0 and "validation loss" in out, err
    assert stage(train_ref, f"{args} --micro-batch-size 2")[0] == 0
    for change, said in (("--data w", "hash of data"), ("--init scratch", "hash of init")):
        code, _, err = stage(train_ref, f"{args} {change}")
        assert code == 2 and said in err


@pytest.mark.parametrize(
    "flags, is_the_same",
    [
        ("--score loss --k 0.5", False),
        ("--score loss --k 0.5 --scope sequence", True),
        ("--score loss --k 0.5 --scope batch", True),
        ("--score loss --k 0.5 --rank-windows 2", True),
        ("--score loss --k 1.0", True),
        ("--score loss --k 1.0:0.5@0.5", False),
        ("--score dft", True),
        ("--score of_mine", False),  # it may look at its group: it does not say that it does not
    ],
)
def test_the_micro_batch_belongs_to_a_run_where_it_is_ranked(
    stage, inputs, monkeypatch, flags, is_the_same
):
    monkeypatch.setitem(slm.SCORES, "of_mine", slm.Weight(lambda t: t.loss, needs=("loss",)))
    args = f"{STEPS} {flags} --out a"
    code, _, err = stage(train_slm, args)
    assert code == 0, err
    code, _, err = stage(train_slm, f"{args} --micro-batch-size 2")
    assert code == (0 if is_the_same else 2)
    assert ("windows ranked together 4 -> 2" in err) != is_the_same


def test_a_run_without_a_saved_state_may_be_changed(stage, inputs, monkeypatch):
    """It would begin again at its first step: there is nothing to lose but its log."""
    record_step = Run.record_step

    def interrupted(run, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        record_step(run, step, *rest)

    monkeypatch.setattr(Run, "record_step", interrupted)
    assert stage(train_ref, f"{STEPS} --out a")[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(inputs)
    assert len(log(inputs / "a")) == 2
    code, _, err = stage(train_ref, f"{STEPS} --out a --lr 2e-3")
    assert code == 0, err
    assert json.loads((inputs / "a/args.json").read_text())["lr"] == 2e-3
    assert [record["step"] for record in log(inputs / "a")] == [1, 2, 3, 4]


def test_a_finished_run_that_is_to_be_longer(stage, inputs):
    assert stage(train_ref, f"{STEPS} --out a")[0] == 0
    code, _, err = stage(train_ref, f"{STEPS} --out a --steps 6")
    assert code == 2 and "steps 4 -> 6" in err and "--init a --out ANOTHER" in err
    longer = f"{STEPS} --init a --out ANOTHER --steps 2"
    assert stage(train_ref, longer)[0] == 0
    code, _, err = stage(train_ref, f"{STEPS} --out a --steps 6 --lr 2e-3")
    assert code == 2 and "--init" not in err


def test_a_score_that_is_not_finite_is_named(stage, inputs, monkeypatch):
    endless = slm.Score(lambda t: t.loss * np.inf, needs=("loss",))
    monkeypatch.setitem(slm.SCORES, "endless", endless)
    code, _, err = stage(train_slm, f"{STEPS} --score endless --seed 0 --out a")
    assert code == 2 and "--score endless: 64 of 64 scores are not finite" in err
