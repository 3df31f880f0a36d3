"""Selective Language Modeling: the method of Rho-1 (Lin et al., arXiv 2404.07965, section 2.2).

    1. A reference model is trained on curated data                                    train_ref.py
    2. L_ref(x_i) = -log P_ref(x_i | x_<i) is computed once per token and stored       score.py
    3. The student reads every token of a batch, but only a share k of them, those with the
       highest excess loss, L_theta(x_i) - L_ref(x_i), carry loss and gradient         train_slm.py

This file is step 3: a score for each token, the choice of the highest, and the loss over them.
training/selector.py joins them: it makes the `Tokens` of a micro-batch and hands the head a
function that asks `Selection` which are kept. The trainers divide the summed loss.

To try an idea of your own, write a function of `Tokens` and add it to SCORES: its name is then
a value of `--score`. methods.py holds more of them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError

# --------------------------------------------------------------------------------------------------
# 1. Scores. The tokens with the HIGHEST scores are kept. No score sees a gradient.


class Tokens(SimpleNamespace):
    """What is known of a micro-batch's targets, (B, T), fp32 if no other type is named. A score
    names what it needs.

    loss         the student's, in this very forward pass; entropy, collision: of its prediction
    ref_loss     the reference's, stored by score.py; ref_entropy: of its prediction (--entropy)
    base_loss    of the model that the student started from, stored by score.py
    short_loss   with no more than N tokens of context, stored by score.py --context N
    document     the number of its document in the corpus (int64)
    memory       what the score's own `remember` gave when the token was last seen; 0 at first
    noise        uniform in [0, 1), a function of seed, step and window
    NAME         any array of the corpus' length (--stored NAME=FILE); int64 of whole numbers
    valid        may it be a target (bool). Always there, as is
    together     how many rows are ranked together (an int)
    """

    def __getattr__(self, name):  # called only for what is not there
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in known():
            raise UserError(f"a score reads t.{name}, wanted some of {', '.join(known())}, {OWN}")
        raise UserError(
            f"a score reads t.{name}, which was not loaded; it has to say so: "
            f'SCORES["..."] = Score(function, needs=(..., "{name}"))'
        )


def entropy(log_p):
    """-sum p log p over the vocabulary, in nats: log_p (N, V) -> (N,)."""
    return -log_p.exp().mul_(log_p).sum(-1)


def collision(log_p):
    """sum p^2: how likely two draws from the prediction are alike."""
    return log_p.exp().square_().sum(-1)


# Of the student's prediction, beside the loss: made in the same pass, where a score needs them.
PREDICTION = {"entropy": entropy, "collision": collision}
STORED = ("ref_loss", "ref_entropy", "base_loss", "short_loss")
OWN = "or an array of your own (--stored NAME=FILE)"


def known():
    """The fields of `Tokens` that a score may need."""
    return ("loss", *PREDICTION, *STORED, "document", "memory", "noise")


# What is ranked together: the windows of a forward pass, each window, a step's, the corpus (once).
SCOPES = ("micro", "sequence", "batch", "set")


@dataclass(frozen=True)
class Score:
    """What tokens are ranked by, `function(tokens)` -> (B, T): the top k of it carry loss.

    needs     the fields of `Tokens` that the function reads
    choose    another choice than `keep_top`: (values, valid, k, together) -> (B, T) bool; values
              are what the function gave, perhaps a pair
    per       what the trainer divides the summed loss by: the tokens "kept", or all "valid" ones
    scope     what is ranked together, one of SCOPES, where `--scope` says nothing
    remember  function(tokens) -> (B, T): `t.memory` of these tokens from now on; the trainer calls
              it behind each forward pass
    """

    function: Callable
    needs: tuple = ()
    choose: Callable | None = None
    per: str = "kept"
    scope: str = "micro"
    remember: Callable | None = None

    divisors = ("kept", "valid")

    def __post_init__(self):
        if isinstance(self.needs, str):
            raise UserError(f"needs: got {self.needs!r}, wanted a tuple of fields of Tokens")
        if always := {"valid", "together"}.intersection(self.needs):
            raise UserError(f"needs: got {always.pop()}, which is always there; leave it out")
        if self.per not in self.divisors:
            raise UserError(f"per: got {self.per!r}, wanted one of {', '.join(self.divisors)}")

    @property
    def static(self):
        """Does it look at nothing of the student? Noise does not."""
        return not {"loss", *PREDICTION, "memory"}.intersection(self.needs)


@dataclass(frozen=True)
class Weight(Score):
    """A factor of each token's loss, `function(tokens)` >= 0, or yes and no (bool). No k.

    per: "valid", "kept" (those above 0) or "weights" (their sum).
    alone: does it look at each token by itself? The micro-batch is then a matter of speed.
    """

    per: str = "valid"
    alone: bool = False

    divisors = ("kept", "valid", "weights")

    def __post_init__(self):
        super().__post_init__()
        if self.choose:
            raise UserError("choose: got one in a Weight, wanted it in a Score")


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

# --------------------------------------------------------------------------------------------------
# 2. Selection: the top k of each group of valid tokens.


LOWEST = torch.finfo(torch.float64).min  # a valid score stands above what is not valid


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


def refuse_not_finite(scores, valid):
    """Raises UserError where a valid score is not finite. On a GPU that check would cost a
    synchronisation: there the trainer looks once a step (training/meter.py)."""
    if scores.is_cpu and not scores[valid].isfinite().all():
        bad = (~scores[valid].isfinite()).sum()
        raise UserError(f"{bad} of {valid.sum()} scores are not finite; look at the score")


def keep_top(scores, valid, k, together=None):
    """Which tokens are kept, (B, T) bool: the k highest scores among the valid ones of each group.

    A group is `together` rows, one after the other; None: all of the input. Equal scores: the
    lowest position wins (a threshold `>=` would keep every one of them). Raises UserError where
    a valid score is not finite.
    """
    refuse_not_finite(scores, valid)
    group = (together or len(scores)) * scores.shape[1]  # tokens
    ranked = scores.double().clamp_min(LOWEST).where(valid, -torch.inf).view(-1, group)
    order = ranked.argsort(dim=1, descending=True, stable=True)  # positions, best first
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)  # of each position
    kept = rank < n_keep(valid.view_as(ranked).sum(1, keepdim=True), k)
    return kept.view_as(valid) & valid


def weights_of(values, valid):
    """The factors that a `Weight` gave, 0 where a token is not valid; bool stays bool. (B, T).

    Raises UserError where a valid one is below 0 or not finite; on a GPU it counts as 0.
    """
    if values.dtype == torch.bool:
        return values & valid
    bad = (values < 0) | ~values.isfinite()
    if values.is_cpu and bad[valid].any():
        wrong = f"{bad[valid].sum()} of {valid.sum()} weights"
        raise UserError(f"{wrong} are below 0 or not finite; look at the weight's function")
    return torch.where(bad | ~valid, 0.0, values)


@dataclass(frozen=True)
class Selection:
    """Which tokens carry loss and gradient: the top `k` by `score`, ranked within `scope`.

    k = 1 with a `Score` keeps every valid token and calls no function: plain causal training. A
    `Weight` has no k; 1 stands there. With `rank_windows` the scope "micro" ranks so many windows
    together, else those of a forward pass.
    """

    k: float
    score: str = "excess"
    scope: str = "micro"
    rank_windows: int | None = None
    settings: tuple = ()  # ((name, value), ...) of the score's functions

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise UserError(f"scope: got {self.scope!r}, wanted one of {', '.join(SCOPES)}")
        if not 0 < self.k <= 1:
            raise UserError(f"k: got {self.k}, wanted a share above 0 and up to 1")

    @property
    def method(self):
        """The `Score` or `Weight`; None: every token is kept."""
        method = SCORES.get(self.score)
        if self.k == 1 and not isinstance(method, Weight):
            return None
        if method is None:
            raise UserError(f"--score: got {self.score}, wanted one of {', '.join(SCORES)}")
        return method

    @property
    def together(self):
        """How many windows are ranked together; None: all that `mask` is given."""
        return {"sequence": 1, "micro": self.rank_windows}.get(self.scope)

    @property
    def needs(self):
        """The fields of `Tokens` that have to be there."""
        return self.method.needs if self.method else ()

    @property
    def wants(self):
        """Those of them that the head makes beside the loss."""
        return tuple(name for name in self.needs if name in PREDICTION)

    @property
    def static(self):
        return self.method is None or self.method.static

    @property
    def counted(self):
        """What has to be known before one can say how many tokens are kept.

        "masks"     which targets are valid: the top k of each group are so many
        "stored"    the stored values, too: the choice is made before the forward pass
        "losses"    the student's losses: known only behind it
        """
        if self.method is None:
            return "masks"
        ranked = not isinstance(self.method, Weight) and self.method.choose is None
        if ranked and self.scope != "set":
            return "masks"
        return "stored" if self.static else "losses"

    def count(self, valid):
        """How many of the tokens `valid` (B, T), a numpy mask, `mask` will keep, by the "masks"."""
        if self.method is None:
            return int(valid.sum())
        if self.together and len(valid) % self.together:
            raise UserError(
                f"rank_windows: got {self.together}, wanted a divisor of the {len(valid)} windows "
                f"of a micro-batch; leave out the last batch if it is shorter"
            )
        of_windows = valid.sum(1).reshape(-1, self.together or len(valid))
        return sum(n_keep(n, self.k) for n in of_windows.sum(1).tolist())

    def mask(self, tokens, valid):
        """Which tokens are kept, (B, T) bool; of a `Weight`: how much each counts."""
        if self.method is None:
            return valid
        return self.chosen(self.values(tokens, valid), valid)

    def chosen(self, values, valid):
        """`mask`, from what the score's function gave."""
        if isinstance(self.method, Weight):
            return weights_of(values, valid)
        choose = self.method.choose or keep_top
        if choose is keep_top and values.dtype == torch.bool:  # a rank of equals is their place
            raise UserError(
                'the function gives yes and no (bool): wanted numbers, or a Weight(..., per="kept")'
            )
        return choose(values, valid, self.k, self.together, **self.settings_of(choose, 4)) & valid

    def values(self, tokens, valid):
        """What the score's function gives."""
        function = self.method.function
        return function(self.seen(tokens, valid), **self.settings_of(function))

    def remembered(self, tokens, valid):
        """What the score remembers of these tokens, (B, T) fp32."""
        function = self.method.remember
        return function(self.seen(tokens, valid), **self.settings_of(function)).float()

    def settings_of(self, function, n_own=1):
        """Those of `settings` that a function takes behind its first `n_own` arguments."""
        if not self.settings:
            return {}
        taken = [*inspect.signature(function).parameters][n_own:]
        return {name: value for name, value in self.settings if name in taken}

    def seen(self, tokens, valid):
        """The tokens as a score sees them."""
        always = {"valid": valid, "together": self.together or len(valid)}
        return Tokens(**{**vars(tokens), **always})


# --------------------------------------------------------------------------------------------------
# 3. The loss: the sum over the kept tokens. The trainer divides it by what `per` names, counted
#    over the whole batch.


def logits_of(hidden, weight):
    """hidden (N, C) times weight (V, C): logits (N, V) in fp32; fp64 stays fp64.

    Rounded to bf16, as autocast would do, a logit near 20 is off by up to 1/16: more than many of
    the differences that are ranked. So both factors may be bf16, but their product is not rounded.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(at_least_fp32(hidden), at_least_fp32(weight.to(hidden.dtype)))


def at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def head_full(hidden, weight, targets, select, wants=()):
    """The plainest exact form: all logits, the loss of every token, the sum over the kept ones.

    hidden (N, C), weight (V, C), targets (N,). `select` gets the losses (N,) without gradient and,
    by name, what `wants` asks for of PREDICTION; it returns which are kept, (N,) bool, or weights.
    Returns the sum of the kept losses (scalar), all losses (N,) detached, kept (N,).
    """
    logits = logits_of(hidden, weight)  # (N, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    kept = select(losses.detach(), **of_predictions(logits.detach(), wants))
    kept_losses = torch.where(kept != 0, kept * losses, 0.0)  # 0 times infinity would be nan
    return kept_losses.sum(), losses.detach(), kept


def of_predictions(logits, wants):
    """{name: (N,)} of logits (N, V)."""
    log_p = logits.log_softmax(-1) if wants else None
    return {name: PREDICTION[name](log_p) for name in wants}


@torch.no_grad()
def token_losses(hidden, weight, targets, wants=(), chunk=1024):
    """-log P(x_i | x_<i) of every target, (N,) fp32, without ever holding all logits.

    With `wants`, such as ("entropy",), a list: the losses, then these (appendix H). For scoring,
    validation and the first pass of the batch scope.
    """
    weight = at_least_fp32(weight.to(hidden.dtype))  # once, and not in each chunk
    parts = []
    for i in range(0, len(targets), chunk):
        logits = logits_of(at_least_fp32(hidden[i : i + chunk]), weight)  # (chunk, V)
        losses = F.cross_entropy(logits, targets[i : i + chunk], reduction="none")
        parts.append([losses, *of_predictions(logits, wants).values()])
    columns = [torch.cat(column) for column in zip(*parts)]
    return columns if wants else columns[0]


class WithLoss(nn.Module):
    """A model and its loss in one module: selection happens inside the wrapped forward pass, so
    that DDP's and FSDP's hooks fire.

    forward(x, y, select) -> (sum of kept losses, losses (B, T), kept (B, T)).
    forward(x, y) -> losses (B, T); with `wants` a list of them and of what is wanted.
    `more`: what a head of training/heads.py takes beside this (`count`).
    """

    def __init__(self, model, head=head_full):
        super().__init__()
        self.lm = model
        self.head = head

    def forward(self, x, y, select=None, wants=(), **more):
        hidden = self.lm(x).flatten(0, 1)
        targets = y.flatten()
        if select is None:
            out = token_losses(hidden, self.lm.head_weight, targets, wants)
            return [part.view_as(y) for part in out] if wants else out.view_as(y)

        def select_flat(losses, **also):
            also = {name: values.view_as(y) for name, values in also.items()}
            return select(losses.view_as(y), **also).flatten()

        weight = self.lm.head_weight
        total, losses, kept = self.head(hidden, weight, targets, select_flat, wants=wants, **more)
        return total, losses.view_as(y), kept.view_as(y)
