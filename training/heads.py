"""Exact heads that are cheaper than slm.head_full: the same loss, the same gradient.

    --head full   slm.head_full: all logits, the loss of every token, autograd.
    --head kept   one micro-batch's logits are held once; the gradient is made on the kept rows
                  alone. Fastest.
    --head lean   no more than CHUNK_BYTES of logits ever exist; those of the kept rows are made
                  twice. Leanest.

Nobody needs this file to understand the method: slm.py holds it whole. A head has head_full's
arguments and results, and is told how many tokens will be kept (`count`, known from the masks
before any forward pass), so that no shape has to be read back from the device.
"""

import torch
import torch.nn.functional as F

import slm

# Of fp32 logits at a time; large enough for products at full speed.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}


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
    """Loss and gradients in one go, in the forward pass, on the kept rows alone.

    d loss / d logits = softmax - onehot. Products run in the autocast dtype; losses, softmax and
    the sum of the weight's gradient over chunks in fp32. Where every row is kept (count = N) one
    pass over chunks does all, in either form: the usual chunked head.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, select, count, hold):
        device = hidden.device.type
        N, V = len(targets), len(weight)
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        size = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * V))
        chunks = [slice(i, i + size) for i in range(0, N, size)]
        with torch.autocast(device, enabled=False):
            h = hidden.to(dtype)
            w = weight.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            losses = torch.empty(N, device=hidden.device, dtype=wide)
            d_hidden = torch.zeros_like(h)
            d_weight = torch.zeros_like(weight, dtype=wide)

            logits = None
            kept = None
            parts = chunks
            if count != N:  # choose first
                if hold:
                    logits = F.linear(h, w)  # (N, V)
                for part in chunks:
                    z = F.linear(h[part], w) if logits is None else logits[part]
                    losses[part] = _losses(slm.at_least_fp32(z), targets[part])
                kept = select(losses)
                parts = rows_of(kept, count).split(size)

            for part in parts:
                h_part, y_part = h[part], targets[part]
                z = F.linear(h_part, w) if logits is None else logits.index_select(0, part)
                z = slm.at_least_fp32(z)  # (chunk, V)
                if kept is None:
                    losses[part] = _losses(z, y_part)
                d_logits = z.softmax(-1)
                del z  # as large as d_logits: no more than two of a chunk are held
                minus_one = torch.full_like(d_logits[:, :1], -1.0)
                d_logits = d_logits.scatter_add_(1, y_part[:, None], minus_one).to(dtype)
                d_hidden[part] = d_logits @ w
                if dtype == wide:
                    d_weight.addmm_(d_logits.T, h_part)
                else:
                    d_weight.add_(d_logits.T @ h_part)
                del d_logits  # before the next chunk's are made

        if kept is None:
            kept = select(losses)
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, kept)
        return torch.where(kept, losses, 0.0).sum(), losses, kept

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        # In place: a second backward pass raises.
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None


def _losses(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def rows_of(kept, count):
    """The positions of the kept rows, ascending.

    With `count` a GPU need not be asked how many there are.
    """
    if kept.is_cpu or count is None:
        rows = kept.nonzero().flatten()
        assert count is None or len(rows) == count, (len(rows), count)
        return rows
    return torch.nonzero_static(kept, size=count).flatten()
