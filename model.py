"""The transformer: Llama, Mistral, Qwen2, Qwen3 and their like, under Hugging Face's own names.

RMSNorm, rotary positions (half-split, as Hugging Face stores them), grouped-query attention,
SwiGLU, optional sliding window, normed queries and keys, tied or untied head. `Transformer`
returns the hidden states after the final norm. What is done with the head (full logits, kept rows
only, the last position only) is the caller's business: slm.py, training/heads.py,
evaluation/generate.py. Reading and writing Hugging Face folders is in hf/checkpoint.py.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.attention import attend_in_blocks, text_mask


@dataclass
class Config:
    """Hyper-parameters under Hugging Face's config names.

    `head_dim` defaults to hidden_size / num_attention_heads.
    """

    vocab_size: int
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", ...}
    # A token sees itself and the sliding_window - 1 tokens before it.
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias of q, k, v and o
    # Two that no config.json names: they follow from its model_type, see hf/config.py.
    qkv_bias: bool = False  # bias of q, k and v
    qk_norm: bool = False  # each head's query and key is normed before it is rotated
    mlp_bias: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    # What config.json holds besides, carried along unread.
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


def rope_frequencies(config):
    """Inverse frequencies of the rotary embedding, with the config's scaling, (head_dim / 2,)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequency = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # Llama 3: long wavelengths are stretched, short ones kept, those between interpolated.
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    blend = blend.clamp(0, 1)
    return blend * frequency + (1 - blend) * frequency / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary position embedding in the half-split layout.

    x (B, H, T, D), cos and sin (B or 1, 1, T, D / 2) fp32.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        shape = (x.shape[-1],)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # The residual stream is fp32. Cast here, once, and not in each product that follows.
            scaled = F.rms_norm(x.float(), shape, self.weight.float(), self.eps)
            return scaled.to(torch.get_autocast_dtype(device))
        # normalised in fp32, cast back, then scaled: the order matters in bf16
        normed = F.rms_norm(x.float(), shape, eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


def attend(q, k, v, mask=None):
    """Attention of q (B, H, T, D) over k and v (B, H_kv, S, D) -> (B, H, T, D).

    `mask` None: causal; else (B or 1, 1, T, S) bool, True = may look, or a BlockMask.
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        return attend_in_blocks(q, k, v, mask)
    shared = k.shape[1] != q.shape[1]
    # Masked kernels do not take shared heads, and a GPU's of fp32 neither.
    if shared and (mask is not None or (q.is_cuda and q.dtype == torch.float32)):
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        shared = False
    # is_causal only for equal lengths: with a cache it would align the mask to the top left
    causal = mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared
    )


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        self.attend = attend  # another form may stand here, see training/pruned.py
        bias = c.attention_bias or c.qkv_bias
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, store=None):
        """x (B, T, C) -> (B, T, C). `mask`: as in `attend`.

        `store(k, v) -> [(k, v)]` puts this call's keys and values into a cache and returns all
        parts of it.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if store is not None:
            parts = store(k, v)
            if T == 1:
                return self.o_proj(attend_one(q, parts, mask).reshape(B, T, -1))
            keys, values = zip(*parts)
            k = torch.cat([part.expand(B, -1, -1, -1) for part in keys], dim=2)
            v = torch.cat([part.expand(B, -1, -1, -1) for part in values], dim=2)
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask=None, store=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head; its own module, for Hugging Face's tensors are called model.*"""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """A language model of the Llama family. `head_weight` is the output matrix (V, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Not a buffer: it stays fp32 whatever the module is cast to.
        self.frequencies = rope_frequencies(config)
        # The token that ends a document: attention then stays inside of each (`--document-mask`).
        # None: it crosses their borders, as in the paper's packing.
        self.document_end = None
        # Recompute each block in the backward pass instead of storing its activations?
        self.checkpointing = False

    @property
    def head_weight(self):
        return self.lm_head.weight

    def forward(self, tokens, cache=None, tail=None):
        """tokens (B, T) -> hidden states after the final norm (B, T, C).

        With a `Cache`, tokens[b] go to its row b (it may have more rows), behind the prefix and the
        lengths[b] tokens there, and the lengths grow by T, or by `tail` (B,), which counts the real
        tokens of each row; the rest is padding on the right, its output meaningless.
        """
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream is a long sum: it stays fp32, as the weights are.
            x = x.float()
        slots = None
        if cache is None:
            positions, mask = self._in_text(tokens)
        else:
            slots, positions, length = cache.places(*tokens.shape)
            mask = self._in_cache(positions, length)
        self.frequencies = self.frequencies.to(x.device)
        angles = positions[:, None, :, None].float() * self.frequencies  # (B or 1, 1, T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.model.layers):
            if cache is not None:
                x = layer(x, cos, sin, mask, partial(cache.put, i, slots=slots))
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask)
        if cache is not None:
            cache.advance(*tokens.shape, tail)
        return self.model.norm(x)

    def _in_text(self, tokens):
        """Positions (B or 1, T) and mask of whole windows, as they are trained on."""
        T = tokens.shape[1]
        documents, positions = None, torch.arange(T, device=tokens.device)[None]
        if self.document_end is not None:
            documents, positions = documents_of(tokens, self.document_end)
        c = self.config
        return positions, text_mask(documents, c.sliding_window, T, tokens.device, c.head_dim)

    def _in_cache(self, positions, length):
        """Which keys 0..length-1 each query may see, (B, 1, T, S); None: plain causal attention.

        An empty cache needs no mask: causal attention hides the padding on the right.
        """
        T, window = positions.shape[1], self.config.sliding_window
        cached = length > T or T == 1
        if not cached and (window is None or length <= window):
            return None
        keys = torch.arange(length, device=positions.device)
        mask = keys <= positions[..., None]
        if window is not None:
            mask &= keys > positions[..., None] - window
        return mask[:, None]

    def cast_products(self, dtype):
        """Cast once what autocast casts in every forward pass: all matrices that multiply.

        For a model that does not learn: the result is the same. An embedding that is tied to the
        head keeps its dtype, and so do norms.
        """
        for module in self.modules():
            tied = module is self.lm_head and self.config.tie_word_embeddings
            if isinstance(module, nn.Linear) and not tied:
                module.to(dtype)

    def logits(self, tokens):
        """Logits of every position, (B, T, V) fp32. For tests: training has heads of its own."""
        return F.linear(self(tokens), self.head_weight).float()


def documents_of(tokens, end):
    """Which document of its window each token is in, and its position there, both (B, T).

    A document ends with the token `end`, which belongs to it.
    """
    ends = (tokens == end).long()
    documents = ends.cumsum(1) - ends
    places = torch.arange(tokens.shape[1], device=tokens.device)
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = ends[:, :-1] == 1
    starts = torch.where(begins, places, 0).cummax(1).values
    return documents, places - starts


def initialise(model, seed):
    """Random weights for training from scratch, by the seed alone.

    Embeddings N(0, 0.1); matrices N(0, 1/fan_in), those that write into the residual stream half
    of that.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            std = 0.1
        elif p.dim() == 2:
            std = p.shape[1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1.0)
        else:
            continue
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


# --------------------------------------------------------------------------------------------------
# Generation: one token a step, keys and values kept.


class Cache:
    """Keys and values for generation, preallocated.

    Row b holds `lengths[b]` tokens, each in the slot of its position. `keys` and `values`: per
    layer (rows, H_kv, S, D). Rows may have different lengths; what lies behind a row's length is
    never attended to. `used`: no row is longer (a plain int, so that nobody has to ask the device).
    `prefix`: another cache, of one row whose tokens all rows begin with; it is stored, and read in
    a step, once for all of them.
    """

    def __init__(self, config, rows, length, device="cpu", dtype=torch.float32, prefix=None):
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)
        ]
        self.values = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)
        ]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.used, self.prefix = 0, prefix

    def end(self, T):
        """No row is longer when T more tokens are there."""
        return min(self.used + T, self.keys[0].shape[2])

    def places(self, B, T):
        """Where the next T tokens of the first B rows go: slots (B, T), positions (B, T), and how
        many keys there are then, the prefix included.
        """
        shared = self.prefix.used if self.prefix else 0
        slots = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)
        return slots, slots + shared, self.end(T) + shared

    def advance(self, B, T, tail=None):
        """They are there: T tokens a row, or `tail` (B,) of them."""
        self.lengths[:B] += T if tail is None else tail
        self.used = self.end(T)

    def put(self, layer, k, v, slots):
        """Store keys and values (B, H_kv, T, D) in `slots` (B, T) of the first B rows.

        Returns what there is to attend to, [(k, v)]: the prefix (1, H_kv, P, D) if any, then the
        rows' own (B, H_kv, `used` after this call, D).
        """
        keys, values, B = self.keys[layer], self.values[layer], len(k)
        rows = torch.arange(B, device=k.device)[:, None]
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
        end = self.end(slots.shape[1])
        own = (keys[:B, :, :end], values[:B, :, :end])
        if self.prefix is None:
            return [own]
        P = self.prefix.used
        shared = (self.prefix.keys[layer][:, :, :P], self.prefix.values[layer][:, :, :P])
        return [shared, own]


def attend_one(q, parts, mask):
    """Attention of one query per row, q (B, H, 1, D), over all of `parts` -> (B, H, 1, D).

    `parts`: [(k, v)] of (B or 1, H_kv, S, D); `mask` (B, 1, 1, S of all parts). The heads that
    share a key are rows of one matrix product, and so are all rows of the batch for a part that
    they share: no key is copied.
    """
    B, H, _, D = q.shape
    q = q.reshape(B, parts[0][0].shape[1], -1, D) * D**-0.5  # (B, H_kv, H / H_kv, D)
    scores = [
        torch.einsum("bkgd,ksd->bkgs", q, k[0]) if len(k) == 1 else q @ k.mT for k, _ in parts
    ]
    weights = torch.cat(scores, -1).float().masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    weights = weights.split([k.shape[2] for k, _ in parts], dim=-1)
    y = [
        torch.einsum("bkgs,ksd->bkgd", w, v[0]) if len(v) == 1 else w @ v
        for w, (_, v) in zip(weights, parts)
    ]
    return sum(y).reshape(B, H, 1, D)
