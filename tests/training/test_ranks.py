"""Several ranks: the gradients of one process, and what FSDP2 gathers and holds (ranked.py)."""

import json
import os
import subprocess
import sys

import pytest

from common.errors import UserError
from conftest import HANGS, ROOT
from train_ref import arguments
from training.arguments import settle


def ranked(what, world):
    """What rank 0 of `world` says of ranked.py WHAT."""
    paths = [ROOT, ROOT / "tests", ROOT / "tests/training"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests/training/ranked.py"), what],
        capture_output=True,
        text=True,
        timeout=HANGS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("outcome: "))
    return json.loads(line.removeprefix("outcome: "))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_ddp_fsdp_and_hsdp_are_those_of_one_process(world):
    """In fp64, with accumulation, another weight for each micro-batch, and other numbers kept."""
    ranked("exact", world)


@pytest.mark.slow
def test_the_bf16_policy_is_as_near_to_fp32_as_autocast_on_one_device():
    errors = ranked("bfloat16", 2)
    assert errors["policy"]["worst"] < 1.1 * errors["autocast"]["worst"] < 0.05
    assert errors["policy"]["cosine"] > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_bf16_halves_what_is_gathered_and_no_whole_gradients_are_held(world):
    """Bytes a parameter and micro-batch: what is gathered once or twice, one reduction in fp32."""
    measured = ranked("bytes", world)
    outer, block = measured["outer"], (1 - measured["outer"]) / measured["blocks"]
    once = {"float32": outer + block, "bfloat16": outer + block, "always": outer, "never": 1}
    for name, share in once.items():
        size = 4 if name == "float32" else 2
        row = measured[name]
        assert row["gathered"] == pytest.approx(size * (2 - share), rel=0.01), name
        assert row["reduced"] == pytest.approx(4, rel=0.01)
        assert row["held"] == pytest.approx(4 / world, rel=0.01)


def test_resharding_is_fsdp_s():
    args = arguments("--data d --init m --out o --reshard-after-forward never".split())
    with pytest.raises(UserError, match="got never with --parallel ddp, wanted --parallel fsdp"):
        settle(args)


@pytest.mark.parametrize(
    "flags, world", [("--shard-size 2", 4), ("--parallel fsdp --shard-size 3", 4)]
)
def test_a_shard_size_that_cannot_be(flags, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = arguments(f"--data d --init m --out o --batch-size 8 {flags}".split())
    with pytest.raises(UserError, match=r"--shard-size: got . with .* and 4 ranks, wanted"):
        settle(args)
