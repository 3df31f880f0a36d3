"""Is a fused linear cross-entropy right where each token has a loss and a factor of its own?

    python -m tools.conformance                              # the kit's heads, and others'
    python -m tools.conformance --head my_module:my_losses   # one's own alone

A head is a function (hidden (N, C), weight (V, C), targets (N,), -100 where ignored) -> losses (N,)
with a gradient. Everything is compared with full logits in fp64. The exit code is 1 where one that
was asked for, or one of the kit's, does not pass.
"""

import importlib
import sys
from typing import NamedTuple

from common.device import Env  # first: it sets how torch's threads wait

import torch
import torch.nn.functional as F

from common.command_line import Parser, add_machine
from common.errors import UserError, cli, reason_of
from training.heads import HEADS

IGNORED = -100
N, C, V = 96, 64, 500
TOLERANCE = 2e-5  # relative, of fp32
BF16_LOSS = 1e-3  # nats, of bf16 factors: coarser losses exchange tokens of a ranking
BF16_GRADIENT = 0.02  # relative: gradients of bf16 tensors are bf16
K = (0.0, 0.1, 0.5, 0.6, 0.999, 1.0)


class Outcome(NamedTuple):
    """Of one call: losses (N,), and the gradients of sum(factors * losses)."""

    losses: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    factors: torch.Tensor  # (N,), of the losses in the sum that is differentiated


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--head", metavar="MODULE:FUNCTION", help="your own")
    add_machine(parser)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# heads


def ours(head):
    """One of the kit's heads, which take the factors themselves: Case -> Outcome."""

    def run(case):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        valid = case.targets != IGNORED
        factors = torch.where(valid, case.factors, 0.0)
        targets = case.targets.clamp(min=0)
        total, losses, _ = HEADS[head](hidden, weight, targets, lambda losses: factors)
        total.backward()
        return Outcome(torch.where(valid, losses, 0.0), hidden.grad, weight.grad)

    return run


def theirs(losses_of):
    """A function of hidden states, weight and targets, with autograd: Case -> Outcome."""

    def run(case):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        losses = losses_of(hidden, weight, case.targets)
        (losses * case.factors.to(losses.dtype)).sum().backward()
        return Outcome(losses.detach(), hidden.grad, weight.grad)

    return run


def torch_plain(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORED)


def torch_chunked(hidden, weight, targets):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=options
    )


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, reduction="none"
    )


def apple(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="none")


def candidates(args, device):
    """{name: Case -> Outcome, or the reason why it is skipped}."""
    if args.head:
        return {args.head: theirs(named(args.head))}
    found = {f"kit, {head}": ours(head) for head in HEADS}
    has_it = hasattr(F, "linear_cross_entropy")
    too_old = f"torch {torch.__version__} has no F.linear_cross_entropy"
    found["torch"] = theirs(torch_plain) if has_it else too_old
    chunked = has_it and hasattr(torch.nn, "LinearCrossEntropyOptions")
    found["torch, chunked"] = theirs(torch_chunked) if chunked else too_old
    for name, package, losses_of in (
        ("Liger", "liger_kernel", liger),
        ("Apple", "cut_cross_entropy", apple),
    ):
        if device.type != "cuda":
            found[name] = "wants CUDA"
        elif importlib.util.find_spec(package) is None:
            found[name] = f"{package} is not installed"
        else:
            found[name] = theirs(losses_of)
    return found


def named(text):
    """The function MODULE:FUNCTION. Raises UserError."""
    module, _, function = text.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--head: got {text}, wanted MODULE:FUNCTION ({reason_of(error)})"
        ) from None


# --------------------------------------------------------------------------------------------------
# checks: each gives the largest error and the largest that is right


def make_case(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) * 0.5
    targets = torch.randint(V, (N,), generator=generator)
    factors = torch.rand(N, generator=generator) * 3
    factors[::5] = 0
    tensors = [t.to(device) for t in (hidden.to(dtype), weight.to(dtype), targets, factors)]
    return Case(*tensors)


def exact(case):
    """Full logits in fp64, of the very values that the head was given."""
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    losses = F.cross_entropy(
        hidden @ weight.T, case.targets, reduction="none", ignore_index=IGNORED
    )
    (losses * case.factors.double()).sum().backward()
    return Outcome(losses.detach(), hidden.grad, weight.grad)


def loss_error(found, wanted):
    if not found.losses.isfinite().all():
        return float("inf")
    return (found.losses.double() - wanted.losses).abs().max().item()


def gradient_error(found, wanted):
    """The largest difference of either gradient, relative to its largest entry."""
    errors = []
    for mine, true in ((found.d_hidden, wanted.d_hidden), (found.d_weight, wanted.d_weight)):
        if not mine.isfinite().all():
            return float("inf")
        largest = true.abs().max().clamp(min=1e-30)
        difference = (mine.double() - true).abs().max()
        errors.append((difference if true.abs().max() == 0 else difference / largest).item())
    return max(errors)


def losses(run, device):
    case = make_case(device)
    return loss_error(run(case), exact(case)), TOLERANCE * 10


def gradients(run, device):
    """With factors from 0 to 3: all times the first one is not it."""
    case = make_case(device)
    return gradient_error(run(case), exact(case)), TOLERANCE


def ignored(run, device):
    """Targets of -100: their losses are 0, and nothing comes of their hidden states."""
    worst = 0.0
    for step in (3, 1):  # a third of them; all of them
        case = make_case(device)
        case.targets[::step] = IGNORED
        found, wanted = run(case), exact(case)
        worst = max(worst, loss_error(found, wanted), gradient_error(found, wanted))
    return worst, TOLERANCE * 10


def ties(run, device):
    """Equal rows have equal losses to the bit, wherever they stand: a ranking needs that."""
    case = make_case(device)
    for i in (1, 40, N - 1):
        case.hidden[i] = case.hidden[0]
        case.targets[i] = case.targets[0]
    found = run(case).losses[[0, 1, 40, N - 1]]
    return (found - found[0]).abs().max().item(), 0.0


def bf16_losses(run, device):
    """Of bf16 factors. Rounded to bf16 themselves, losses near 8 are off by up to 1/32."""
    case = make_case(device, torch.bfloat16)
    return loss_error(run(case), exact(case)), BF16_LOSS


def bf16_gradients(run, device):
    case = make_case(device, torch.bfloat16)
    return gradient_error(run(case), exact(case)), BF16_GRADIENT


def shares(run, device):
    """The mean of the k with the highest losses, for k from 0 to 1."""
    worst = 0.0
    for k in K:
        case = make_case(device)
        n = int(k * N + 0.5)
        kept = torch.zeros_like(case.factors)
        kept[exact(case).losses.topk(n).indices] = 1 / max(n, 1)
        case = case._replace(factors=kept)
        worst = max(worst, gradient_error(run(case), exact(case)))
    return worst, TOLERANCE


CHECKS = {
    "losses": losses,
    "gradients": gradients,
    "ignored": ignored,
    "ties": ties,
    "bf16 losses": bf16_losses,
    "bf16 gradients": bf16_gradients,
    "k from 0 to 1": shares,
}


def check(run, device):
    """{check: (error, whether it passes)}; an exception is an error without bound."""
    found = {}
    for name, function in CHECKS.items():
        try:
            error, most = function(run, device)
        except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as raised:
            found[name] = (reason_of(raised), False)
        else:
            found[name] = (f"{error:.1e}", error <= most)
    return found


def main(argv=None):
    args = arguments(argv)
    env = Env(args)
    torch.set_float32_matmul_precision("highest")  # TF32 would be told from fp64
    passed = True
    width = max(map(len, CHECKS)) + 2
    for name, run in candidates(args, env.device).items():
        if isinstance(run, str):
            print(f"{name}: skipped, {run}\n")
            continue
        outcome = check(run, env.device)
        right = all(ok for _, ok in outcome.values())
        print(f"{name}: {'passes' if right else 'DOES NOT PASS'}")
        for what, (error, ok) in outcome.items():
            print(f"  {what:{width}}{'ok' if ok else 'WRONG':7}{error}")
        print()
        passed &= right or not (args.head or name.startswith("kit"))
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
