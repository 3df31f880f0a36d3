"""tools.bench: its rows do what they say, and its numbers agree with what can be counted."""

import json
import os
import subprocess
import sys

from common.device import Env

import numpy as np
import pytest
import torch

from common.errors import cli
from conftest import ROOT
from tools.bench import __main__ as bench
from tools.bench import memory, timing
from tools.bench import rows as bench_rows

SHAPE = "--preset demo --seq-len 16 --batch-size 2 --repeats 2 --device cpu --threads 1"


def prepared():
    args = bench.arguments(f"train {SHAPE}".split())
    return args, Env(args)


# What is divided by is known from masks, stored values, losses (a number, a sum), or all targets.
METHODS = ("entropy", "document", "ent", "mile", "deft")


@pytest.mark.parametrize("row", [*bench_rows.ROWS, *METHODS])
def test_every_row_is_a_step(row, tmp_path):
    """Training rows change all weights, `forward` and `score` change none."""
    args, env = prepared()
    rows = bench_rows.Rows(args, env, tmp_path)
    if row in ("clm_transformers", "slm_usual"):
        model = rows.theirs("student")[0]
    else:
        model = rows.ours("full")[0].lm
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows.step(row)()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ([] if row in ("forward", "score") else list(before))
    if row == "score":
        scored = np.fromfile(tmp_path / "ref_loss.bin", "<f2")
        assert len(scored) == bench_rows.SCORED * 2 * 16 + 1
        assert np.isnan(scored[0])
        assert np.isfinite(scored[1:]).all()


def test_forms_share_their_parameters_and_nothing_else(tmp_path):
    """What one form sets in its blocks reaches no other form's, whichever was made last."""
    args, env = prepared()
    rows = bench_rows.Rows(args, env, tmp_path)
    forms = {(head, backward) for head, backward, _ in bench_rows.OURS.values()}
    modules = {form: rows.ours(*form)[0] for form in forms}
    for module in modules.values():
        assert {*module.parts} <= {*module.modules()}
        assert {*module.parameters()} == {*modules["full", "exact"].parameters()}
    assert not modules["full", "exact"].parts
    assert 0 < len(modules["kept", "exact"].parts) < len(modules["kept", "pruned"].parts)


def test_memory_is_measured_as_it_is_planned(monkeypatch, capsys):
    """Each case's settings reach both sides; test_plan.py compares real numbers."""
    args = bench.arguments(f"memory {SHAPE}".split())
    monkeypatch.setattr(memory, "CASES", [("demo", 2, 16, "slm_lean", True)])
    asked = []

    def measured(row, args):
        asked.append((row, args.preset, args.batch_size, args.seq_len, args.checkpointing))
        return {"peak_memory_bytes": 10**9}

    monkeypatch.setattr(memory, "memory_in_own_process", measured)
    (found,) = memory.bench_memory(args, Env(args)).values()
    assert asked == [("slm_lean", "demo", 2, 16, True)]
    n = 270_912
    assert 16 * n < found["planned_bytes"] < 24 * n
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| SLM, lean, checkpointing |") and "1.00 GB" in row


def test_exact_rows_take_the_same_step(tmp_path):
    """As a whole: Adam's step on a weight whose gradient is all but 0 is rounding's doing."""
    steps = []
    for row in ("slm_full", "slm_kept", "slm_lean", "excess"):
        args, env = prepared()
        rows = bench_rows.Rows(args, env, tmp_path)
        before = weights_of(rows)
        rows.step(row)()
        steps.append(weights_of(rows) - before)
    assert steps[0].norm() > 0
    for step in steps:
        assert (step - steps[0]).norm() < 1e-3 * steps[0].norm()


def weights_of(rows):
    return torch.cat([p.detach().flatten() for p in rows.ours("full")[0].parameters()])


def test_ratios_are_taken_round_by_round():
    assert timing.ratio([2.0, 3.0, 10.0], [1.0, 2.0, 5.0]) == (2.0, 1.5, 2.0)


def test_every_round_calls_each_and_the_warm_up_does_not_count():
    args, env = prepared()
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(runs, args, env)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] * 3
    assert len({tuple(each) for each in rounds}) > 1


def test_memory_counts_what_a_step_allocates(monkeypatch):
    """A row that only holds 67 MB for a moment: that is its activation memory."""
    args, env = prepared()

    def hold(self):
        torch.ones(64 << 18)
        self.ours("full")

    monkeypatch.setattr(bench_rows.Rows, "forward", hold)
    assert 60e6 < bench_rows.memory_of("forward", args, env)["activation_bytes"] < 80e6


@pytest.mark.slow
def test_the_command_writes_the_table_and_its_json(tmp_path):
    flags = f"train score loader {SHAPE} --rows clm,slm_kept,forward".split()
    file = tmp_path / "b.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", *flags, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert list(results["train"]) == ["clm", "slm_kept", "forward"]
    assert results["machine"] in done.stdout
    for row in results["train"].values():
        assert row["tok_per_s"] == pytest.approx(32 / row["step_s"])
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["peak_memory_bytes"] > row["activation_bytes"]
    assert results["train"]["clm"]["ratio"] == 1
    assert results["loader"]["share_of_step"] > 0
    assert results["score"]["share_of_forward"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rows clm,fast", "--rows: got fast"),
        ("--k 0", "--k: got 0, wanted a share above 0"),
        ("--repeats 0", "--repeats: got 0"),
        ("--sizes 0", "--sizes: got 0"),
    ],
)
def test_refused_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *f"train {SHAPE} {flags}".split()])
    with pytest.raises(SystemExit) as stop:
        cli(bench.main)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_saves_are_timed_on_two_ranks():
    words = (
        "--nproc-per-node 2 --standalone -m tools.bench.saves --preset demo --device cpu --saves 1"
    )
    command = [sys.executable, "-m", "torch.distributed.run", *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in ("| ranks | 2, fsdp |", "| stands still, gathered |", "| stands still, sharded |"):
        assert row in done.stdout
