"""How many kept tokens does rounding exchange? The choice in bf16 beside the one in fp32.

    python -m tools.precision --model out/demo/base --reference out/demo/ref --data data/demo/corpus
    python -m tools.precision --model TinyLlama/TinyLlama_v1.1 --reference out/ref \\
        --data data/corpus --seq-len 2048 --micro-batch-size 4 --windows 64          # a GPU

The excess is a small difference of two losses, so their rounding can change which tokens are kept.
Both models' losses are computed on the first windows of a token set: once with fp32 products, and
then in the forms below, each for student and reference alike. The reference's are rounded to fp16,
as score.py stores them.
"""

import json
from typing import NamedTuple

from common.device import Env, free_memory  # first: it sets how torch's threads wait

import numpy as np
import torch
import torch.nn.functional as F

import slm
from common.command_line import Parser, add_compile, add_machine, share, whole
from common.compiling import compile_blocks
from common.errors import UserError, cli
from common.files import write_atomic
from common.numerics import is_compiled
from data import TokenSet
from hf import checkpoint, models


class Form(NamedTuple):
    """A way to compute losses."""

    name: str
    dtype: torch.dtype
    tf32: bool = False  # products of fp32 by a GPU's TF32
    compiled: bool = False
    rounded: bool = False  # are logits rounded as well? The kit never does that


EXACT = Form("float32", torch.float32)


def forms_of(args, env):
    """The forms that are compared with fp32, for this machine."""
    forms = [EXACT]
    on_gpu = env.device.type == "cuda"
    if on_gpu:
        forms.append(Form("float32 (TF32)", torch.float32, tf32=True))
    forms.append(Form("bfloat16", torch.bfloat16, tf32=True))
    if is_compiled(args, env.device):
        forms.append(Form("bfloat16, compiled", torch.bfloat16, tf32=True, compiled=True))
    forms.append(Form("bfloat16, logits as well", torch.bfloat16, tf32=True, rounded=True))
    return forms


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.usage = "python -m tools.precision --model FOLDER --reference FOLDER --data DIR"
    add = parser.add_argument
    add("--model", required=True, help="the student: folder or hub id")
    add("--reference", required=True, help="the reference: folder or hub id")
    add("--revision", help="revision of a hub id")
    add("--data", required=True, metavar="DIR", help="token set, of the corpus")
    add("--seq-len", type=whole(1), default=128, help="tokens per window")
    add("--micro-batch-size", type=whole(1), default=8, help="windows that are ranked together")
    add("--windows", type=whole(1), default=24, help="how many windows are looked at")
    add("--k", type=share, default=0.6, help="share of the tokens that is kept")
    add("--json", help="write the results here too (FILE)")
    add_machine(parser)
    add_compile(parser)
    args = parser.parse_args(argv)
    if args.k == 1:
        raise UserError("--k: got 1, wanted less: with every token kept there is no choice")
    return args


def main():
    args = arguments()
    env = Env(args)
    data = TokenSet(args.data)
    asked = np.arange(min(args.windows, data.n_windows(args.seq_len)))
    batches = np.split(asked, range(args.micro_batch_size, len(asked), args.micro_batch_size))
    valid = torch.from_numpy(data.valid(asked, args.seq_len))
    if not valid.any():
        raise UserError(
            f"--data {args.data}: no token of its first {len(asked)} windows is a target"
        )
    losses = {}
    for name in (args.reference, args.model):
        folder = models.folder_of(name, args.revision, data, env)
        for form in forms_of(args, env):
            losses[name, form] = losses_of(folder, form, data, batches, args, env)
    exact = losses[args.model, EXACT] - losses[args.reference, EXACT]
    rows = {}
    for form in forms_of(args, env):
        stored = losses[args.reference, form].half().float()
        found = losses[args.model, form] - stored
        rows[form.name] = compare(exact, found, valid, args.k, args.micro_batch_size)
    show(rows, exact[valid], args)
    if args.json:
        write_atomic(args.json, json.dumps(rows, indent=1))


@torch.no_grad()
def losses_of(folder, form, data, batches, args, env):
    """The losses of the model in `folder` on lists of windows, (windows, T) fp32 on the CPU."""
    model = slm.WithLoss(checkpoint.load(folder, device=env.device)).eval()
    if form.compiled:
        compile_blocks(model, args, env)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if form.tf32 else "highest")
    found = []
    try:
        for windows in batches:
            x, y, _ = map(env.tensor, data.batch(windows, args.seq_len))
            bf16 = form.dtype == torch.bfloat16
            with torch.autocast(env.device.type, torch.bfloat16, enabled=bf16):
                losses = with_rounded_logits(model, x, y) if form.rounded else model(x, y)
            found.append(losses.cpu())
    finally:
        torch.set_float32_matmul_precision(before)
    del model
    free_memory(env.device)  # before the next one is there
    return torch.cat(found)


def with_rounded_logits(model, x, y):
    """Losses (B, T) as code computes them that leaves the last product to autocast."""
    hidden = model.lm(x).flatten(0, 1)
    losses = []
    for h, targets in zip(hidden.split(1024), y.flatten().split(1024)):
        logits = F.linear(h, model.lm.head_weight).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).view_as(y)


def compare(exact, found, valid, k, micro_batch_size):
    """What the choice by `found` loses against the choice by `exact`, excesses (windows, T).

    Returns {error_sd, error_median: standard deviation and median size of the error of the valid
    tokens' excess, in nats; differ: share of the kept tokens that the exact choice does not keep;
    lost: mean exact excess of its choice less that of the other's, in nats}.
    """
    chosen = {}
    for name, excess in (("exact", exact), ("found", found)):
        parts = zip(excess.split(micro_batch_size), valid.split(micro_batch_size))
        chosen[name] = torch.cat([slm.keep_top(scores, part, k) for scores, part in parts])
    both = chosen["exact"] & chosen["found"]
    n = chosen["exact"].sum().item()
    of_kept = {name: exact[mask].double().mean().item() for name, mask in chosen.items()}
    error = (found - exact)[valid]
    return {
        "error_sd": error.std().item(),
        "error_median": error.abs().median().item(),
        "differ": 1 - both.sum().item() / n,
        "lost": of_kept["exact"] - of_kept["found"],
    }


def show(rows, excess, args):
    kept = slm.n_keep(len(excess), args.k)
    mean = excess.sort(descending=True).values[:kept].mean().item()
    print(
        f"{len(excess):,} tokens, {args.micro_batch_size} windows ranked together, k {args.k:g}; "
        f"excess in nats: sd {excess.std().item():.3f}, mean of the highest {mean:.3f}\n"
    )
    columns = f"{'error, sd':>11}{'median':>9}{'kept tokens that differ':>25}{'lost':>9}"
    print(f"{'losses computed in':26}{columns}")
    for name, row in rows.items():
        error = f"{row['error_sd']:11.4f}{row['error_median']:9.4f}"
        print(f"{name:26}{error}{row['differ']:25.2%}{row['lost']:9.4f}")
    print(f"{'a blind choice':26}{'':20}{1 - args.k:25.2%}{mean - excess.mean().item():9.4f}")


if __name__ == "__main__":
    cli(main)
