"""What makes selective training cheap. Nobody needs this file to understand the method: slm.py holds it whole.

    --head full      slm.head_full: all logits, the loss of every token, autograd. The reference form.
    --head kept      one micro-batch's logits are held once; the gradient is made on the kept rows alone. Fastest.
    --head lean      no more than CHUNK_BYTES of logits ever exist; those of the kept rows are made twice. Leanest.
    --backward exact   with kept and lean the last block's matrices, too, see kept rows only in the backward pass (but
                       for keys and values): no other row has a gradient there, so the result is the same.
    --backward pruned  AN APPROXIMATION: so does every block and, on CPU, attention. What a kept token's loss says about
                       earlier tokens still flows through keys, values and the residual stream; what it says through
                       their queries and MLPs is dropped.
    --backward pruned_all  keys and values too: dropped tokens get no gradient at all. Cheaper, further off.

Everything but the pruned backward is exact. A head is told how many tokens will be kept (`count`, known from the masks
before any forward pass), so that no shape has to be read back from the device.
"""

import torch
import torch.nn.functional as F
from torch import nn

import slm
from model import MLP, Attention
from training import heads

QUERIES = 64  # of attention's backward pass on CPU, at a time


# ---------------------------------------------------------------------------------------------------------------------
# 2. Parts of a block whose backward pass sees kept rows only. What is in `rows` is written after the forward pass, when
# the losses are known. Each backward is an operator of its own, so that torch.compile cannot gather rows ahead of time.


@torch.library.custom_op("slm::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (..., C) and weight (D, C) from that of x @ weight.T, grad (..., D), where only `rows` of the
    flattened grad count."""
    g, x_rows = pick(rows, grad, x)  # (kept, D), (kept, C)
    return put(rows, g @ weight.to(g.dtype), x), (g.T @ x_rows.to(g.dtype)).to(weight.dtype)


@torch.library.custom_op("slm::mlp_backward", mutates_args=())
def mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w_gate, w_up and w_down in (silu(gate) * up) @ w_down.T, gate = x @ w_gate.T, up = x @ w_up.T.
    `rows` None: all count."""
    like, (g, x, gate, up) = x, pick(rows, grad, x, gate, up)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_hidden = g @ w_down.to(g.dtype)
    d_down = g.T @ (silu * up)
    d_gate = (d_hidden * up).mul_(sigmoid.add_(silu * (1 - sigmoid)))
    d_up = d_hidden.mul_(silu)
    d_x = torch.addmm(d_gate @ w_gate.to(g.dtype), d_up, w_up.to(g.dtype))
    return put(rows, d_x, like), *(d.to(w_gate.dtype) for d in (d_gate.T @ x, d_up.T @ x, d_down))


@torch.library.custom_op("slm::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (B, H, T, D), k and v (B, H_kv, T, D) in causal attention, for the queries in `rows` of (B T) alone.

    A loop over windows and QUERIES queries at a time, each with the keys before it: on CPU cheaper than the built-in
    backward pass of all queries; heads that share a key are one matrix product."""
    H, T, D = q.shape[1:]
    n_kv, scale = k.shape[1], D**-0.5
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in range(len(q)):
        mine = rows[rows // T == b] % T  # ascending
        for at in mine.split(QUERIES) if len(mine) else ():
            n = int(at[-1]) + 1  # keys that they may see
            query, g = (
                t[b].index_select(1, at).view(n_kv, -1, D) for t in (q, grad)
            )  # (H_kv, H / H_kv * at, D)
            key, value = k[b, :, :n], v[b, :, :n]
            scores = slm.at_least_fp32(query @ key.mT).mul_(scale)
            scores.view(H, len(at), n).masked_fill_(torch.arange(n) > at[:, None], -torch.inf)
            p = scores.softmax(-1)
            d_p = slm.at_least_fp32(g @ value.mT)
            d_scores = d_p.sub_((d_p * p).sum(-1, keepdim=True)).mul_(p).mul_(scale).to(q.dtype)
            d_q[b].index_copy_(1, at, (d_scores @ key).view(H, len(at), D))
            d_k[b, :, :n] += d_scores.mT @ query
            d_v[b, :, :n] += p.to(q.dtype).mT @ g
    return d_q, d_k, d_v


def pick(rows, *tensors):
    """`rows` (None: all) of tensors (..., C), flattened to (N, C)."""
    tensors = [t.flatten(0, -2) for t in tensors]
    return tensors if rows is None else [t.index_select(0, rows) for t in tensors]


def put(rows, values, like):
    """`values` (kept, C) in their rows of a tensor of zeros of the shape and dtype of `like`."""
    if rows is None:
        return values.to(like.dtype).view_as(like)
    return (
        torch.zeros_like(like)
        .flatten(0, -2)
        .index_copy_(0, rows, values.to(like.dtype))
        .view_as(like)
    )


# Shapes of the results, for torch.compile.
linear_backward.register_fake(
    lambda grad, x, weight, rows: (torch.empty_like(x), torch.empty_like(weight))
)
mlp_backward.register_fake(
    lambda grad, x, gate, up, *weights_rows: tuple(
        torch.empty_like(t) for t in (x, *weights_rows[:3])
    )
)
attention_backward.register_fake(
    lambda grad, q, k, v, rows: tuple(torch.empty_like(t) for t in (q, k, v))
)


class RowProduct(torch.autograd.Function):
    """x (..., C) @ weight.T (D, C)."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return *linear_backward(grad, *ctx.saved_tensors), None


class RowLinear(nn.Linear):
    """nn.Linear, but for the backward pass; a plain one while `rows` is None. So are the next two."""

    rows = None

    def forward(self, x):
        if self.rows is None:
            return super().forward(x)
        y = RowProduct.apply(x, self.weight, self.rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, rows):
        gate, up = F.linear(x, w_gate), F.linear(x, w_up)
        ctx.save_for_backward(x, gate, up, w_gate, w_up, w_down, rows)
        return F.linear(F.silu(gate) * up, w_down)

    @staticmethod
    def backward(ctx, grad):
        return *mlp_backward(grad, *ctx.saved_tensors), None


class RowMLP(MLP):
    """Where all rows count, too, two wide tensors are stored instead of four; a compiler does that by itself."""

    rows = None

    def forward(self, x):
        if self.rows is None and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            return super().forward(x)
        return SwiGLU.apply(
            x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.rows
        )


class RowAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows):
        ctx.save_for_backward(q, k, v, rows)
        return Attention.attend(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        return *attention_backward(grad, *ctx.saved_tensors), None


class RowAttention(Attention):
    """On CPU, for plain causal attention; elsewhere dropped rows are zeros in the built-in backward pass."""

    rows = None

    def attend(self, q, k, v, mask=None):
        if self.rows is None or mask is not None or not q.is_cpu:
            return super().attend(q, k, v, mask)
        return RowAttend.apply(q, k, v, self.rows)


BACKWARD = {
    "exact": lambda layers: layers[-1:],
    "pruned": lambda layers: layers,
    "pruned_all": lambda layers: layers,
}


class FastLoss(slm.WithLoss):
    """slm.WithLoss with a cheaper head and backward pass; parameters keep their names.

    forward(x, y, select, count=number of tokens that `select` will keep); without `count` the plain backward pass.
    """

    def __init__(self, model, head="kept", backward="exact"):
        super().__init__(model, heads.HEADS[head])
        self.parts = []
        if (head, backward) == ("full", "exact"):
            return  # the reference form, plain throughout
        few = BACKWARD[backward](
            model.model.layers
        )  # blocks whose backward pass sees kept rows only
        for block in model.model.layers:
            if block.mlp.down_proj.bias is None:
                block.mlp.__class__ = RowMLP  # the same weights under the same names
            if block in few:
                linears = [block.self_attn.q_proj, block.self_attn.o_proj]
                linears += [block.self_attn.k_proj, block.self_attn.v_proj] * (
                    backward == "pruned_all"
                )
                linears += [] if type(block.mlp) is RowMLP else block.mlp.children()
                for linear in linears:
                    linear.__class__ = RowLinear
                block.self_attn.__class__ = RowAttention
                self.parts += [part for part in block.modules() if hasattr(part, "rows")]

    def forward(self, x, y, select=None, entropy=False, count=None):
        # One index per micro-batch, empty until the losses are known: each layer's backward holds on to its own.
        rows = None
        if select is not None and count is not None and count < y.numel():
            rows = torch.zeros(count, dtype=torch.long, device=y.device)
        for part in self.parts:
            part.rows = rows
        if select is None:
            return super().forward(x, y, entropy=entropy)

        def choose(losses):
            kept = select(losses.view_as(y)).flatten()
            if rows is not None:
                rows.data.copy_(
                    heads.rows_of(kept, count)
                )  # .data: autograd shall not take this for a change of its input
            return kept

        hidden, targets = self.lm(x).flatten(0, 1), y.flatten()
        total, losses, kept = self.head(hidden, self.lm.head_weight, targets, choose, count)
        return total, losses.view_as(y), kept.view_as(y)
