"""What one optimiser step reports."""

import math

import torch
import torch.distributed as dist

from common.errors import UserError

BINS = 80  # of the histogram of scores, the outer two for all beyond
LOWEST, HIGHEST = -10.0, 10.0  # nats
# What every step adds up: losses of valid and of kept targets, the numbers of both, weights (of
# kept ones 1), and scores or weights that cannot be.
SUMS = ("loss", "selected", "n_valid", "n_kept", "weight", "bad")


class Meter:
    """Sums on the device over micro-batches and ranks: one synchronisation a step.

    kinds: names of the labels, or None. score: what the tokens are ranked by. histogram: are the
    ranked scores counted in bins?
    """

    def __init__(self, env, kinds, score=None, histogram=False):
        self.score = score
        self.env = env
        self.kinds = kinds or []
        self.histogram = histogram
        size = len(SUMS) + 2 * len(self.kinds) + (BINS if histogram else 0)
        self.sums = torch.zeros(size, dtype=torch.float64, device=env.device)
        self.threshold = torch.full((), math.inf, device=env.device)
        self.weighted = False

    def add(self, losses, valid, kept, kind=None, scores=None, wrong=None):
        """losses, valid, kept (B, T), or weights; `kind` (B, T) labels (numpy).

        `scores`: what was ranked, or the weights; `wrong` (B, T) bool: which of them cannot be.
        """
        self.weighted = kept.dtype != torch.bool
        sums = [torch.where(w != 0, w * losses, 0.0).sum() for w in (valid, kept)]
        bad = torch.zeros_like(valid) if wrong is None else wrong
        sums += [valid.sum(), (kept != 0).sum(), kept.sum(), bad.sum()]
        parts = [torch.stack([value.double() for value in sums])]
        if kind is not None:
            kind = self.env.tensor(kind).flatten()
            parts += [self._by_kind(kind, mask) for mask in (valid, kept)]
        if self.histogram:
            parts.append(self._in_bins(scores, valid))
        self.sums += torch.cat(parts)
        if scores is not None:
            lowest = torch.where(kept != 0, scores, math.inf).min()
            self.threshold = torch.minimum(self.threshold, lowest)

    def _by_kind(self, kind, mask):
        counts = torch.zeros(len(self.kinds), dtype=torch.float64, device=kind.device)
        return counts.index_add_(0, kind, mask.flatten().double())

    def _in_bins(self, scores, valid):
        counts = torch.zeros(BINS, dtype=torch.float64, device=valid.device)
        if scores is None:
            return counts
        place = (scores - LOWEST) * (BINS / (HIGHEST - LOWEST))
        place = place.nan_to_num().clamp(0, BINS - 1).long()
        return counts.index_add_(0, place.flatten(), valid.flatten().double())

    def read(self):
        """The step's record: number kept, mean losses, lowest kept score, share kept by kind.

        Of weights: the number above 0, the weighted mean loss, the mean weight of each kind.
        "histogram": (counts of the scores, edges of the bins), where it was asked for.

        Raises UserError where a score or weight is wrong, or all weights are 0.
        """
        if self.env.world > 1:
            dist.all_reduce(self.threshold, dist.ReduceOp.MIN)
        sums = self.env.total(self.sums).tolist()
        loss, selected, n_valid, n_kept, weight, bad = sums[: len(SUMS)]
        counts = sums[len(SUMS) :]
        self._refuse(bad, weight, n_valid)
        threshold = self.threshold.item()
        record = {
            "tokens_selected": int(n_kept),
            "loss": loss / max(n_valid, 1),
            "loss_selected": selected / weight if weight else 0.0,
            "threshold": threshold if math.isfinite(threshold) else None,
        }
        if self.kinds:
            every = counts[: len(self.kinds)]
            kept = counts[len(self.kinds) : 2 * len(self.kinds)]
            by_kind = zip(self.kinds, every, kept)
            record["kept"] = {name: round(k / n, 4) for name, n, k in by_kind if n}
        in_bins = counts[2 * len(self.kinds) :]
        if any(in_bins):
            width = (HIGHEST - LOWEST) / BINS
            edges = [LOWEST + width * i for i in range(BINS + 1)]
            record["histogram"] = (in_bins, edges)
        return record

    def _refuse(self, bad, weight, n_valid):
        """Raises UserError where `bad` scores or weights are wrong, or all weights are 0."""
        if bad:
            wrong = (
                "weights of a batch are below 0 or" if self.weighted else "scores of a batch are"
            )
            found = f"{bad:.0f} of {n_valid:.0f} {wrong} not finite"
        elif self.weighted and n_valid and not weight:
            found = f"the weights of all {n_valid:.0f} targets of a batch are 0"
        else:
            return
        raise UserError(
            f"--score {self.score}: {found}; look at its function, or at what it reads; the last "
            f"saved state is kept"
        )
