"""Exact heads."""

import torch
import torch.nn.functional as F

import slm

CHUNK_BYTES = {
    "cpu": 24 << 20,
    "cuda": 512 << 20,
}  # of fp32 logits at a time; large enough for full-speed products


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
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        size = max(1, CHUNK_BYTES.get(device, 512 << 20) // (4 * V))
        slices = [slice(i, i + size) for i in range(0, N, size)]
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            losses = torch.empty(
                N, device=hidden.device, dtype=torch.promote_types(dtype, torch.float32)
            )
            d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(weight, dtype=losses.dtype)

            if count == N:
                logits, kept, parts = None, None, slices
            else:
                logits = F.linear(h, w) if hold else None  # (N, V)
                for part in slices:
                    z = F.linear(h[part], w) if logits is None else logits[part]
                    losses[part] = F.cross_entropy(
                        slm.at_least_fp32(z), targets[part], reduction="none"
                    )
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
                d_weight.addmm_(z.T, h_part) if z.dtype == d_weight.dtype else d_weight.add_(
                    z.T @ h_part
                )

        kept = select(losses) if kept is None else kept
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, kept)
        return torch.where(kept, losses, 0.0).sum(), losses, kept

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden.mul_(grad),
            d_weight.mul_(grad),
            None,
            None,
            None,
            None,
        )  # in place: a second backward raises


def rows_of(kept, count):
    """The positions of the kept rows, ascending. With `count` a GPU need not be asked how many there are."""
    if kept.is_cpu or count is None:
        rows = kept.nonzero().flatten()
        assert count is None or len(rows) == count, (len(rows), count)
        return rows
    return torch.nonzero_static(kept, size=count).flatten()
