"""Both trainers: k = 1 is plain, a batch may be cut up in any way, run folders, bad input."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_math
import methods
import score
import slm
import train_ref
import train_slm
from common import locks
from common.errors import UserError
from common.owned import LIST
from conftest import HANGS, builds_cpp, finish, finish_in_turn, launch, write_model, write_set
from data import TokenSet
from hf import checkpoint
from training import checkpoints
from training.meter import Meter
from training.optimizer import MOMENTS, clip_gradients, lr_at, make_optimizer
from training.run import Run
from training.selector import Choice, checked_mask

TINY = "--seq-len 16 --batch-size 4 --device cpu --threads 1"
SLM = f"--data d --val v --init m --ref-loss ref_loss.bin {TINY}"


@pytest.fixture(scope="module")
def made(vocabulary, tmp_path_factory):
    """Made once: a corpus d with labels, a validation set v, a model m, and the losses of r."""
    folder = tmp_path_factory.mktemp("made")
    write_set(folder / "d", vocabulary, 3000, kind=np.arange(3000) % 2)
    write_set(folder / "v", vocabulary, 300, seed=1)
    write_model(folder / "m", vocabulary)
    write_model(folder / "r", vocabulary, seed=5)
    args = "score.py --model r --data d --out ref_loss.bin --seq-len 16 --entropy --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", f"{args} --threads 1".split())
        score.main()
    locks.unlock(folder / "ref_loss.bin")
    return folder


@pytest.fixture
def inputs(made, tmp_path):
    """A copy, without the losses."""
    shutil.copytree(
        made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ref_*", LIST)
    )
    return tmp_path


@pytest.fixture
def scored(made, tmp_path):
    """A copy, with the losses of r."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def tensors(folder):
    return {
        name: tensor
        for path in checkpoint.weight_files(folder)
        for name, tensor in checkpoint.read_tensors(path)
    }


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a, b):
    a, b = tensors(a), tensors(b)
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)


def log(folder, drop=("tok_per_s", "seconds")):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def test_k_1_is_plain_training_bit_for_bit_and_reads_no_losses(stage, inputs):
    plain = f"--data d --val v --init m {TINY} --steps 12 --eval-every 4"
    assert stage(train_ref, plain + " --out a")[0] == 0
    assert stage(train_slm, plain + " --out b --k 1.0 --ref-loss does-not-exist.bin")[0] == 0
    assert same(inputs / "a", inputs / "b") and log(inputs / "a") == log(inputs / "b")


def test_reruns_are_bit_identical_and_seeds_differ(stage, scored):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert stage(train_slm, f"{SLM} --steps 8 --out {out} --seed {seed}")[0] == 0
    assert same(scored / "a", scored / "b") and not same(scored / "a", scored / "c")


@pytest.mark.parametrize(
    "flags",
    [
        "--k 1.0",
        "--k 0.6 --scope sequence",
        "--k 0.6 --scope batch",
        "--k 0.6 --scope batch --score ref_and",
        "--k 0.6 --scope batch --score random",
    ],
)
def test_one_micro_batch_equals_four(stage, scored, flags):
    assert stage(train_slm, f"{SLM} --steps 6 --out one {flags}")[0] == 0
    assert stage(train_slm, f"{SLM} --steps 6 --out four --micro-batch-size 1 {flags}")[0] == 0
    assert distance(scored / "one", scored / "four") < 1e-5
    counts = [[r["tokens_selected"] for r in log(scored / out)] for out in ("one", "four")]
    assert counts[0] == counts[1]


def test_micro_scope_ranks_within_each_micro_batch(stage, scored):
    """The kept sets differ from batch scope's: the equality above does not hold for it.

    Of 64 tokens 19 are kept, of 16 in each of four micro-batches 5.
    """
    assert stage(train_slm, f"{SLM} --steps 1 --seed 0 --out one --k 0.3")[0] == 0
    four = f"{SLM} --steps 1 --seed 0 --out four --micro-batch-size 1 --k 0.3"
    assert stage(train_slm, four)[0] == 0
    assert distance(scored / "one", scored / "four") > 1e-4
    counts = [log(scored / run)[-1]["tokens_selected"] for run in ("one", "four")]
    assert counts == [19, 20]


def test_learning_rates_of_a_schedule():
    """By hand: four steps of warm-up, then eight; cos(pi / 4) and cos(pi / 2)."""
    wanted = {
        "constant": [0.25, 1, 1, 1],
        "cosine": [0.25, 1, 0.868198, 0.55],
        "linear": [0.25, 1, 0.775, 0.55],
    }
    for schedule, rates in wanted.items():
        args = SimpleNamespace(lr=1.0, min_lr=0.1, warmup=4, steps=12, schedule=schedule)
        assert [lr_at(step, args) for step in (0, 3, 6, 8)] == pytest.approx(rates, abs=1e-6)


def test_gradients_are_clipped_to_a_norm_and_zero_leaves_them():
    module = torch.nn.Linear(2, 1, bias=False)
    for clip, norm in ((0.5, 0.5), (0.0, 5.0), (9.0, 5.0)):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(module, SimpleNamespace(clip=clip)) == pytest.approx(5.0)
        assert module.weight.grad.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("flags", ["", "--score ref_and", "--backward pruned"])
def test_the_micro_batch_is_a_matter_of_speed_where_the_ranked_windows_are_named(
    stage, scored, flags
):
    """Eight windows at a time, ranked by fours and by twos, as four and two at a time."""
    args = f"{SLM} --steps 4 --batch-size 8 {flags}"
    for n in (2, 4):
        alone = f"{args} --micro-batch-size {n} --out micro{n}"
        together = f"{args} --micro-batch-size 8 --rank-windows {n} --out rank{n}"
        for run in (alone, together):
            code, _, err = stage(train_slm, run)
            assert code == 0, err
        assert distance(scored / f"micro{n}", scored / f"rank{n}") < 1e-5
        counts = [
            [r["tokens_selected"] for r in log(scored / out)] for out in (f"micro{n}", f"rank{n}")
        ]
        assert counts[0] == counts[1]
    assert distance(scored / "rank2", scored / "rank4") > 1e-4


def test_one_step_by_hand(stage, scored):
    """One selective step against transformers, numpy and PyTorch's AdamW, from the stored files."""
    assert stage(train_slm, f"{SLM} --k 0.4 --steps 1 --warmup 0 --seed 0 --out one")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(scored / "m", dtype=torch.float32)
    data = TokenSet(scored / "d")
    windows = np.random.RandomState([0, 0]).permutation(data.n_windows(16))[:4]
    tokens, ref = (
        np.array(data.tokens, np.int64),
        np.fromfile(scored / "ref_loss.bin", "<f2").astype(np.float32),
    )
    x = torch.from_numpy(np.stack([tokens[w * 16 : w * 16 + 16] for w in windows]))
    y = torch.from_numpy(np.stack([tokens[w * 16 + 1 : w * 16 + 17] for w in windows]))
    losses = torch.nn.functional.cross_entropy(
        theirs(x).logits.flatten(0, 1), y.flatten(), reduction="none"
    )
    excess = (
        losses.detach().numpy()
        - np.stack([ref[w * 16 + 1 : w * 16 + 17] for w in windows]).flatten()
    )
    kept = np.sort(np.argsort(-excess, kind="stable")[: int(0.4 * 64 + 0.5)])
    losses[torch.from_numpy(kept)].mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    decay = [p for p in theirs.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    ).step()
    ours, record = tensors(scored / "one"), log(scored / "one")[1]
    for name, p in theirs.named_parameters():
        if name in ours:
            assert (ours[name] - p).norm() / p.norm() < 1e-5, name
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert abs(record["loss"] - losses.mean().item()) < 1e-5
    assert abs(record["loss_selected"] - losses[torch.from_numpy(kept)].mean().item()) < 1e-5
    assert abs(record["threshold"] - excess[kept].min()) < 1e-5
    assert (record["tokens_seen"], record["tokens_selected"]) == (64, 26)
    parity = np.stack([(np.arange(16) + w * 16 + 1) % 2 for w in windows]).flatten()
    for kind, name in enumerate(("even", "odd")):
        assert (
            abs(record["kept"][name] - (parity[kept] == kind).sum() / (parity == kind).sum()) < 1e-4
        )


@pytest.mark.parametrize(
    "score_name", ["excess", "loss", "random", "ref_loss", "ref_entropy", "ref_and", "ref_or"]
)
@pytest.mark.parametrize("scope", ["micro", "batch"])
def test_every_score_trains(stage, scored, score_name, scope):
    code, _, err = stage(
        train_slm,
        f"{SLM} --steps 3 --out s --score {score_name} --scope {scope} --micro-batch-size 2",
    )
    assert code == 0, err
    records = log(scored / "s")
    share = records[-1]["tokens_selected"] / records[-1]["tokens_seen"]
    low, high = {"ref_and": (0.2, 0.6), "ref_or": (0.6, 1.0)}.get(score_name, (0.59, 0.61))
    assert low <= share <= high and np.isfinite(records[-1]["grad_norm"])


def test_bfloat16_moments_are_adamw_with_rounded_moments():
    """Against AdamW's formulas in float64 whose moments are rounded to bfloat16 after each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(24, 40)
    optimizer = make_optimizer(
        model, SimpleNamespace(moments="bfloat16", weight_decay=0.1, lr=1e-2)
    )
    w, b = (p.detach().double() for p in (model.weight, model.bias))
    mine = [
        [w, torch.zeros_like(w), torch.zeros_like(w), 0.1],
        [b, torch.zeros_like(b), torch.zeros_like(b), 0.0],
    ]
    for t in range(1, 31):
        (model(torch.randn(8, 24)) - 1).square().mean().backward()
        for (p, m, v, decay), grad in zip(
            mine, (model.weight.grad.double(), model.bias.grad.double())
        ):
            m.mul_(0.9).add_(0.1 * grad)
            v.mul_(0.95).add_(0.05 * grad**2)
            p.mul_(1 - 1e-2 * decay).sub_(
                1e-2 * m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            )
            m.copy_(m.float().bfloat16()), v.copy_(v.float().bfloat16())
        optimizer.step()
        optimizer.zero_grad()
        if t == 15:  # saved and loaded
            optimizer.load_state_dict(optimizer.state_dict())
        assert all(
            s[name].dtype == torch.bfloat16
            for s in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )
    for p, (wanted, *_) in zip((model.weight, model.bias), mine):
        assert (p - wanted).abs().max() < 2e-4 and (p - wanted).abs().mean() < 1e-6


def test_fork_it_a_new_score_in_five_lines(stage, scored, monkeypatch):
    """README's "Fork it": a function and its entry, and the trainer takes it by name."""

    def middle(t):
        """Keep the tokens whose excess is nearest to zero."""
        return -(t.loss - t.ref_loss).abs()

    monkeypatch.setitem(slm.SCORES, "middle", slm.Score(middle, needs=("loss", "ref_loss")))
    code, _, err = stage(train_slm, f"{SLM} --steps 5 --out fork --score middle --k 0.5")
    assert code == 0, err
    record = log(scored / "fork")[-1]
    assert (
        abs(record["tokens_selected"] - record["tokens_seen"] / 2) <= 2.5
    )  # half a token of rounding a step
    assert stage(train_slm, f"{SLM} --steps 5 --out plain --k 0.5")[0] == 0
    assert not same(scored / "fork", scored / "plain")


def test_a_score_with_the_reference_s_entropy_gets_it_or_names_the_file(stage, scored, monkeypatch):
    sure = slm.Score(lambda t: t.loss - t.ref_entropy, needs=("loss", "ref_entropy"))
    monkeypatch.setitem(slm.SCORES, "sure", sure)
    args = f"{SLM} --steps 2 --score sure"
    assert stage(train_slm, f"{args} --out a")[0] == 0
    (scored / "ref_entropy.bin").unlink()
    code, _, err = stage(train_slm, f"{args} --out b")
    assert code == 2 and "ref_entropy.bin does not exist" in err and "--entropy" in err
    forgotten = slm.Score(lambda t: t.loss - t.ref_entropy, needs=("loss",))
    monkeypatch.setitem(slm.SCORES, "sure", forgotten)
    code, _, err = stage(train_slm, f"{args} --out c")
    assert code == 2 and "reads t.ref_entropy" in err and "needs=" in err


def test_loss_mask_makes_it_fine_tuning(stage, vocabulary, inputs):
    """Only unmasked targets carry loss, and the loss logged is theirs."""
    mask = (np.arange(640) % 4 == 0).astype(np.uint8)
    write_set(inputs / "f", vocabulary, 640, loss_mask=mask)
    args = f"--data f --init m --out a {TINY} --seed 0 --steps 2 --eval-every 0"
    assert stage(train_ref, args)[0] == 0
    records = log(inputs / "a")
    record = records[-1]
    assert record["tokens_seen"] == 2 * 64 and record["tokens_selected"] == 2 * 16
    tokens = np.array(TokenSet(inputs / "f").tokens, np.int64)
    windows = np.random.RandomState([0, 0]).permutation(40)[:4]
    x, y = (np.stack([tokens[w * 16 + i : w * 16 + i + 16] for w in windows]) for i in (0, 1))
    targets = np.stack([mask[w * 16 + 1 : w * 16 + 17] for w in windows]).astype(bool).flatten()
    theirs = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)
    logits = theirs(torch.from_numpy(x)).logits.flatten(0, 1)[targets]
    wanted = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).flatten()[targets])
    first = next(r for r in records if r["step"] == 1)
    assert first["loss"] == first["loss_selected"] == pytest.approx(wanted.item(), abs=1e-5)


def test_learns_and_writes_a_folder_that_transformers_opens(stage, inputs):
    assert (
        stage(
            train_ref,
            f"--data d --val v --init scratch --d-model 32 --n-head 2 --out a {TINY} --lr 1e-2 "
            "--steps 60 "
            "--eval-every 20 --snapshots 3",
        )[0]
        == 0
    )
    records = log(inputs / "a")
    validation = [r["val_loss"] for r in records if "val_loss" in r]
    assert [r["step"] for r in records] == list(range(61)) and validation[-1] < validation[0] - 0.2
    summary = json.loads((inputs / "a/summary.json").read_text())
    assert (
        summary["tokens_seen"] == records[-1]["tokens_seen"]
        and summary["val_loss"] == validation[-1]
    )
    assert [p.name for p in sorted(inputs.glob("a/step-*"))] == ["step-000020", "step-000040"]
    for folder in ("a", "a/step-000040"):
        x = torch.arange(20)[None]
        theirs = AutoModelForCausalLM.from_pretrained(inputs / folder, dtype=torch.float32)
        with torch.no_grad():
            assert (
                theirs(x).logits - checkpoint.load(inputs / folder).logits(x)
            ).abs().max() < 1e-4
    # the validation loss is the mean over every target, window by window
    total = []
    tokens = torch.from_numpy(np.array(TokenSet(inputs / "v").tokens, np.int64))
    theirs = AutoModelForCausalLM.from_pretrained(inputs / "a", dtype=torch.float32)
    for start in range(0, 299, 16):
        x, y = tokens[start : min(start + 16, 299)], tokens[start + 1 : start + 17]
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(
                theirs(x[None]).logits[0], y, reduction="none"
            ).tolist()
    assert len(total) == 299 and abs(np.mean(total) - summary["val_loss"]) < 1e-5


def test_a_state_without_its_arguments_is_not_taken_for_another_run_s(stage, inputs):
    args = f"--data d --init m {TINY} --steps 3 --out a"
    assert stage(train_ref, args)[0] == 0
    (inputs / "a/args.json").unlink()
    code, _, err = stage(train_ref, f"{args} --lr 5e-4")
    assert code == 2 and "a holds the state of a run, but not its args.json; start over" in err
    assert stage(train_ref, f"{args} --overwrite")[0] == 0


def test_run_folders(stage, inputs):
    args = f"--data d --init m {TINY} --steps 3"
    assert stage(train_ref, f"{args} --out a")[0] == 0
    code, out, _ = stage(train_ref, f"{args} --out a")  # finished: shows its summary at once
    assert code == 0 and re.search(r" \d+ tokens read, \d+ selected, ", out), "counts are whole"
    code, _, err = stage(train_ref, f"{args} --out a --lr 5e-4")
    assert code == 2 and "lr 0.001 -> 0.0005" in err and "--overwrite" in err
    problems = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(3)]
    (inputs / "test.jsonl").write_text("\n".join(problems))
    again = f"{args} --out a --overwrite --snapshots 2"
    assert stage(train_ref, again)[0] == 0
    for folder in ("a", "a/step-000002"):
        assert stage(eval_math, f"--model {folder} --tasks test.jsonl --max-new-tokens 2")[0] == 0
    ours = {path: path.read_bytes() for path in inputs.glob("a/**/eval/*")}
    assert len(ours) == 2 * 4, "test.jsonl, results.json, results.md, the list of what is ours"
    mine = ["notes.txt", "summary.md", "log.md", "eval/mine.jsonl", "step-000002/mine.txt"]
    for name in mine:
        (inputs / "a" / name).write_text("years of work")
    assert stage(train_ref, f"{args} --out a --overwrite --lr 5e-4")[0] == 0
    assert [name for name in mine if (inputs / "a" / name).read_text() != "years of work"] == []
    left = [path.name for path in ours if path.exists()]
    assert left == [LIST] * len(left) and not list(inputs.glob("a/step-*/config.json"))
    assert not (inputs / "a/.before").exists()
    assert len(log(inputs / "a")) == 3
    (inputs / "mine").mkdir()
    (inputs / "mine/thesis.tex").write_text("years of work")
    code, _, err = stage(train_ref, f"{args} --out mine --overwrite")
    assert code == 2 and "not a run of this kit" in err and (inputs / "mine/thesis.tex").exists()


def test_a_kill_within_the_first_line_of_a_folders_list(stage, inputs):
    (inputs / "a").mkdir()
    (inputs / "a" / LIST).write_text("files that slm-k")
    assert stage(train_ref, f"--data d --init m --out a {TINY} --steps 1")[0] == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--k 0", "--k: got 0,"),
        ("--k 60", "--k: got 60,"),
        ("--k nan", "--k: got nan"),
        ("--steps 0", "--steps: got 0"),
        ("--batch-size 3 --micro-batch-size 2", "--batch-size: got 3"),
        ("--steps 3 --epochs 1", "either --steps or --epochs"),
        ("--lr nan", "--lr: got nan"),
        ("--lr -1", "--lr: got -1,"),
        ("--data nowhere", "nowhere is not a folder"),
        ("--init nowhere", "nowhere"),
        ("--val nowhere", "nowhere"),
        ("--ref-loss nowhere.bin", "nowhere.bin does not exist; make it with python score.py"),
        ("--seq-len 0", "--seq-len: got 0"),
        ("--seq-len 32", "has windows of 16, this run has 32; make others with"),
        ("--clip -1", "--clip: got -1,"),
        ("--init scratch --n-head 5", "--n-head 5"),
        ("--init scratch --n-head 0", "--n-head: got 0"),
        ("--init scratch --n-kv-head -2", "--n-kv-head: got -2"),
        ("--init scratch --revision v1", "--revision: got v1 with --init scratch, wanted a hub id"),
        ("--n-layer 3", "--n-layer: got 3 with --init m, which brings its own shape"),
        ("--rope-theta 500", "--rope-theta: got 500.0 with --init m, which brings its own shape"),
        ("--init scratch --rope-theta 0", "--rope-theta: got 0, wanted a number above 0"),
        ("--qk-norm", "--qk-norm: got True with --init m, which brings its own shape"),
        ("--seed -1", "--seed: got -1"),
        ("--rank-windows 3", "--rank-windows: got 3 with --scope micro and --micro-batch-size 4"),
        ("--rank-windows 2 --scope batch", "wanted --scope micro and a divisor"),
        ("--threads -1", "--threads: got -1"),
        ("--device meta", "not a device that the kit runs on"),
        ("--dtype bfloat16", "has the precision float32, this run has bfloat16; make others"),
    ],
)
def test_bad_arguments_are_one_line(stage, scored, flags, message):
    code, _, err = stage(
        train_slm, f"{SLM} --out a {'' if '--steps' in flags else '--steps 2'} {flags}"
    )
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and not (scored / "a").exists()


def test_without_a_start_or_with_endless_epochs(stage, inputs):
    for flags, message in (
        ("", "--init: got none"),
        ("--init m --epochs inf", "--epochs: got inf"),
    ):
        code, _, err = stage(train_ref, f"--data d --out a {TINY} {flags}")
        assert code == 2 and message in err and not (inputs / "a").exists()


def test_a_run_that_saved_nothing_may_be_changed(stage, inputs, monkeypatch):
    """Out of memory at the first step: the advice, a smaller micro-batch, must be possible."""

    def out_of_memory(*args):
        raise MemoryError

    args = f"--data d --init m --out a {TINY} --steps 2"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "record_step", out_of_memory)
        code, _, err = stage(train_ref, args)
    assert code == 2 and "--micro-batch-size" in err
    assert stage(train_ref, f"{args} --micro-batch-size 1")[0] == 0
    assert json.loads((inputs / "a/args.json").read_text())["micro_batch_size"] == 1


def test_losses_of_another_corpus_or_length_are_refused(stage, scored, vocabulary):
    write_set(scored / "e", vocabulary, 3000, seed=9)
    code, _, err = stage(train_slm, SLM.replace("--data d", "--data e") + " --out a --steps 2")
    assert code == 2 and "has losses of token set" in err
    # The command makes others beside them: these may be another run's.
    assert stage(score, err.split("python score.py ")[1])[0] == 0
    kept = ["ref_loss.bin", "ref_loss-2.bin"]
    assert [TokenSet(scored / name).hash for name in "de"] == [
        json.loads((scored / name).with_suffix(".json").read_text())["data"] for name in kept
    ]
    with open(scored / "ref_loss.bin", "ab") as file:
        file.write(b"\0\0")
    code, _, err = stage(train_slm, SLM + " --out a --steps 2")
    assert code == 2 and "size in bytes" in err


def test_a_corpus_shorter_than_a_window_is_padded(stage, vocabulary, inputs):
    write_set(inputs / "s", vocabulary, 5)
    assert stage(train_ref, f"--data s --init m --out a {TINY} --steps 1")[0] == 0
    assert (
        log(inputs / "a")[0]["tokens_seen"] == 4 * 4
    )  # one window of 4 targets, four times in the batch
    write_set(inputs / "e", vocabulary, 1)
    code, _, err = stage(train_ref, f"--data e --init m --out b {TINY} --steps 1")
    assert code == 2 and "no target" in err


def test_another_vocabulary_is_refused(stage, scored):
    from hf import tokenizer

    write_model(scored / "other", tokenizer.train_bpe(["zebra quagga okapi " * 20], 290))
    code, _, err = stage(train_slm, SLM.replace("--init m", "--init other") + " --out a --steps 1")
    assert code == 2 and "vocabulary" in err


def test_a_loss_that_explodes_stops_before_the_update(stage, inputs, vocabulary):
    model = write_model(inputs / "hot", vocabulary)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    checkpoint.save(model, inputs / "hot")
    code, _, err = stage(train_ref, f"--data d --init hot --out a {TINY} --steps 3")
    assert (
        code == 2 and "gradient norm is nan" in err and not (inputs / "a/train_state.pt").exists()
    )


def test_disk_full_is_one_line(stage, inputs):
    """A limit on file size stands in for a full disk: the state does not fit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # Python ignores SIGXFSZ
    try:
        code, _, err = stage(train_ref, f"--data d --init m {TINY} --steps 5 --out a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "Traceback" not in err and "error:" in err, err


SELECTIONS = (
    "--k 1.0",
    "--scope micro",
    "--scope sequence",
    "--scope batch",
    "--scope micro --data sparse",
    "--scope batch --data sparse",
)


@pytest.mark.parametrize(
    "ranks, parallel",
    [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "fsdp --shard-size 2")],
)
@pytest.mark.slow
def test_ranks_agree(stage, scored, vocabulary, ranks, parallel):
    """With one rank, and one window per micro-batch so that the list of them is the same.

    `sparse`: three windows of four have no valid target, the others one or two, so that most ranks
    have nothing to learn from.
    """
    mask = np.zeros(3000, np.uint8)
    mask[5::64] = mask[7::128] = 1
    write_set(scored / "sparse", vocabulary, 3000, kind=np.arange(3000) % 2, loss_mask=mask)
    args = f"{SLM} --steps 4 --micro-batch-size 1"
    finish_in_turn(f"train_slm.py {args} --parallel {parallel}", SELECTIONS, scored, ranks)
    for number, flags in enumerate(SELECTIONS):
        assert stage(train_slm, f"{args} {flags} --out one{number}")[0] == 0
        one, several = scored / f"one{number}", scored / f"ranks{number}"
        assert distance(one, several) < 1e-5, flags
        counts = [[record["tokens_selected"] for record in log(run)] for run in (one, several)]
        assert counts[0] == counts[1], flags
        for ours, theirs in zip(log(one), log(several)):
            for name in ("loss", "loss_selected", "threshold", "grad_norm", "val_loss"):
                if ours.get(name) is not None:
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@builds_cpp
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_blocks_under_ddp_and_fsdp(scored, parallel):
    """What the recipes do on GPUs: blocks compiled, hooks around, another number kept each step."""
    args = f"train_slm.py {SLM} --steps 4 --micro-batch-size 2 --scope sequence"
    for run in [
        launch(f"{args} --out one", scored),
        launch(f"{args} --out ranks2 --compile on --parallel {parallel}", scored, ranks=2),
    ]:
        finish(run)
    assert distance(scored / "one", scored / "ranks2") < 1e-5


@pytest.mark.slow
@builds_cpp
def test_compiled_blocks_under_bf16_autocast(stage, scored):
    """What runs on a GPU by default. A CPU rounds at other places once blocks are compiled."""
    args = f"{SLM} --steps 4 --score loss --dtype bfloat16 --micro-batch-size 2"
    for name in ("on", "off"):
        assert stage(train_slm, f"{args} --compile {name} --out {name}")[0] == 0
    counts = [[record["tokens_selected"] for record in log(scored / run)] for run in ("on", "off")]
    assert counts[0] == counts[1]
    assert 0 < distance(scored / "on", scored / "off") < 1e-3


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said_in_one_line(inputs):
    """Torch in a folder with a space in its name: its C++ build does not quote that."""
    packages = inputs / "my packages"
    packages.symlink_to(Path(torch.__file__).parents[1])
    args = f"train_ref.py --data d --val v --init m {TINY} --steps 2 --compile on --out a"
    fresh = {"PYTHONPATH": str(packages), "TORCHINDUCTOR_CACHE_DIR": str(inputs / "cache")}
    process = launch(args, inputs, env={**os.environ, **fresh})
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 2, out
    assert "Traceback" not in out
    last = out.splitlines()[-1]
    assert last.startswith("error: torch.compile cannot build this model here")
    assert "--compile off runs without" in last
    if shutil.which("g++"):
        assert "no space in torch's own folder" in last


@pytest.mark.slow
def test_bfloat16_moments_under_fsdp(scored):
    args = f"train_slm.py {SLM} --steps 4 --micro-batch-size 1 --parallel fsdp --moments bfloat16"
    for run in [
        launch(f"{args} --out one", scored),
        launch(f"{args} --out ranks2", scored, ranks=2),
    ]:
        finish(run)
    assert (
        distance(scored / "one", scored / "ranks2") < 1e-3
    )  # a rounding to bfloat16 may go the other way
    state = torch.load(scored / "one/train_state.pt", weights_only=True)["optimizer"]["state"]
    kinds = {moments[name].dtype for moments in state.values() for name in MOMENTS}
    assert kinds == {torch.bfloat16}
    described = checkpoints.Reader(scored / "ranks2/state-000004").read_metadata()
    kinds = {
        tensor.properties.dtype
        for name, tensor in described.state_dict_metadata.items()
        if name.endswith(MOMENTS)
    }
    assert kinds == {torch.bfloat16}


def test_a_validation_set_of_another_tokenizer_is_refused(stage, inputs):
    meta = json.loads((inputs / "v/meta.json").read_text())
    (inputs / "v/meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    code, _, err = stage(train_ref, f"--data d --val v --init m --out a {TINY} --steps 2")
    assert code == 2 and "its tokenizer is not that of --data d" in err


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(
    "name, said",
    [
        ("excess", "2 of 3 scores of a batch are not finite"),
        ("document", "2 of 3 scores of a batch are not finite"),
        ("ref_and", "2 of 3 scores of a batch are not finite"),
        ("twofold", "3 of 3 weights of a batch are below 0 or not finite"),
    ],
)
def test_scores_that_are_wrong_stop_the_run_on_any_device(name, said, settled, monkeypatch):
    """slm.py looks on a CPU alone; the meter looks once a step. Here slm.py does as on a GPU."""
    for module in (slm, methods):
        monkeypatch.setattr(module, "refuse_not_finite", lambda scores, valid: None)
    monkeypatch.setattr(slm, "weights_of", lambda values, valid: values.clamp(min=0).nan_to_num())
    monkeypatch.setitem(slm.SCORES, "twofold", slm.Weight(lambda t: 2 * t.loss, needs=("loss",)))
    losses = torch.tensor([[-1.0, torch.nan, torch.inf, torch.nan]])
    valid = torch.tensor([[True, True, True, False]])
    zero = torch.zeros(1, 4)
    ref_loss = -losses if name == "ref_and" else zero
    known = {"loss": losses, "base_loss": losses, "ref_loss": ref_loss, "ref_entropy": zero}
    tokens = slm.Tokens(**known, document=zero.long())
    selection = slm.Selection(1.0 if name == "twofold" else 0.5, name)
    choice = Choice(selection, tokens, valid)
    if settled:
        choice = Choice(selection, tokens, valid, *checked_mask(selection, tokens, valid)[1:])
    kept = choice.keep(losses)
    meter = Meter(SimpleNamespace(device="cpu", world=1, total=lambda sums: sums), None)
    meter.add(zero, valid, kept, scores=choice.ranked(), wrong=choice.wrong)
    with pytest.raises(UserError, match=said):
        meter.read()


def test_document_masks_are_the_same_in_every_stage_or_refused(stage, inputs):
    scores = "--model r --data d --seq-len 16 --device cpu --threads 1"
    assert stage(score, f"{scores} --out masked.bin --document-mask")[0] == 0
    assert stage(score, f"{scores} --out plain.bin")[0] == 0
    masked, plain = (np.fromfile(inputs / f"{name}.bin", "<f2") for name in ("masked", "plain"))
    assert not np.array_equal(masked, plain, equal_nan=True)
    slm = f"--data d --init m {TINY} --steps 2 --k 0.6"
    for losses, flag, said in (("plain", " --document-mask", "False"), ("masked", "", "True")):
        code, _, err = stage(train_slm, f"{slm} --ref-loss {losses}.bin --out a{flag}")
        assert code == 2 and f"has the document mask {said}" in err
        assert ("--document-mask" in err) == bool(flag)
    command = f"{slm} --ref-loss masked.bin --document-mask"
    assert stage(train_slm, f"{command} --out a")[0] == 0
    assert stage(train_slm, f"{command} --out b --backward pruned")[0] == 0
    assert record_of(inputs / "a")["document_mask"] is True


def record_of(folder):
    return json.loads((folder / "args.json").read_text())
