"""`--moments int8`: AdamW's formulas, states that go on exactly, on any number of ranks."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from test_ranks import ranked
from test_train import TINY, log, same

import train_ref
from common.errors import UserError
from conftest import finish, launch, write_model, write_set
from killed import killed
from tools.plan.memory import moments_of
from training import checkpoints, moments
from training.moments import MOMENTS, block_size, moment_bytes
from training.optimizer import make_optimizer

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao"
)
REF = f"--data d --init m {TINY} --micro-batch-size 1 --moments int8"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    """Of the model's matrices the embedding (287, 32) and those of the MLP (32 x 160) are coded."""
    write_set(tmp_path / "d", vocabulary, 3000)
    write_model(tmp_path / "m", vocabulary, intermediate_size=160)
    return tmp_path


def test_without_torchao_it_is_one_line_that_says_what_to_install(stage, inputs, monkeypatch):
    monkeypatch.setattr(moments.importlib.util, "find_spec", lambda name: None)
    code, _, err = stage(train_ref, f"{REF} --steps 2 --out a")
    assert code == 2 and err.strip().endswith("pip install torchao")
    assert len(err.strip().splitlines()) == 1 and not (inputs / "a").exists()
    with pytest.raises(UserError, match="pip install torchao"):
        make_optimizer(torch.nn.Linear(4, 4), SimpleNamespace(moments="int8", lr=1, weight_decay=0))


@pytest.mark.parametrize(
    "shape, block",
    [
        ((2048, 2048), 256),
        ((5632, 2048), 256),
        ((2048, 5632), 256),
        ((49152, 576), 192),  # SmolLM2's width: no block crosses a row
        ((512, 96), 96),  # the demo's
        ((2048, 61), 61),
        ((2048, 2 * 31), 62),
        ((2048, 257), None),  # a prime
        ((2048, 16), None),
        ((63, 64), None),  # small
        ((4096,), None),  # a norm's weights
    ],
)
def test_blocks_lie_within_a_row(shape, block):
    assert block_size(shape) == block
    n = math.prod(shape)
    one = 8 * n if block is None else 2 * n + 2 * 4 * (n // block)
    assert moment_bytes(shape, "int8") == one
    assert (moment_bytes(shape, "bfloat16"), moment_bytes(shape, "float32")) == (4 * n, 8 * n)


def test_the_plan_counts_each_matrix():
    from tools.plan.stages import TINYLLAMA

    n = 1_100_048_384
    norms = 2048 * (2 * 22 + 1)
    assert moments_of(TINYLLAMA, "bfloat16") == 4 * n
    assert moments_of(TINYLLAMA, "int8") == (n - norms) * (2 + 8 / 256) + 8 * norms


def dequantised(moment):
    return (moment.dequantize() if hasattr(moment, "dequantize") else moment).double()


@pytest.mark.slow
@needs_torchao
def test_a_step_is_adamw_from_the_moments_that_were_kept():
    """Against AdamW's formulas in float64, of what the codes stand for before each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(96, 64)
    args = SimpleNamespace(moments="int8", weight_decay=0.1, lr=1e-2, compile="auto")
    optimiser = make_optimizer(model, args)
    optimiser.begin()
    assert [hasattr(optimiser.state[p]["exp_avg"], "codes") for p in model.parameters()] == [1, 0]
    for t in range(1, 21):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / t  # as the trainers set it
        (model(torch.randn(8, 96)) - 1).square().mean().backward()
        wanted = []
        for p, decay in ((model.weight, 0.1), (model.bias, 0.0)):
            m, v = (dequantised(optimiser.state[p][name]) for name in MOMENTS)
            grad = p.grad.double()
            m = 0.9 * m + 0.1 * grad
            v = 0.95 * v + 0.05 * grad**2
            update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            wanted.append((p, p.detach().double() * (1 - 1e-2 / t * decay) - 1e-2 / t * update))
        optimiser.step()
        optimiser.zero_grad()
        for p, value in wanted:
            assert (p - value).abs().max() < 1e-6
        assert [group["lr"] for group in optimiser.param_groups] == [1e-2 / t] * 2


@pytest.mark.slow
@needs_torchao
def test_what_is_kept_is_near_to_what_was_computed():
    """One step from zero: the moments are (1 - beta) times the gradient, and its square."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 96))
    args = SimpleNamespace(moments="int8", weight_decay=0.0, lr=1e-2, compile="auto")
    optimiser = make_optimizer(SimpleNamespace(parameters=lambda: [p]), args)
    p.grad = torch.randn(64, 96)
    optimiser.step()
    for name, exact in (("exp_avg", 0.1 * p.grad), ("exp_avg_sq", 0.05 * p.grad**2)):
        off = (dequantised(optimiser.state[p][name]) - exact).abs()
        largest = exact.abs().amax(1, keepdim=True)  # of a row, here one block
        assert (off <= 0.0127 * largest).all()  # half of the widest gap of the codes
        assert off.sum() < 0.02 * exact.abs().sum()


@pytest.mark.slow
@needs_torchao
def test_killed_it_ends_bit_identical_and_its_state_needs_no_torchao(stage, inputs, monkeypatch):
    args = f"{REF} --steps 20 --save-every 5"
    assert stage(train_ref, f"{args} --out whole")[0] == 0
    killed("call:data:Loader.micro_batches:8", f"train_ref.py {args} --out cut", inputs)
    saved = torch.load(inputs / "cut/train_state.pt", weights_only=True)["optimizer"]["state"]
    kinds = {type(tensor) for kept in saved.values() for tensor in kept.values()}
    assert kinds == {torch.Tensor}
    assert saved["lm.model.embed_tokens.weight"]["exp_avg.codes"].dtype == torch.uint8
    assert stage(train_ref, f"{args} --out cut")[0] == 0
    assert same(inputs / "whole", inputs / "cut") and log(inputs / "whole") == log(inputs / "cut")


@pytest.mark.slow
@needs_torchao
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_on_two_ranks_it_ends_bit_identical(inputs, parallel):
    args = f"train_ref.py {REF} --steps 9 --save-every 3 --parallel {parallel}"
    finish(launch(f"{args} --out whole", inputs, ranks=2))
    killed("call:data:Loader.micro_batches:5", f"{args} --out cut", inputs, ranks=2)
    finish(launch(f"{args} --out cut", inputs, ranks=2))
    assert same(inputs / "whole", inputs / "cut") and log(inputs / "whole") == log(inputs / "cut")
    described = checkpoints.Reader(inputs / "cut/state-000009").read_metadata().state_dict_metadata
    codes = described["optimizer.lm.model.embed_tokens.weight.exp_avg.codes"]
    assert codes.properties.dtype == torch.uint8 and codes.size[1] == 32


@pytest.mark.slow
@needs_torchao
def test_codes_are_those_of_one_process_and_move_to_any_number_of_ranks():
    """Bit for bit, of equal gradients: DDP, FSDP2, HSDP; two ranks have no row of some matrices."""
    ranked("int8", 4)
