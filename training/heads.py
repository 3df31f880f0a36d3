"""Exact heads that are cheaper than slm.head_full: the same loss, the same gradient.

    --head full   slm.head_full: all logits, the loss of every token, autograd.
    --head kept   one micro-batch's logits are held once; the gradient is made on the kept rows
                  alone. Fastest.
    --head lean   no more than CHUNK_BYTES of logits ever exist; those of the kept rows are made
                  twice. Leanest.

"The same gradient" but for one rounding: in bf16 these heads round it once more, when it is scaled.

Nobody needs this file to understand the method: slm.py holds it whole. A head has head_full's
arguments and results, and is told how many tokens will be kept (`count`, known from the masks
before any forward pass), so that no shape has to be read back from the device. Where only the
losses tell (`count` None) a GPU is asked once. A row of weight 0 is a dropped row.
"""

import torch
import torch.nn.functional as F

import slm

# Of fp32 logits at a time; large enough for products at full speed.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}


def head_full(hidden, weight, targets, select, count=None, wants=()):
    return slm.head_full(hidden, weight, targets, select, wants)


def head_kept(hidden, weight, targets, select, count=None, wants=()):
    """Holds the logits (N, V) in fp32 until the loss is known."""
    return Head.apply(hidden, weight, targets, select, count, wants, True)


def head_lean(hidden, weight, targets, select, count=None, wants=()):
    """Makes the logits in chunks, twice for kept rows: once to choose, once for the gradient."""
    return Head.apply(hidden, weight, targets, select, count, wants, False)


HEADS = {"full": head_full, "kept": head_kept, "lean": head_lean}


class Head(torch.autograd.Function):
    """Loss and gradients in one go, in the forward pass, on the kept rows alone.

    d loss / d logits = softmax - onehot. Factors of products have the hidden states' precision
    (bf16 under autocast); logits, losses, softmax and the gradient's sums are fp32. Where every row
    is kept (count = N) one pass over chunks does all, in either form: the usual chunked head.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, select, count, wants, hold):
        with torch.autocast(hidden.device.type, enabled=False):
            rows = Rows(hidden, weight, targets, wants)
            if count == len(targets):  # every row is kept: there is no choice to wait for
                for part in rows.chunks:
                    rows.add_gradient(part, measuring=True)
                kept = select(rows.losses, **rows.also)
                assert kept.dtype == torch.bool  # there is no count for weights
            else:
                logits = rows.measure_all(hold, count)
                kept = select(rows.losses, **rows.also)
                weights = None if kept.dtype == torch.bool else kept
                for part in rows_of(kept, count).split(rows.size):
                    rows.add_gradient(part, logits, weights)
        losses = rows.losses
        ctx.save_for_backward(rows.d_hidden, rows.d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, kept)
        return torch.where(kept != 0, kept * losses, 0.0).sum(), losses, kept

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        # In place: a second backward pass raises.
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None, None


class Rows:
    """A micro-batch's rows on their way through the head, in chunks of `size`.

    losses (N,); also: {name of slm.PREDICTION: (N,)}; d_hidden (N, C), d_weight (V, C): the
    gradient of the rows that were added.
    """

    def __init__(self, hidden, weight, targets, wants):
        N, V = len(targets), len(weight)
        self.dtype = hidden.dtype
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.factor = factor_dtype(hidden)
        self.h = hidden.to(self.factor)
        self.w = weight.to(hidden.dtype).to(self.factor)
        self.targets = targets
        self.losses = torch.empty(N, device=hidden.device, dtype=self.wide)
        self.also = {name: torch.empty_like(self.losses) for name in wants}
        self.d_hidden = torch.zeros_like(hidden)
        self.d_weight = torch.zeros_like(weight, dtype=self.wide)
        device = hidden.device.type
        self.size = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * V))
        self.chunks = [slice(i, i + self.size) for i in range(0, N, self.size)]

    def measure_all(self, hold, count):
        """Every row's loss. Returns the logits (N, V) where they are to be held, else None."""
        logits = None
        if hold and count is None:
            logits = in_chunks(self.h, self.w, self.chunks)
        elif hold:
            logits = product(self.h, self.w.T)
        for part in self.chunks:
            z = product(self.h[part], self.w.T) if logits is None else logits[part]
            measure(z, self.targets[part], part, self.losses, self.also)
        return logits

    def add_gradient(self, part, logits=None, weights=None, measuring=False):
        """Add the gradient of the rows `part`, each times its weight, where there are `weights`.

        `logits` (N, V), where they are held; `measuring`: these rows' losses are made, too.
        """
        h, y = self.h[part], self.targets[part]
        if logits is None:
            z = product(h, self.w.T)  # (chunk, V)
        else:
            z = logits.index_select(0, part)
        if measuring:
            measure(z, y, part, self.losses, self.also)
        d_logits = z.softmax(-1)
        del z  # as large as d_logits: no more than two of a chunk are held
        minus_one = torch.full_like(d_logits[:, :1], -1.0)
        d_logits = d_logits.scatter_add_(1, y[:, None], minus_one)
        if weights is not None:
            d_logits.mul_(weights[part][:, None])
        d_logits = d_logits.to(self.dtype).to(self.factor)
        self.d_hidden[part] = product(d_logits, self.w).to(self.dtype)
        if self.factor == self.wide:
            self.d_weight.addmm_(d_logits.T, h)
        else:
            self.d_weight.add_(product(d_logits.T, h))


def factor_dtype(hidden):
    """What products with the hidden states are made of: bf16 on a GPU, where they may be so.

    A CPU has no product of bf16 factors with an fp32 result. It is given their values in fp32.
    """
    if hidden.is_cuda:
        return hidden.dtype
    return torch.promote_types(hidden.dtype, torch.float32)


def product(a, b):
    """a (n, m) times b (m, l): (n, l) in fp32, or wider where the factors are.

    A GPU sums products of bf16 factors in fp32 in any case; here it stays so. The operator has no
    derivative: it is for inside of an autograd function.
    """
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def in_chunks(h, w, chunks):
    """product(h, w.T), (N, V), to the bit what one pass over chunks makes: weights of 1 are then
    plain training."""
    if len(chunks) == 1:
        return product(h, w.T)
    wide = torch.promote_types(h.dtype, torch.float32)
    logits = torch.empty(len(h), len(w), device=h.device, dtype=wide)
    for part in chunks:
        logits[part] = product(h[part], w.T)
    return logits


def measure(logits, targets, part, losses, also):
    """Fill in `part` of the losses, and of each of `also`, {name of slm.PREDICTION: (N,)}."""
    if not also:
        losses[part] = F.cross_entropy(logits, targets, reduction="none")
        return
    log_p = logits.log_softmax(-1)
    losses[part] = F.nll_loss(log_p, targets, reduction="none")
    for name, values in also.items():
        values[part] = slm.PREDICTION[name](log_p)


def rows_of(kept, count):
    """The positions of the kept rows, or of those with a weight, ascending.

    With `count` a GPU need not be asked how many there are.
    """
    if kept.is_cpu or count is None:
        rows = kept.nonzero().flatten()
        assert count is None or len(rows) == count, (len(rows), count)
        return rows
    return torch.nonzero_static(kept, size=count).flatten()
