"""Parts of a block whose backward pass sees kept rows only.

In the last block that is exact: but for keys and values, no other row has a gradient there. In
all blocks it is AN APPROXIMATION, `--backward pruned`: what a kept token's loss says about earlier
tokens still flows through keys, values and the residual stream; what it says through their
queries and MLPs is dropped.

`rows`, the positions of the kept rows, is filled in after the forward pass, when the losses are
known. Each backward pass is an operator of its own, so that torch.compile cannot gather rows ahead
of time.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, attend
from slm import at_least_fp32

QUERIES = 64  # of attention's backward pass on CPU, at a time


@torch.library.custom_op("slm::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (..., C) and weight (D, C) from that of x @ weight.T, grad (..., D).

    Only `rows` of the flattened grad count.
    """
    g, x_rows = pick(rows, grad, x)  # (kept, D), (kept, C)
    d_x = g @ weight.to(g.dtype)
    d_weight = g.T @ x_rows.to(g.dtype)
    return put(rows, d_x, x), d_weight.to(weight.dtype)


@linear_backward.register_fake
def _(grad, x, weight, rows):
    return torch.empty_like(x), torch.empty_like(weight)


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
    """Gradients of x, w_gate, w_up and w_down in (silu(gate) * up) @ w_down.T.

    gate = x @ w_gate.T, up = x @ w_up.T. `rows` None: all count.
    """
    like = x
    g, x, gate, up = pick(rows, grad, x, gate, up)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_hidden = g @ w_down.to(g.dtype)
    d_down = g.T @ (silu * up)
    d_silu = sigmoid.add_(silu * (1 - sigmoid))
    d_gate = (d_hidden * up).mul_(d_silu)
    d_up = d_hidden.mul_(silu)
    d_x = torch.addmm(d_gate @ w_gate.to(g.dtype), d_up, w_up.to(g.dtype))
    d_weights = [d.to(w_gate.dtype) for d in (d_gate.T @ x, d_up.T @ x, d_down)]
    return put(rows, d_x, like), *d_weights


@mlp_backward.register_fake
def _(grad, x, gate, up, w_gate, w_up, w_down, rows):
    return tuple(torch.empty_like(t) for t in (x, w_gate, w_up, w_down))


@torch.library.custom_op("slm::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (B, H, T, D), k and v (B, H_kv, T, D) in causal attention.

    Only the queries in `rows` of (B T) count. A loop over windows, QUERIES queries at a time, each
    with the keys before it: on CPU cheaper than the built-in backward pass of all queries. Heads
    that share a key are one matrix product.
    """
    H, T, D = q.shape[1:]
    n_kv = k.shape[1]
    scale = D**-0.5
    d_q = torch.zeros_like(q)
    d_k = torch.zeros_like(k)
    d_v = torch.zeros_like(v)
    for b in range(len(q)):
        mine = rows[rows // T == b] % T  # ascending
        if len(mine) == 0:
            continue
        for at in mine.split(QUERIES):
            n = int(at[-1]) + 1  # keys that they may see
            query = q[b].index_select(1, at).view(n_kv, -1, D)  # (H_kv, H / H_kv * at, D)
            g = grad[b].index_select(1, at).view(n_kv, -1, D)
            key = k[b, :, :n]
            value = v[b, :, :n]
            scores = at_least_fp32(query @ key.mT).mul_(scale)
            later = torch.arange(n) > at[:, None]
            scores.view(H, len(at), n).masked_fill_(later, -torch.inf)
            p = scores.softmax(-1)
            d_p = at_least_fp32(g @ value.mT)
            mean = (d_p * p).sum(-1, keepdim=True)
            d_scores = d_p.sub_(mean).mul_(p).mul_(scale).to(q.dtype)
            d_q[b].index_copy_(1, at, (d_scores @ key).view(H, len(at), D))
            d_k[b, :, :n] += d_scores.mT @ query
            d_v[b, :, :n] += p.to(q.dtype).mT @ g
    return d_q, d_k, d_v


@attention_backward.register_fake
def _(grad, q, k, v, rows):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def pick(rows, *tensors):
    """`rows` (None: all) of tensors (..., C), flattened to (N, C)."""
    tensors = [t.flatten(0, -2) for t in tensors]
    if rows is None:
        return tensors
    return [t.index_select(0, rows) for t in tensors]


def put(rows, values, like):
    """`values` (kept, C) in their rows of a tensor of zeros of the shape and dtype of `like`."""
    values = values.to(like.dtype)
    if rows is None:
        return values.view_as(like)
    out = torch.zeros_like(like).flatten(0, -2)
    return out.index_copy_(0, rows, values).view_as(like)


# --------------------------------------------------------------------------------------------------
# The parts, each made from the plain one: the same parameters under the same names. While `rows`
# is None they are the plain ones.


class RowLinear(nn.Module):
    rows = None

    def __init__(self, plain):
        super().__init__()
        self.weight = plain.weight
        self.bias = plain.bias

    def forward(self, x):
        if self.rows is None:
            return F.linear(x, self.weight, self.bias)
        y = RowProduct.apply(x, self.weight, self.rows)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)


class RowProduct(torch.autograd.Function):
    """x (..., C) @ weight.T (D, C)."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return *linear_backward(grad, *ctx.saved_tensors), None


class RowMLP(MLP):
    """Two wide tensors are stored instead of four, also where all rows count.

    (A compiler does that by itself.)
    """

    rows = None

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.gate_proj = plain.gate_proj
        self.up_proj = plain.up_proj
        self.down_proj = plain.down_proj

    def forward(self, x):
        if self.rows is None and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            return super().forward(x)
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return SwiGLU.apply(x, *weights, self.rows)


class SwiGLU(torch.autograd.Function):
    """(silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T"""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, rows):
        gate = F.linear(x, w_gate)
        up = F.linear(x, w_up)
        ctx.save_for_backward(x, gate, up, w_gate, w_up, w_down, rows)
        return F.linear(F.silu(gate) * up, w_down)

    @staticmethod
    def backward(ctx, grad):
        return *mlp_backward(grad, *ctx.saved_tensors), None


class RowAttend(nn.Module):
    """model.attend on CPU, for plain causal attention.

    Elsewhere dropped rows are zeros in the built-in backward pass.
    """

    rows = None

    def forward(self, q, k, v, mask=None):
        if self.rows is None or mask is not None or not q.is_cpu:
            return attend(q, k, v, mask)
        return CausalAttention.apply(q, k, v, self.rows)


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows):
        ctx.save_for_backward(q, k, v, rows)
        return attend(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        return *attention_backward(grad, *ctx.saved_tensors), None


def see_kept_rows(block):
    """Put row-wise parts into a block, and return them: their `rows` are to be set."""
    attention = block.self_attn
    attention.q_proj = RowLinear(attention.q_proj)
    attention.o_proj = RowLinear(attention.o_proj)
    attention.attend = RowAttend()
    parts = [attention.q_proj, attention.o_proj, attention.attend]
    if isinstance(block.mlp, RowMLP):
        return [*parts, block.mlp]
    for name, linear in list(block.mlp.named_children()):  # with biases
        setattr(block.mlp, name, RowLinear(linear))
    return [*parts, *block.mlp.children()]
