"""Selective Language Modeling: the method of Rho-1 (Lin et al., arXiv 2404.07965, section 2.2), and nothing else.

    1. A reference model is trained on curated data                                                    train_ref.py
    2. L_ref(x_i) = -log P_ref(x_i | x_<i) is computed once for every token of the corpus and stored       score.py
    3. The student reads every token of a batch, but only the k% with the highest excess loss
       L_theta(x_i) - L_ref(x_i) carry loss and gradient                                               train_slm.py

What follows is step 3: a score for each token, the choice of the highest, and the loss over those chosen.
To try your own idea, add a function to SCORES: it is then a value of `--score`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# 1. Scores. The tokens with the HIGHEST scores are kept. No score sees a gradient.


@dataclass
class Tokens:
    """What is known of a micro-batch's targets, each (B, T) fp32; None where it was not loaded."""

    loss: torch.Tensor | None = None  # the student's, in this very forward pass
    ref_loss: torch.Tensor | None = None  # the reference's, stored by score.py
    ref_entropy: torch.Tensor | None = (
        None  # the entropy of the reference's prediction, score.py --entropy
    )
    noise: torch.Tensor | None = None  # uniform in [0, 1), a function of seed, step and window


def excess(t):
    """L_theta - L_ref: how much there is left to learn (section 2.2, equation 3). Signed, never its absolute value."""
    return t.loss - t.ref_loss


def loss(t):
    """Plain hard-token mining: what the student finds hard, noise included."""
    return t.loss


def random(t):
    """The control: the same number of tokens, chosen blindly."""
    return t.noise


def ref_loss(t):
    """Keep what the reference finds EASY (appendix H). Needs no student, so the choice never changes."""
    return -t.ref_loss


def ref_entropy(t):
    """Keep where the reference is SURE of its prediction, right or wrong (appendix H)."""
    return -t.ref_entropy


SCORES = {
    "excess": excess,
    "loss": loss,
    "random": random,
    "ref_loss": ref_loss,
    "ref_entropy": ref_entropy,
}
COMBINED = {
    "ref_and": torch.logical_and,
    "ref_or": torch.logical_or,
}  # of ref_loss's choice and ref_entropy's
NEEDS = {
    "loss": (),
    "random": ("noise",),
    "ref_loss": ("ref_loss",),
    "ref_entropy": ("ref_entropy",),
    "ref_and": ("ref_loss", "ref_entropy"),
    "ref_or": ("ref_loss", "ref_entropy"),
}  # any other: ("ref_loss",)
STATIC = {
    "random",
    "ref_loss",
    "ref_entropy",
    "ref_and",
    "ref_or",
}  # these do not look at the student's loss


# ---------------------------------------------------------------------------------------------------------------------
# 2. Selection: the top k of each group of valid tokens.


def n_keep(n_valid, k):
    """How many of n_valid tokens are kept: floor(k n + 1/2), at least one if there is any. Works on ints and tensors."""
    if isinstance(n_valid, torch.Tensor):
        n = torch.floor(k * n_valid.double() + 0.5).long()
        return torch.where(n_valid > 0, n.clamp(min=1), 0)
    return max(1, math.floor(k * n_valid + 0.5)) if n_valid > 0 else 0


def check_k(k):
    """Raises UserError unless 0 < k <= 1."""
    if not 0 < k <= 1:
        raise UserError(f"--k: got {k}, wanted a share above 0 and at most 1, such as 0.6 for 60 %")


def count_kept(valids, k, scope="micro"):
    """How many tokens `keep_top` will keep in a list of micro-batches, from their masks alone (numpy bool (B, T))."""
    sizes = [
        valid.sum(1).tolist() if scope == "sequence" else [int(valid.sum())] for valid in valids
    ]
    if scope == "batch":
        return n_keep(sum(n for group in sizes for n in group), k)
    return sum(n_keep(n, k) for group in sizes for n in group)


def keep_top(scores, valid, k, scope="micro"):
    """Which tokens are kept, (B, T) bool: the k highest scores among the valid ones of each group.

    The group is all of the input ("micro", "batch") or each row ("sequence"). Equal scores: the lowest position wins
    (a threshold `>=` would keep every one of them). Raises ValueError where a valid score is not finite (on a GPU this
    would cost a synchronisation: there a NaN ranks first, makes the loss NaN, and the trainer stops on that).
    """
    if scores.is_cpu and not torch.isfinite(scores[valid]).all():
        raise ValueError(
            f"{(~torch.isfinite(scores[valid])).sum()} of {valid.sum()} scores are not finite"
        )
    ranked = torch.where(valid, scores.float(), -torch.inf).view(
        len(scores) if scope == "sequence" else 1, -1
    )
    order = ranked.argsort(dim=1, descending=True, stable=True)  # (groups, group size)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    kept = rank < n_keep(valid.view_as(ranked).sum(1, keepdim=True), k)
    return kept.view_as(valid)


def choose(tokens, valid, k, score="excess", scope="micro"):
    """Which tokens are kept under a named score, (B, T) bool. ref_and and ref_or combine two cut-offs, each at k;
    k = 1 keeps every valid token and looks at no score at all: plain causal training."""
    if k == 1:
        return valid
    if score in COMBINED:
        a, b = (
            keep_top(SCORES[name](tokens), valid, k, scope) for name in ("ref_loss", "ref_entropy")
        )
        return COMBINED[score](a, b)
    return keep_top(SCORES[score](tokens), valid, k, scope)


def ranked_by(tokens, k, score):
    """The values that were ranked, for the log's threshold; None where there is no single ranking."""
    return SCORES[score](tokens) if k < 1 and score in SCORES else None


# ---------------------------------------------------------------------------------------------------------------------
# 3. The loss: the sum over the kept tokens only. The trainer divides by the number kept in the whole batch.


def at_least_fp32(logits):
    """Cross-entropy in bf16 would blur the small differences that are ranked; fp64 stays fp64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_full(hidden, weight, targets, select):
    """The plainest exact form: all logits, the loss of every token, the sum over those that `select` keeps.

    hidden (N, C), weight (V, C), targets (N,). `select` gets the losses (N,) without gradient and returns which are
    kept, (N,) bool. Returns the sum of the kept losses (scalar), all losses (N,) detached, kept (N,).
    """
    losses = F.cross_entropy(at_least_fp32(F.linear(hidden, weight)), targets, reduction="none")
    kept = select(losses.detach())
    return torch.where(kept, losses, 0.0).sum(), losses.detach(), kept


@torch.no_grad()
def token_losses(hidden, weight, targets, entropy=False, chunk=1024):
    """-log P(x_i | x_<i) of every target, (N,) fp32, without ever holding all logits; with `entropy` also
    -sum p log p of each prediction (appendix H). For scoring, validation and the first pass of the batch scope."""
    losses, entropies = [], []
    for i in range(0, len(targets), chunk):
        logits = at_least_fp32(F.linear(hidden[i : i + chunk], weight))  # (chunk, V)
        losses.append(F.cross_entropy(logits, targets[i : i + chunk], reduction="none"))
        if entropy:
            log_p = logits.log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    return (torch.cat(losses), torch.cat(entropies)) if entropy else torch.cat(losses)


class WithLoss(nn.Module):
    """A model and its loss in one module: selection happens inside the wrapped forward, so DDP's and FSDP's hooks fire.

    forward(x, y, select) -> (sum of kept losses, losses (B, T), kept (B, T)); without `select` just the losses.
    """

    def __init__(self, model, head=head_full):
        super().__init__()
        self.lm, self.head = model, head

    def forward(self, x, y, select=None, entropy=False):
        hidden, weight, targets = self.lm(x).flatten(0, 1), self.lm.head_weight, y.flatten()
        if select is None:
            out = token_losses(hidden, weight, targets, entropy)
            return tuple(o.view_as(y) for o in out) if entropy else out.view_as(y)
        total, losses, kept = self.head(
            hidden, weight, targets, lambda l: select(l.view_as(y)).flatten()
        )
        return total, losses.view_as(y), kept.view_as(y)
