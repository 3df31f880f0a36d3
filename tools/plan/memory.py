"""How much memory a training step needs, counted on tensors that have a shape but no storage.

The kit's own step (model.py, heads.py) runs under PyTorch's FakeTensorMode while every allocation and release is noted: no
formula that could go stale when the model changes. A step costs the same for each further layer, so two small depths
are run and the rest is a line. What is not seen: the allocator's rounding and gaps, and that torch.compile
keeps less. FSDP2 is arithmetic on top.
"""

import contextlib
import dataclasses
import weakref
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Config, Transformer
from training import heads
from training.loss import FastLoss


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are still alive: `now`, and `peak` since it was last set."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def phase(self):
        """The peak since the last phase began."""
        peak, self.peak = self.peak, self.now
        return peak


@contextlib.contextmanager
def known_rows():
    """Which rows are kept is data, and there is none here: any `count` rows."""
    real, heads.rows_of = heads.rows_of, lambda kept, count: torch.arange(count)
    try:
        yield
    finally:
        heads.rows_of = real


def run_step(config, micro_batch, seq_len, k, head, backward, checkpointing, bf16, accumulate):
    """Bytes above weights and optimiser in one forward and backward pass of `config` as it is: (live after the trunk,
    then the peaks of: forward; backward down to below the last block; the rest of the backward)."""
    with known_rows(), FakeTensorMode():
        model = Transformer(config)
        model.checkpointing = checkpointing
        module = FastLoss(model, head, backward)
        x = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        count = x.numel() if k == 1 else max(1, int(k * x.numel() + 0.5))
        live, seen = Live(), []
        with live:
            if accumulate:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            model.model.norm.register_forward_hook(lambda *_: seen.append(live.now))

            def at_the_last_block(_, inputs):
                inputs[0].register_hook(lambda grad: seen.append(live.phase()))

            model.model.layers[-1].register_forward_pre_hook(at_the_last_block)
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                total, losses, kept = module(
                    x, x, lambda losses: torch.ones_like(losses, dtype=torch.bool), count=count
                )
            del losses, kept
            forward = live.phase()
            (total / count).backward()
            end = live.phase()
    trunk, top, *_ = seen  # with checkpointing the block runs, and calls, a second time
    return trunk, forward, top, end


@cache
def _step(shape, *settings):
    a, b = (
        run_step(dataclasses.replace(_config(shape), num_hidden_layers=n), *settings)
        for n in (2, 3)
    )
    return a, [y - x for x, y in zip(a, b)]


def _config(shape):
    return Config(**dict(shape))


def step_bytes(
    config,
    micro_batch,
    seq_len,
    k=1.0,
    head="kept",
    backward="exact",
    checkpointing=False,
    bf16=True,
    accumulate=False,
):
    """(bytes after the trunk's forward pass, peak down to the last block's backward, peak of all) of one training step,
    above weights and optimiser."""
    shape = tuple(
        (f.name, getattr(config, f.name))
        for f in dataclasses.fields(config)
        if isinstance(getattr(config, f.name), (int, float, type(None)))
    )
    at_two, per_layer = _step(
        shape, micro_batch, seq_len, k, head, backward, checkpointing, bf16, accumulate
    )
    trunk, forward, top, end = (
        x + (config.num_hidden_layers - 2) * y for x, y in zip(at_two, per_layer)
    )
    return trunk, max(forward, top), max(forward, top, end)


def counts(config):
    """Parameters: (all, of the embedding, final norm and head, of one block)."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, num_hidden_layers=1))
    block = sum(p.numel() for p in model.model.layers.parameters())
    rest = sum(p.numel() for p in model.parameters()) - block
    return rest + config.num_hidden_layers * block, rest, block


def memory(
    config,
    micro_batch,
    seq_len,
    ranks=1,
    parallel="ddp",
    accumulate=False,
    bf16=True,
    moments="float32",
    **settings,
):
    """Bytes on one rank, by part, and the "peak": parts that never live at the same moment are in it once.

    weights, gradients, optimiser: fp32, AdamW's two moments (`--moments`). activations: after the trunk's forward pass. cast: the
    bf16 copies of matrices that autocast keeps. head: what logits and temporaries add at the peak. ranks: DDP's
    second copy of the gradients (its buckets), or what FSDP2 gathers.
    """
    n, outer, block = counts(config)
    trunk, early, peak = step_bytes(
        config, micro_batch, seq_len, bf16=bf16, accumulate=accumulate, **settings
    )
    cast, held = 2 * (n - outer) * bf16, 4 * n * accumulate
    parts = {
        "weights": 4 * n,
        "gradients": 4 * n,
        "optimiser": (4 if moments == "bfloat16" else 8) * n,
        "activations": trunk - cast - held,
        "cast": cast,
        "head": early - trunk,
        "ranks": 0,
    }
    if ranks > 1 and parallel == "ddp":
        parts["ranks"] = 4 * n
    elif (
        ranks > 1
    ):  # FSDP2 as runtime.wrap does it: embedding, norm and head stay gathered in a step, and two blocks
        for name in ("weights", "gradients", "optimiser"):
            parts[name] //= ranks
        parts["ranks"] = (
            4 * (outer + 2 * block) + 4 * block + held
        )  # gradients stay whole until the last micro-batch
        return parts, sum(parts.values())
    return parts, parts["weights"] + parts["optimiser"] + parts["ranks"] + peak
