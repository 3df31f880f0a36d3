"""tools/bench.py: its rows do what they say, its numbers are consistent, and both agree with what can be counted."""

import json
import subprocess
import sys

from common.device import Env

import numpy as np
import pytest
import torch

from common.errors import cli
from conftest import ROOT
from tools.bench import __main__ as bench
from tools.bench import rows as bench_rows

SHAPE = "--preset demo --seq-len 16 --batch-size 2 --repeats 2 --device cpu --threads 1"


def prepared(what="train"):
    args = bench.arguments(f"{what} {SHAPE}".split())
    return args, Env(args)


@pytest.mark.parametrize("row", bench.ROWS)
def test_every_row_is_a_step(row, tmp_path):
    """Training rows change weights, `forward` and `score` do not; selective ones keep k of the tokens."""
    args, env = prepared()
    rows = bench_rows.Rows(args, env, tmp_path)
    model = (
        rows.theirs("student")[0]
        if row in ("clm_transformers", "slm_usual")
        else rows.ours("full")[0].lm
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows.step(row)()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ([] if row in ("forward", "score") else list(before))
    if row == "score":
        scored = np.fromfile(tmp_path / "ref_loss.bin", "<f2")
        assert (
            np.isnan(scored[0])
            and np.isfinite(scored[1:]).all()
            and len(scored) == bench_rows.SCORED * 32 + 1
        )


def test_exact_rows_take_the_same_step(tmp_path):
    after = []
    for row in ("slm_full", "slm_kept", "slm_lean"):
        args, env = prepared()
        rows = bench_rows.Rows(args, env, tmp_path)
        rows.step(row)()
        after.append(torch.cat([p.detach().flatten() for p in rows.ours("full")[0].parameters()]))
    assert all((a - after[0]).abs().max() < 1e-6 for a in after)


def test_ratios_are_taken_round_by_round():
    assert bench.ratio([2.0, 3.0, 10.0], [1.0, 2.0, 5.0]) == (2.0, 1.5, 2.0)


def test_memory_counts_what_a_step_allocates(monkeypatch):
    """A row that only holds 64 MB for a moment: that is its activation memory, measured as every row's is."""
    args, env = prepared()

    def hold(self):
        torch.ones(64 << 18)
        self.ours("full")

    monkeypatch.setattr(bench_rows.Rows, "forward", hold)
    assert 60e6 < bench_rows.memory_of("forward", args, env)["activation_bytes"] < 80e6


@pytest.mark.slow
def test_the_command_writes_the_table_and_its_json(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench",
            "train",
            "score",
            "loader",
            *SHAPE.split(),
            "--rows",
            "clm,slm_kept,forward",
            "--json",
            str(tmp_path / "b.json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "b.json").read_text())
    assert (
        list(results["train"]) == ["clm", "slm_kept", "forward"]
        and results["machine"] in done.stdout
    )
    for row in results["train"].values():
        assert (
            row["tok_per_s"] == pytest.approx(32 / row["step_s"])
            and row["low"] <= row["ratio"] <= row["high"]
        )
        assert row["peak_memory_bytes"] > row["activation_bytes"]
    assert results["train"]["clm"]["ratio"] == 1 and 0 < results["loader"]["share_of_step"] < 1
    assert results["score"]["share_of_forward"] > 0


def test_a_row_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *f"train --rows clm,fast {SHAPE}".split()])
    with pytest.raises(SystemExit) as stop:
        cli(bench.main)
    assert stop.value.code == 2 and "--rows: got fast" in capsys.readouterr().err
