"""What makes selective training cheap. Nobody needs this file to understand the method: slm.py holds it whole.

    --head full      slm.head_full: all logits, the loss of every token, autograd. The reference form.
    --head kept      one micro-batch's logits are held once; the gradient is made on the kept rows alone. Fastest.
    --head lean      no more than CHUNK_BYTES of logits ever exist; those of the kept rows are made twice. Leanest.
    --backward exact   with kept and lean the last block's matrices, too, see kept rows only in the backward pass (but
                       for keys and values): no other row has a gradient there, so the result is the same.
    --backward pruned  AN APPROXIMATION: so do the matrices of every block. What a kept token's loss says about earlier
                       tokens still flows through keys, values and the residual stream; what it says through their
                       queries and MLPs is dropped.
    --backward pruned_all  keys and values too: dropped tokens get no gradient at all. Cheaper, further off.

Everything but the pruned backward is exact. A head is told how many tokens will be kept (`count`, known from the masks
before any forward pass), so that no shape has to be read back from the device.
"""

import torch
import torch.nn.functional as F
from torch import nn

import slm

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of fp32 logits at a time; large enough for full-speed products


# ---------------------------------------------------------------------------------------------------------------------
# 1. Heads, with slm.head_full's arguments and results, and `count`.

def head_full(hidden, weight, targets, select, count=None):
    return slm.head_full(hidden, weight, targets, select)


def head_kept(hidden, weight, targets, select, count=None):
    """Holds the logits (N, V) in the dtype of the forward pass, until the loss is known."""
    return Head.apply(hidden, weight, targets, select, count, True)


def head_lean(hidden, weight, targets, select, count=None):
    """Makes the logits in chunks, twice for kept rows: once to choose, once for the gradient."""
    return Head.apply(hidden, weight, targets, select, count, False)


HEADS = {"full": head_full, "kept": head_kept, "lean": head_lean}


class Head(torch.autograd.Function):
    """Loss and gradients in one go, in the forward pass: d loss / d logits = softmax - onehot, on kept rows alone.

    Products run in the autocast dtype; losses, softmax and the sum of the weight's gradient over chunks in fp32. Where
    every row is kept (count = N) one pass over chunks does all, in either form: the usual chunked head.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, select, count, hold):
        device, N, V = hidden.device.type, len(targets), len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        size = max(1, CHUNK_BYTES.get(device, 512 << 20) // (4 * V))
        slices = [slice(i, i + size) for i in range(0, N, size)]
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            losses = torch.empty(N, device=hidden.device, dtype=torch.promote_types(dtype, torch.float32))
            d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(weight, dtype=losses.dtype)

            if count == N:
                logits, kept, parts = None, None, slices
            else:
                logits = F.linear(h, w) if hold else None  # (N, V)
                for part in slices:
                    z = F.linear(h[part], w) if logits is None else logits[part]
                    losses[part] = F.cross_entropy(slm.at_least_fp32(z), targets[part], reduction="none")
                kept = select(losses)
                parts = rows_of(kept, count).split(size)

            for part in parts:
                h_part, y_part = h[part], targets[part]
                z = F.linear(h_part, w) if logits is None else logits.index_select(0, part)
                z = slm.at_least_fp32(z)  # (chunk, V)
                if kept is None:
                    losses[part] = F.cross_entropy(z, y_part, reduction="none")
                z = z.softmax(-1)
                z.scatter_add_(1, y_part[:, None], torch.full_like(z[:, :1], -1.0))
                z = z.to(dtype)
                d_hidden[part] = z @ w
                d_weight.addmm_(z.T, h_part) if z.dtype == d_weight.dtype else d_weight.add_(z.T @ h_part)

        kept = select(losses) if kept is None else kept
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, kept)
        return torch.where(kept, losses, 0.0).sum(), losses, kept

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None  # in place: a second backward raises


def rows_of(kept, count):
    """The positions of the kept rows, ascending. With `count` a GPU need not be asked how many there are."""
    if kept.is_cpu or count is None:
        rows = kept.nonzero().flatten()
        assert count is None or len(rows) == count, (len(rows), count)
        return rows
    return torch.nonzero_static(kept, size=count).flatten()


# ---------------------------------------------------------------------------------------------------------------------
# 2. A linear layer whose backward pass sees kept rows only.

@torch.library.custom_op("slm::backward_on_rows", mutates_args=())
def backward_on_rows(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                     rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (..., C) and weight (D, C) from that of x @ weight.T, grad (..., D), where only `rows` of the
    flattened grad count. An operator of its own, so that torch.compile cannot gather x's rows ahead in the forward."""
    g = grad.flatten(0, -2).index_select(0, rows)                                         # (kept, D)
    d_weight = g.T @ x.flatten(0, -2).index_select(0, rows).to(g.dtype)
    d_x = torch.zeros_like(x).flatten(0, -2).index_copy_(0, rows, (g @ weight.to(g.dtype)).to(x.dtype))
    return d_x.view_as(x), d_weight.to(weight.dtype)


@backward_on_rows.register_fake
def _(grad, x, weight, rows):
    return torch.empty_like(x), torch.empty_like(weight)


class RowProduct(torch.autograd.Function):
    """x (..., C) @ weight.T (D, C), whose backward pass sees `rows` only; what is in `rows` may be written between."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return *backward_on_rows(grad, *ctx.saved_tensors), None


class RowLinear(nn.Linear):
    """nn.Linear, but for the backward pass; a plain one while `rows` is None."""
    rows = None

    def forward(self, x):
        if self.rows is None:
            return super().forward(x)
        y = RowProduct.apply(x, self.weight, self.rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)


BACKWARD = {"exact": lambda layers: layers[-1:], "pruned": lambda layers: layers, "pruned_all": lambda layers: layers}


class FastLoss(slm.WithLoss):
    """slm.WithLoss with a cheaper head and backward pass; parameters keep their names.

    forward(x, y, select, count=number of tokens that `select` will keep); without `count` the plain backward pass.
    """

    def __init__(self, model, head="kept", backward="exact"):
        super().__init__(model, HEADS[head])
        self.linears = []
        if (head, backward) == ("full", "exact"):
            return  # the reference form, plain throughout
        for block in BACKWARD[backward](model.model.layers):
            for name, module in block.named_modules():
                keys_values = name.endswith(("k_proj", "v_proj"))
                if isinstance(module, nn.Linear) and (backward == "pruned_all" or not keys_values):
                    module.__class__ = RowLinear  # the same weights under the same name
                    self.linears.append(module)

    def forward(self, x, y, select=None, entropy=False, count=None):
        # One index per micro-batch, empty until the losses are known: each layer's backward holds on to its own.
        rows = None
        if select is not None and count is not None and count < y.numel():
            rows = torch.zeros(count, dtype=torch.long, device=y.device)
        for linear in self.linears:
            linear.rows = rows
        if select is None:
            return super().forward(x, y, entropy=entropy)

        def choose(losses):
            kept = select(losses.view_as(y)).flatten()
            if rows is not None:
                rows.data.copy_(rows_of(kept, count))  # .data: autograd shall not take this for a change of its input
            return kept

        hidden, targets = self.lm(x).flatten(0, 1), y.flatten()
        total, losses, kept = self.head(hidden, self.lm.head_weight, targets, choose, count)
        return total, losses.view_as(y), kept.view_as(y)
