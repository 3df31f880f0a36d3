"""What one optimiser step reports."""

import math

import torch
import torch.distributed as dist


class Meter:
    """What one optimiser step reports, summed on the device over micro-batches and ranks: one synchronisation a step."""

    def __init__(self, env, kinds):
        self.env, self.kinds = env, kinds
        self.sums = torch.zeros(4 + 2 * len(kinds or ()), dtype=torch.float64, device=env.device)
        self.threshold = torch.full((), math.inf, device=env.device)

    def add(self, losses, valid, kept, kind=None, scores=None):
        """losses, valid, kept (B, T); `kind` (B, T) labels (numpy), for reporting only; `scores` what was ranked."""
        zero = torch.zeros((), device=losses.device)
        values = [torch.where(m, losses, zero).sum() for m in (valid, kept)] + [
            valid.sum(),
            kept.sum(),
        ]
        sums = [torch.stack([v.double() for v in values])]
        if kind is not None:
            kind = self.env.tensor(kind).flatten()
            sums += [
                torch.zeros(len(self.kinds), dtype=torch.float64, device=kind.device).index_add_(
                    0, kind, m.flatten().double()
                )
                for m in (valid, kept)
            ]
        self.sums += torch.cat(sums)
        if scores is not None:
            self.threshold = torch.minimum(
                self.threshold, torch.where(kept, scores, math.inf).min()
            )

    def read(self):
        """The step's record: how many were kept, mean losses, lowest kept score, share kept of each kind."""
        if self.env.world > 1:
            dist.all_reduce(self.threshold, dist.ReduceOp.MIN)
        loss, selected, n_valid, n_kept, *counts = self.env.total(self.sums).tolist()
        threshold = self.threshold.item()
        record = {
            "tokens_selected": int(n_kept),
            "loss": loss / max(n_valid, 1),
            "loss_selected": selected / max(n_kept, 1),
            "threshold": threshold if math.isfinite(threshold) else None,
        }
        if counts:
            every, kept = counts[: len(self.kinds)], counts[len(self.kinds) :]
            record["kept"] = {
                name: round(b / a, 4) for name, a, b in zip(self.kinds, every, kept) if a
            }
        return record
