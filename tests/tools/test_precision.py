"""tools.precision: counted by hand, and rounding seen where it is and not where it is not."""

import json

import pytest
import torch

from conftest import write_model, write_set
from tools import precision


def test_what_differs_and_what_is_lost_by_hand():
    """Two groups of four, the half is kept: one of four kept tokens is exchanged, for one nat."""
    exact = torch.tensor([[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 0.0, 0.0]])
    found = torch.tensor([[4.0, 1.5, 2.0, 1.0], [9.0, 7.0, 0.0, 0.0]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    row = precision.compare(exact, found, valid, 0.5, micro_batch_size=1)
    assert row["differ"] == 1 / 4
    assert row["lost"] == 1 / 4
    assert row["error_sd"] == pytest.approx((found - exact).std().item())
    valid[0, 2] = False  # now the first group keeps two of three, whatever their order
    assert precision.compare(exact, found, valid, 0.5, micro_batch_size=1)["differ"] == 0
    # ranked together, the two groups keep 8, 7, 4 and 3 of seven: rounding exchanges none
    assert precision.compare(exact, found, valid, 0.5, micro_batch_size=2)["differ"] == 0


@pytest.mark.slow
def test_a_table_for_this_machine(stage, tmp_path, vocabulary):
    write_set(tmp_path / "d", vocabulary, 3000)
    write_model(tmp_path / "m", vocabulary)
    write_model(tmp_path / "r", vocabulary, seed=5)
    models = "--model m --reference r --data d --device cpu --threads 1"
    code, out, err = stage(precision, f"{models} --seq-len 64 --windows 40 --json p.json")
    assert code == 0, err
    assert out.startswith("2,560 tokens, 8 windows ranked together")
    rows = json.loads((tmp_path / "p.json").read_text())
    assert list(rows) == ["float32", "bfloat16", "bfloat16, logits as well"]
    fp32, bf16, rounded = rows.values()
    assert 0 < fp32["error_sd"] < 2**-9  # losses near 6 in fp16: steps of 2^-8, at most half off
    assert fp32["error_sd"] < bf16["error_sd"] < rounded["error_sd"]
    assert fp32["differ"] < bf16["differ"] < 0.4
    code, _, err = stage(precision, f"{models} --k 1.0")
    assert code == 2 and "--k: got 1, wanted less" in err
