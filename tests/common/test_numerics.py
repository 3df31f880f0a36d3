"""The record of what rounding depends on: what is in it, what is refused and what is only said."""

import json
from types import SimpleNamespace

import pytest
import torch

from common import numerics

CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, world=1)


def record(**changes):
    args = SimpleNamespace(compile="auto")
    return {**numerics.numerics(args, CPU, micro_batch=4), "data": "1f", "seq_len": 128, **changes}


def test_the_record_holds_what_it_should_and_is_json():
    made = record()
    assert json.loads(json.dumps(made)) == made
    assert made["dtype"] == "float32"
    assert made["torch"] == torch.__version__
    assert made["device"].startswith("cpu, ")
    assert (made["compile"], made["document_mask"], made["micro_batch"]) == (False, False, 4)
    assert set(made) == {*numerics.REFUSED, *numerics.SAID}


@pytest.mark.parametrize(
    "world, parallel, expected",
    [(1, "fsdp", "float32"), (2, "ddp", "float32"), (2, "fsdp", "bfloat16")],
)
def test_what_embedding_and_norms_are_rounded_to(world, parallel, expected):
    env = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, world=world)
    args = SimpleNamespace(compile="auto", parallel=parallel)
    assert numerics.numerics(args, env, micro_batch=4)["norms"] == expected


@pytest.mark.parametrize(
    "flag, device, expected",
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("on", "cpu", True),
        ("off", "cuda", False),
    ],
)
def test_whether_blocks_are_compiled(flag, device, expected):
    env = SimpleNamespace(device=torch.device(device))
    assert numerics.is_compiled(SimpleNamespace(compile=flag), env.device) is expected


@pytest.mark.parametrize(
    "name, value",
    [("data", "2e"), ("seq_len", 256), ("dtype", "bfloat16"), ("document_mask", True)],
)
def test_losses_of_another_kind_are_refused(name, value):
    saved = record()
    now = record(**{name: value})
    assert numerics.differences(saved, now, numerics.REFUSED) == [(name, saved[name], value)]
    assert numerics.notice("r.bin", saved, now) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("device", "NVIDIA H100"),
        ("compile", True),
        ("attention", "flex"),
        ("norms", "bfloat16"),
        ("micro_batch", 8),
        ("torch", "2.8.0"),
    ],
)
def test_another_rounding_is_said_in_one_line(name, value):
    saved = record()
    now = record(**{name: value})
    assert numerics.differences(saved, now, numerics.REFUSED) == []
    line = numerics.notice("r.bin", saved, now)
    assert f"{numerics.SAID[name]} {saved[name]} -> {value}" in line and "\n" not in line


def test_records_of_before_and_equal_ones_say_nothing():
    assert numerics.notice("r.bin", record(), record()) is None
    old = {"data": "1f", "seq_len": 128, "dtype": "float32"}
    assert numerics.notice("r.bin", old, record()) is None
    assert numerics.notice("r.bin", {**old, "norms": None}, record()) is None
    masked = record(document_mask=True)
    assert numerics.differences(old, record(), numerics.REFUSED) == []
    assert numerics.differences(old, masked, numerics.REFUSED) == [("document_mask", False, True)]
