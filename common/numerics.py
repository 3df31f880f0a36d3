"""What rounding depends on: noted beside stored losses and in a run's identity, and compared.

The excess is a small difference of two losses. It means what it should where both were computed in
one way.
"""

import torch

from common.attention import path_of
from common.errors import command

# Losses of another kind: these are not compared at all.
REFUSED = {
    "data": "token set",
    "seq_len": "windows of",
    "dtype": "precision",
    "document_mask": "document mask",
}
# The same losses, rounded in another way.
SAID = {
    "device": "device",
    "compile": "compile",
    "attention": "attention",
    "norms": "embedding and norms in",
    "micro_batch": "windows per forward pass",
    "torch": "torch",
}
# What a record means that does not hold it yet.
BEFORE = {"document_mask": False}


def is_compiled(args, device):
    """Does `--compile` (auto, on, off) mean that blocks are compiled on this device?"""
    if args.compile == "auto":
        return device.type == "cuda"
    return args.compile == "on"


def numerics(args, env, micro_batch):
    """What the losses' rounding depends on, as JSON.

    micro_batch: windows per forward pass and rank.
    """
    document_mask = bool(getattr(args, "document_mask", False))
    dtype = str(env.dtype).removeprefix("torch.")
    sharded = env.world > 1 and getattr(args, "parallel", None) == "fsdp"
    return {
        "dtype": dtype,
        "document_mask": document_mask,
        "device": device_name(env.device),
        "compile": is_compiled(args, env.device),
        "attention": path_of(env.device, document_mask),
        # FSDP gathers every weight in that precision; elsewhere only products round theirs.
        "norms": dtype if sharded else "float32",
        "micro_batch": micro_batch,
        "torch": torch.__version__,
    }


def device_name(device):
    """The GPU's name; of a CPU, which kernels PyTorch chooses for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}"


def differences(saved, now, names):
    """[(name, value in `saved`, value in `now`)] of those that both records hold and that differ.

    `names`: REFUSED or SAID.
    """
    saved = {**BEFORE, **saved}
    shared = [name for name in names if saved.get(name) is not None and name in now]
    return [(name, saved[name], now[name]) for name in shared if saved[name] != now[name]]


def notice(what, saved, now):
    """One line where `what`, such as "ref_loss.bin", was computed in another way; else None."""
    differing = differences(saved, now, SAID)
    if not differing:
        return None
    changes = "; ".join(f"{SAID[name]} {old} -> {new}" for name, old, new in differing)
    return (
        f"note: {what} was computed in another way ({changes}). Rounding differs a little, and "
        f"the excess holds that difference; how to measure what it changes: "
        f"{command('-m', 'tools.precision', '--help')}"
    )
