"""How much memory a training step needs, counted on tensors that have a shape but no storage.

The kit's own step (model.py and training/) runs under PyTorch's FakeTensorMode while every
allocation and release is noted: there is no formula that could go stale when the model changes. A
step costs the same for each further layer, so two small depths are run and the rest is a line. Two
things are not seen: the allocator's rounding and gaps, and that torch.compile keeps less. FSDP2 is
arithmetic on top.
"""

import contextlib
import dataclasses
import weakref
from functools import cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Config, Transformer
from training import heads, loss
from training.moments import moment_bytes


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are still alive: `now`, and `peak` of this phase."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def phase(self):
        """The peak since the last phase began; the next begins."""
        peak = self.peak
        self.peak = self.now
        return peak


class Step(NamedTuple):
    """Bytes above weights and optimiser in one forward and backward pass."""

    trunk: float  # live after the trunk's forward pass
    forward: float  # peaks of: the forward pass,
    top: float  # the backward pass down to below the last block,
    rest: float  # and the rest of it


@contextlib.contextmanager
def as_on_a_gpu():
    """Heads multiply what a GPU would. Which rows are kept is data, and there is none here: any."""
    real = heads.rows_of, heads.factor_dtype
    heads.rows_of = loss.rows_of = any_rows
    heads.factor_dtype = lambda hidden: hidden.dtype
    try:
        yield
    finally:
        heads.rows_of, heads.factor_dtype = real
        loss.rows_of = heads.rows_of


def any_rows(kept, count):
    return torch.arange(len(kept) if count is None else count)


def run_step(
    config, micro_batch, seq_len, k, head, backward, checkpointing, bf16, told, accumulate
):
    """A Step of a model as `config` has it. With `accumulate` gradients lie there before.

    told: is the number of kept tokens known before their losses? Not so with weights.
    """
    with as_on_a_gpu(), FakeTensorMode():
        model = Transformer(config)
        model.checkpointing = checkpointing
        module = loss.FastLoss(model, head, backward)
        x = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        count = x.numel() if k == 1 else max(1, int(k * x.numel() + 0.5))
        live = Live()
        after_trunk, after_last_block = [], []

        def at_the_norm(module, inputs, output):
            after_trunk.append(live.now)

        def at_the_last_block(module, inputs):
            inputs[0].register_hook(lambda grad: after_last_block.append(live.phase()))

        def select(losses):
            return torch.ones_like(losses, dtype=torch.bool)

        for p in model.parameters():  # a view of a weight is nothing new
            live.known.add(p.untyped_storage()._cdata)
        with live:
            if accumulate:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            model.model.norm.register_forward_hook(at_the_norm)
            model.model.layers[-1].register_forward_pre_hook(at_the_last_block)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total, losses, kept = module(x, x, select, count=count if told else None)
            del losses, kept
            forward = live.phase()
            (total / count).backward()
            rest = live.phase()
    # With checkpointing the last block runs, and its hook is called, a second time.
    return Step(after_trunk[0], forward, after_last_block[0], rest)


@cache
def two_depths(shape, *settings):
    """(Step of two layers, what each further layer adds); `shape`: the Config's fields as pairs."""
    two, three = (
        run_step(dataclasses.replace(Config(**dict(shape)), num_hidden_layers=n), *settings)
        for n in (2, 3)
    )
    return two, Step(*(b - a for a, b in zip(two, three)))


def hashable(config):
    """The Config's fields that decide about shapes, as pairs, for what is cached."""
    return tuple(
        (field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), (int, float, type(None)))
    )


def step_bytes(
    config,
    micro_batch,
    seq_len,
    k=1.0,
    head="kept",
    backward="exact",
    checkpointing=False,
    bf16=True,
    told=True,
    accumulate=False,
):
    """Bytes above weights and optimiser in one training step.

    Returns (after the trunk's forward pass, peak down to the last block's backward, peak of all).
    """
    two, per_layer = two_depths(
        hashable(config),
        micro_batch,
        seq_len,
        k,
        head,
        backward,
        checkpointing,
        bf16,
        told,
        accumulate,
    )
    further = config.num_hidden_layers - 2
    step = Step(*(a + further * b for a, b in zip(two, per_layer)))
    early = max(step.forward, step.top)
    return step.trunk, early, max(early, step.rest)


def counts(config):
    """Parameters: (all, of the embedding, final norm and head, of one block)."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, num_hidden_layers=1))
    block = sum(p.numel() for p in model.model.layers.parameters())
    rest = sum(p.numel() for p in model.parameters()) - block
    return rest + config.num_hidden_layers * block, rest, block


@cache
def _shapes(shape):
    """[(shape of a parameter, how often it is there)]; `shape`: the Config's fields as pairs."""
    config = Config(**dict(shape))
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, num_hidden_layers=1))
    layers = {id(p) for p in model.model.layers.parameters()}
    found = []
    for p in model.parameters():
        found.append((p.shape, config.num_hidden_layers if id(p) in layers else 1))
    return found


def moments_of(config, moments):
    """Bytes of AdamW's two moments, as `--moments` says."""
    found = _shapes(hashable(config))
    return sum(times * moment_bytes(shape, moments) for shape, times in found)


def memory(
    config,
    micro_batch,
    seq_len,
    ranks=1,
    parallel="ddp",
    accumulate=False,
    bf16=True,
    moments="float32",
    reshard="default",
    shards=None,
    **settings,
):
    """(bytes on one rank by part, their peak). Parts that never live together are in it once.

    weights, gradients, optimiser   fp32; AdamW's two moments as `--moments` says
    activations   after the trunk's forward pass
    cast          the bf16 copies of matrices that autocast keeps
    head          what logits and temporaries add at the peak
    ranks         what FSDP2 gathers and reduces

    shards: ranks that share a copy of the states (`--shard-size`), None: all of them.
    """
    n, outer, block = counts(config)
    sharded = ranks > 1 and parallel == "fsdp"
    # FSDP2 reduces gradients in each micro-batch: those of earlier ones are not held whole.
    accumulate = accumulate and not sharded
    trunk, early, peak = step_bytes(
        config, micro_batch, seq_len, bf16=bf16, accumulate=accumulate, **settings
    )
    cast = 2 * (n - outer) if bf16 else 0
    held = 4 * n if accumulate else 0  # gradients of the micro-batches before
    parts = {
        "weights": 4 * n,
        "gradients": 4 * n,
        "optimiser": moments_of(config, moments),
        "activations": trunk - cast - held,
        "cast": cast,
        "head": early - trunk,
        "ranks": 0,
    }
    if sharded:
        for name in ("weights", "gradients", "optimiser"):
            parts[name] //= shards or ranks
        # As parallel.shard does: bf16 copies are gathered instead of cast, two blocks at a time
        # (with --reshard-after-forward never all stay); those of embedding, norm and head stay.
        # One group's gradients are made, and reduced in fp32.
        blocks = config.num_hidden_layers if reshard == "never" else 2
        size = 2 if bf16 else 4
        parts["cast"] = 0
        parts["ranks"] = size * (outer + blocks * block) + (size + 4) * max(outer, block)
        return parts, sum(parts.values())
    if ranks > 1:  # DDP's gradients are views of its buckets
        return parts, parts["weights"] + parts["optimiser"] + peak
    return parts, parts["weights"] + parts["optimiser"] + parts["ranks"] + peak
