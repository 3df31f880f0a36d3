"""slm.WithLoss with a cheaper head and a cheaper backward pass."""

import torch

import slm
from training.heads import HEADS, rows_of
from training.pruned import RowMLP, see_kept_rows

BACKWARD = ("exact", "pruned")


class FastLoss(slm.WithLoss):
    """What the trainers train: a model, its head (heads.py), and blocks that see kept rows only.

    `backward` "exact": the last block alone, where the result is the same. "pruned": every block,
    an approximation (pruned.py). Parameters keep their names.

    forward(x, y, select, count=number of tokens that `select` will keep). `count` None: it weighs
    them, or only the losses tell how many; the backward pass is then the plain one.
    """

    def __init__(self, model, head="kept", backward="exact"):
        super().__init__(model, HEADS[head])
        self.parts = []  # their `rows` are set in every forward pass
        if head == "full" and backward == "exact":
            return  # the reference form, plain throughout
        layers = model.model.layers
        for block in layers:
            if block.mlp.down_proj.bias is None:
                block.mlp = RowMLP(block.mlp)
        for block in layers if backward == "pruned" else layers[-1:]:
            self.parts += see_kept_rows(block)

    def forward(self, x, y, select=None, wants=(), count=None):
        # One index per micro-batch, empty until the losses are known: each layer's backward pass
        # holds on to its own.
        rows = None
        if select is not None and count is not None and count < y.numel():
            rows = torch.zeros(count, dtype=torch.long, device=y.device)
        for part in self.parts:
            part.rows = rows
        if select is None:
            return super().forward(x, y, wants=wants)

        def noted(losses, **also):
            kept = select(losses, **also)
            if rows is not None:
                # .data: autograd shall not take this for a change of its input.
                rows.data.copy_(rows_of(kept.flatten(), count))
            return kept

        return super().forward(x, y, noted, wants, count=count)
