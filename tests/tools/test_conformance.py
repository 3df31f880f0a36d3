"""tools.conformance finds what it looks for: heads that are wrong in one way each."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tools import conformance

CPU = torch.device("cpu")


def right(hidden, weight, targets):
    logits = hidden.float() @ weight.float().T
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


class TimesTheFirst(torch.autograd.Function):
    """What a known bug of fused heads does: each gradient times the first token's factor."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad[:1].expand_as(grad)


def first_factor(hidden, weight, targets):
    return TimesTheFirst.apply(right(hidden, weight, targets))


def bf16(hidden, weight, targets):
    return right(hidden, weight, targets).to(hidden.dtype)


def counts_ignored(hidden, weight, targets):
    return right(hidden, weight, targets.clamp(min=0))


def noisy(hidden, weight, targets):
    """Equal rows differ in the last bits, as with sums in any order."""
    return right(hidden, weight, targets) * (1 + 2e-6 * (torch.arange(len(hidden)) % 2))


def no_gradient(hidden, weight, targets):
    return right(hidden, weight, targets).detach()


@pytest.mark.parametrize(
    "head, fails",
    [
        (right, set()),
        (first_factor, {"gradients", "ignored", "bf16 gradients", "k from 0 to 1"}),
        (bf16, {"bf16 losses"}),
        (counts_ignored, {"ignored"}),
        (noisy, {"ties"}),
        (no_gradient, set(conformance.CHECKS)),
    ],
)
def test_each_wrong_head_fails_where_it_is_wrong(head, fails):
    outcome = conformance.check(conformance.theirs(head), CPU)
    wrong = {name for name, (_, ok) in outcome.items() if not ok}
    assert wrong == fails, outcome


@functools.cache
def of_the_kit(head):
    return conformance.check(conformance.ours(head), CPU)


@pytest.mark.parametrize("head", conformance.HEADS)
def test_our_heads_pass(head):
    assert all(ok for _, ok in of_the_kit(head).values()), of_the_kit(head)


def test_a_head_of_ones_own_and_what_is_skipped(stage, tmp_path):
    (tmp_path / "mine_head.py").write_text(
        "def losses(hidden, weight, targets):\n    return (hidden @ weight.T)[:, 0]\n"
    )
    code, out, _ = stage(conformance, "--head mine_head:losses --device cpu")
    assert code == 1 and "mine_head:losses: DOES NOT PASS" in out
    code, _, err = stage(conformance, "--head mine_head:other --device cpu")
    assert code == 2 and "--head: got mine_head:other, wanted MODULE:FUNCTION" in err
    found = conformance.candidates(conformance.arguments(["--device", "cpu"]), CPU)
    assert found["Liger"] == "wants CUDA" and found["Apple"] == "wants CUDA"
