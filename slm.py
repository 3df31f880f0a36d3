"""Selective Language Modeling: the method of Rho-1 (Lin et al., arXiv 2404.07965, section 2.2).

    1. A reference model is trained on curated data                                    train_ref.py
    2. L_ref(x_i) = -log P_ref(x_i | x_<i) is computed once per token and stored       score.py
    3. The student reads every token of a batch, but only the k% with the highest
       excess loss, L_theta(x_i) - L_ref(x_i), carry loss and gradient                 train_slm.py

This file is step 3: a score for each token, the choice of the highest, and the loss over them.
To try an idea of your own, write a function of `Tokens` and add it to SCORES: its name is then
a value of `--score`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError

# --------------------------------------------------------------------------------------------------
# 1. Scores. The tokens with the HIGHEST scores are kept. No score sees a gradient.


class Tokens(SimpleNamespace):
    """What is known of a micro-batch's targets, each (B, T) fp32. A score names what it needs.

    loss         the student's, in this very forward pass
    ref_loss     the reference's, stored by score.py
    ref_entropy  the entropy of the reference's prediction, stored by score.py --entropy
    noise        uniform in [0, 1), a function of seed, step and window
    """

    def __getattr__(self, name):  # called only for what is not there
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in KNOWN:
            raise UserError(f"a score reads t.{name}, wanted some of {', '.join(KNOWN)}")
        raise UserError(
            f"a score reads t.{name}, which was not loaded; it has to say so: "
            f'SCORES["..."] = Score(function, needs=(..., "{name}"))'
        )


KNOWN = ("loss", "ref_loss", "ref_entropy", "noise")


@dataclass(frozen=True)
class Score:
    """What tokens are ranked by: `function(tokens)` -> (B, T), from the `needs` among KNOWN."""

    function: Callable
    needs: tuple

    def __post_init__(self):
        for name in self.needs:
            if name not in KNOWN:
                raise UserError(f"Score(needs=...): {name!r} is not known, wanted some of {KNOWN}")

    @property
    def static(self):
        """Does the choice stay the same whatever the student has learned?"""
        return "loss" not in self.needs


def excess(t):
    """L_theta - L_ref: how much there is left to learn (section 2.2, equation 3). Signed."""
    return t.loss - t.ref_loss


def loss(t):
    """Plain hard-token mining: what the student finds hard, noise included."""
    return t.loss


def random(t):
    """The control: the same number of tokens, chosen blindly."""
    return t.noise


def ref_loss(t):
    """Keep what the reference finds EASY (appendix H)."""
    return -t.ref_loss


def ref_entropy(t):
    """Keep where the reference is SURE of its prediction, right or wrong (appendix H)."""
    return -t.ref_entropy


SCORES = {
    "excess": Score(excess, needs=("loss", "ref_loss")),
    "loss": Score(loss, needs=("loss",)),
    "random": Score(random, needs=("noise",)),
    "ref_loss": Score(ref_loss, needs=("ref_loss",)),
    "ref_entropy": Score(ref_entropy, needs=("ref_entropy",)),
}
# Two choices, each with a cut-off at k, are combined: how many are kept is known only afterwards.
COMBINED = {
    "ref_and": (torch.logical_and, ("ref_loss", "ref_entropy")),
    "ref_or": (torch.logical_or, ("ref_loss", "ref_entropy")),
}

# --------------------------------------------------------------------------------------------------
# 2. Selection: the top k of each group of valid tokens.


def n_keep(n_valid, k):
    """How many of n_valid tokens are kept: floor(k n + 1/2), at least one if there is any.

    Takes an int or a tensor of them, and gives the same.
    """
    if isinstance(n_valid, torch.Tensor):
        n = torch.floor(k * n_valid.double() + 0.5).long()
        return torch.where(n_valid > 0, n.clamp(min=1), 0)
    if n_valid == 0:
        return 0
    return max(1, math.floor(k * n_valid + 0.5))


def keep_top(scores, valid, k, together=None):
    """Which tokens are kept, (B, T) bool: the k highest scores among the valid ones of each group.

    A group is `together` rows, one after the other; None: all of the input. Equal scores: the
    lowest position wins (a threshold `>=` would keep every one of them). Raises UserError where
    a valid score is not finite. On a GPU that check would cost a synchronisation: there the
    trainer looks once a step (training/meter.py).
    """
    if scores.is_cpu and not torch.isfinite(scores[valid]).all():
        bad = (~torch.isfinite(scores[valid])).sum()
        raise UserError(f"{bad} of {valid.sum()} scores are not finite; look at the score")
    n_groups = len(scores) // (together or len(scores))
    ranked = torch.where(valid, scores.float(), -torch.inf).view(n_groups, -1)
    order = ranked.argsort(dim=1, descending=True, stable=True)  # positions, best first
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)  # of each position
    kept = rank < n_keep(valid.view_as(ranked).sum(1, keepdim=True), k)
    return kept.view_as(valid)


@dataclass(frozen=True)
class Selection:
    """Which tokens carry loss and gradient: the top `k` by `score`, ranked within `scope`.

    k = 1 keeps every valid token and looks at no score at all: plain causal training. With
    `rank_windows` the scope "micro" ranks so many windows together, else those of a forward pass.
    """

    k: float
    score: str = "excess"
    scope: str = "micro"
    rank_windows: int | None = None

    @property
    def together(self):
        """How many windows are ranked together; None: all that `mask` is given."""
        return {"sequence": 1, "micro": self.rank_windows, "batch": None}[self.scope]

    @property
    def needs(self):
        """The fields of `Tokens` that have to be there."""
        if self.k == 1:
            return ()
        if self.score in COMBINED:
            return COMBINED[self.score][1]
        return SCORES[self.score].needs

    @property
    def static(self):
        return "loss" not in self.needs

    @property
    def combined(self):
        """Are two choices combined? Then the masks alone do not tell how many are kept."""
        return self.score in COMBINED

    def count(self, valid):
        """How many of the tokens `valid` (B, T), a numpy mask, `mask` will keep."""
        of_windows = valid.sum(1).reshape(-1, self.together or len(valid))
        return sum(n_keep(n, self.k) for n in of_windows.sum(1).tolist())

    def mask(self, tokens, valid):
        """Which tokens are kept, (B, T) bool."""
        if self.k == 1:
            return valid
        if self.score in COMBINED:
            combine, names = COMBINED[self.score]
            choices = [replace(self, score=name).mask(tokens, valid) for name in names]
            return combine(*choices)
        return keep_top(self.ranked(tokens), valid, self.k, self.together)

    def ranked(self, tokens):
        """The values that are ranked, (B, T); None where there is no single ranking."""
        if self.k == 1 or self.score in COMBINED:
            return None
        return SCORES[self.score].function(tokens)


# --------------------------------------------------------------------------------------------------
# 3. The loss: the sum over the kept tokens. The trainer divides by the number kept in the batch.


def logits_of(hidden, weight):
    """hidden (N, C) times weight (V, C): logits (N, V) in fp32; fp64 stays fp64.

    Rounded to bf16, as autocast would do, a logit near 20 is off by up to 1/16: more than many of
    the differences that are ranked. So the factors alone are bf16, and never their sum.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(wide), weight.to(hidden.dtype).to(wide))


def head_full(hidden, weight, targets, select):
    """The plainest exact form: all logits, the loss of every token, the sum over the kept ones.

    hidden (N, C), weight (V, C), targets (N,). `select` gets the losses (N,) without gradient and
    returns which are kept, (N,) bool. Returns the sum of the kept losses (scalar), all losses (N,)
    detached, kept (N,).
    """
    logits = logits_of(hidden, weight)  # (N, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    kept = select(losses.detach())
    return torch.where(kept, losses, 0.0).sum(), losses.detach(), kept


@torch.no_grad()
def token_losses(hidden, weight, targets, entropy=False, chunk=1024):
    """-log P(x_i | x_<i) of every target, (N,) fp32, without ever holding all logits.

    With `entropy` also -sum p log p of each prediction (appendix H): (losses, entropies).
    For scoring, validation and the first pass of the batch scope.
    """
    losses, entropies = [], []
    for i in range(0, len(targets), chunk):
        logits = logits_of(hidden[i : i + chunk], weight)  # (chunk, V)
        losses.append(F.cross_entropy(logits, targets[i : i + chunk], reduction="none"))
        if entropy:
            log_p = logits.log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    if entropy:
        return torch.cat(losses), torch.cat(entropies)
    return torch.cat(losses)


class WithLoss(nn.Module):
    """A model and its loss in one module: selection happens inside the wrapped forward pass, so
    that DDP's and FSDP's hooks fire.

    forward(x, y, select) -> (sum of kept losses, losses (B, T), kept (B, T)).
    forward(x, y) -> losses (B, T); with `entropy` (losses, entropies).
    """

    def __init__(self, model, head=head_full):
        super().__init__()
        self.lm = model
        self.head = head

    def forward(self, x, y, select=None, entropy=False):
        hidden = self.lm(x).flatten(0, 1)
        targets = y.flatten()
        if select is None:
            out = token_losses(hidden, self.lm.head_weight, targets, entropy)
            return tuple(part.view_as(y) for part in out) if entropy else out.view_as(y)

        def select_flat(losses):
            return select(losses.view_as(y)).flatten()

        total, losses, kept = self.head(hidden, self.lm.head_weight, targets, select_flat)
        return total, losses.view_as(y), kept.view_as(y)
