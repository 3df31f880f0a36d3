"""More choices and weights of tokens, values of `--score` beside slm.py's five: those of other
papers, two of Rho-1's appendix, and some of ours.

    python train_slm.py --score clean --base-loss FILE --ref-loss FILE ...
    python train_slm.py --score mile --set gamma=2 ...      # a number of the function's own

Letters, per target: l the student's loss, p = e^-l, H the entropy of the student's prediction,
c its collision probability, r the reference's stored loss, b that of the model that the student
started from, s that with a short context. Weights carry no gradient. What the summed loss is
divided by is part of a method: published code differs exactly there. docs/methods.md compares.
"""

import math

import torch

from common.errors import UserError
from slm import PREDICTION, SCORES, Score, Weight, keep_top, n_keep, refuse_not_finite

# --------------------------------------------------------------------------------------------------
# 1. The top k by another score.


def rel(t):
    """b - l: what has been learnt since the start. ssToken (2510.18250), its second half left out.

    With b = r this is minus the excess: it keeps the opposite of what Rho-1 keeps.
    """
    return t.base_loss - t.loss


def clean(t):
    """b - r: what the reference has learnt, over the whole set. Token Cleaning (2502.01968)."""
    return t.base_loss - t.ref_loss


def entropy(t):
    """H: where the student is unsure. ESLM (2505.19893), which also takes l: slm.py's `loss`."""
    return t.entropy


# --------------------------------------------------------------------------------------------------
# 2. Whole documents or windows: does the level of tokens matter?


def document(t):
    """Documents by their mean of b - r (Moore and Lewis 2010, with two neural models). Ours: the
    control that Rho-1 lacks, with the same reference and the same number of tokens."""
    return t.base_loss - t.ref_loss, t.document


def document_ref(t):
    """Documents by their mean of -r alone: no second scoring pass."""
    return -t.ref_loss, t.document


def rho(t):
    """Whole windows by their mean of l - r: RHO-loss (2206.07137) with windows as its examples."""
    if t.together == 1:
        raise UserError(
            "ranks windows among each other, got one at a time; wanted micro-batches of several "
            "(--micro-batch-size, --rank-windows) or --scope batch"
        )
    rows = torch.arange(len(t.loss), device=t.loss.device)
    return t.loss - t.ref_loss, rows[:, None].expand_as(t.loss)


def keep_whole(values, valid, k, together=None):
    """The pieces with the highest mean score, until the number of tokens is nearest to k's share.

    values: scores and the number of each token's piece, both (B, T). Equal means: the lowest number
    wins. At least one piece of each group of `together` rows is kept, if it has a valid token.
    """
    scores, piece = values
    refuse_not_finite(scores, valid)
    kept = torch.zeros_like(valid)
    size = together or len(valid)
    for first in range(0, len(valid), size):
        rows = slice(first, first + size)
        inside = valid[rows]
        numbers, place = piece[rows][inside].unique(return_inverse=True)  # sorted
        if len(numbers) == 0:
            continue
        tokens = torch.bincount(place)
        total = torch.zeros(len(numbers), dtype=torch.float64, device=place.device)
        means = total.index_add_(0, place, scores[rows][inside].double()) / tokens
        order = means.argsort(descending=True, stable=True)
        so_far = tokens[order].cumsum(0)
        budget = n_keep(int(tokens.sum()), k)
        last = int((so_far - budget).abs().argmin())
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        chosen[order[: last + 1]] = True
        kept[rows][inside] = chosen[place]
    return kept


# --------------------------------------------------------------------------------------------------
# 3. Two cut-offs, each at k (Rho-1, appendix H): how many are kept is known only afterwards.


def loss_and_entropy(t):
    return -t.ref_loss, -t.ref_entropy


def keep_both(values, valid, k, together=None):
    first, second = (keep_top(scores, valid, k, together) for scores in values)
    return first & second


def keep_either(values, valid, k, together=None):
    first, second = (keep_top(scores, valid, k, together) for scores in values)
    return first | second


# --------------------------------------------------------------------------------------------------
# 4. Sets by a threshold: there is no k, and the student's losses say how many are kept.


def profit(t, tau=0.1):
    """p > tau: drop what the student finds unlikely. ProFit (2601.09195)."""
    return (-t.loss).exp() > tau


def memft(t, tau=0.5):
    """p < tau, that is l > ln 2: drop what the student knows. MemFT-OT (2605.30260)."""
    return t.loss > -math.log(tau)


def ent(t, tau=1.3):
    """|softmax - onehot| <= tau: drop where the student is sure of something else.

    Error norm truncation (2310.00840). The norm is sqrt(c - 2 p + 1), at most sqrt(2). The default
    of tau is ours: the paper chooses it for each task.
    """
    p = (-t.loss).exp()
    return (t.collision - 2 * p + 1).clamp(min=0).sqrt() <= tau


# --------------------------------------------------------------------------------------------------
# 5. Weights.


def mile(t, gamma=1.0):
    """(1 + H)^gamma, divided by their mean: MiLe (2310.19531).

    A weighted mean, so `per` is "weights". Ours: the mean is over the whole batch of all ranks.
    """
    return (1 + t.entropy) ** gamma


def dft(t):
    """p, the gradient of -p: DFT (2508.05629). Divided by all valid targets, as published."""
    return (-t.loss).exp()


def deft(t):
    """p^c, the gradient of -(p^c - 1) / c with c held: DEFT (2602.11424)."""
    return (-t.loss * t.collision).exp()


def entropy_20(log_p):
    """The entropy of the 20 likeliest tokens, as if there were no others: (N, V) -> (N,)."""
    top = log_p.topk(min(20, log_p.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(top.exp() * top).sum(-1)


PREDICTION["entropy_20"] = entropy_20


def eaft(t, power=1.0):
    """(H of the 20 likeliest / 3)^power: EAFT (2601.02151). 3 is nearly ln 20, the highest H."""
    return (t.entropy_20 / 3) ** power


def soft_excess(t, floor=0.5):
    """|l - r| over its mean, mixed with 1: Helm et al. (2503.09202), their dense form.

    Ours: r in place of the loss with a short context, the default of `floor`, and that the mean is
    over the tokens that are ranked together (--scope).
    """
    return floor + (1 - floor) * over_mean((t.loss - t.ref_loss).abs(), t)


def sigmoid_excess(t, tau=1.0):
    """sigmoid((l - r) / tau): ours, Rho-1's choice without its edge. A weighted mean."""
    return ((t.loss - t.ref_loss) / tau).sigmoid()


def longce(t, most=5.0):
    """min(p / p_short, 5) = min(e^(s - l), 5): LongCE (2410.23771).

    Ours: p_short is that of one stored pass, not of the student as it is now.
    """
    return (t.short_loss - t.loss).exp().clamp(max=most)


def over_mean(values, t):
    """Values (B, T) over their mean on the valid tokens of each group that is ranked together."""
    groups = torch.where(t.valid, values, 0.0).view(-1, t.together * values.shape[1])
    counts = t.valid.view_as(groups).sum(1, keepdim=True)
    means = groups.sum(1, keepdim=True) / counts.clamp(min=1)
    # All values 0: then none stands out, and each counts 1.
    return torch.where(means > 0, groups / means, 1.0).view_as(values)


# --------------------------------------------------------------------------------------------------

LOSS_AND_REF = ("loss", "ref_loss")
REF_AND_ENTROPY = ("ref_loss", "ref_entropy")
BASE_AND_REF = ("base_loss", "ref_loss")

SCORES |= {
    "rel": Score(rel, needs=("loss", "base_loss")),
    "clean": Score(clean, needs=BASE_AND_REF, scope="set"),
    "entropy": Score(entropy, needs=("entropy",)),
    "document": Score(document, needs=(*BASE_AND_REF, "document"), choose=keep_whole, scope="set"),
    "document_ref": Score(
        document_ref, needs=("ref_loss", "document"), choose=keep_whole, scope="set"
    ),
    "rho": Score(rho, needs=LOSS_AND_REF, choose=keep_whole),
    "ref_and": Score(loss_and_entropy, needs=REF_AND_ENTROPY, choose=keep_both),
    "ref_or": Score(loss_and_entropy, needs=REF_AND_ENTROPY, choose=keep_either),
    "profit": Weight(profit, needs=("loss",), per="kept", alone=True),
    "memft": Weight(memft, needs=("loss",), per="kept", alone=True),
    "ent": Weight(ent, needs=("loss", "collision"), per="kept", alone=True),
    "mile": Weight(mile, needs=("entropy",), per="weights", alone=True),
    "dft": Weight(dft, needs=("loss",), alone=True),
    "deft": Weight(deft, needs=("loss", "collision"), alone=True),
    "eaft": Weight(eaft, needs=("entropy_20",), alone=True),
    "soft_excess": Weight(soft_excess, needs=LOSS_AND_REF),
    "sigmoid_excess": Weight(sigmoid_excess, needs=LOSS_AND_REF, per="weights", alone=True),
    "longce": Weight(longce, needs=("loss", "short_loss"), alone=True),
}
