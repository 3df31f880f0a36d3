"""Stage 1: plain causal training, from scratch or from a checkpoint: the reference model (Rho-1, section 2.2), the base
model of the demo, and, on a token set with a loss mask, fine-tuning.

    python train_ref.py                               # the demo's reference: no network, no GPU, makes all that is missing
    python train_ref.py --data data/curated --init TinyLlama/TinyLlama_v1.1 --out out/ref \\
        --seq-len 2048 --batch-size 64 --micro-batch-size 8 --lr 5e-5 --epochs 3               # one GPU
    torchrun --nproc-per-node 8 train_ref.py ...      # the same on eight

train_slm.py is this file plus the selection: `diff train_ref.py train_slm.py`.
"""

import argparse
import math
import time

from common.device import Env  # first: it sets how torch's threads wait

from tqdm import tqdm

import demo.chain
from common.errors import cli
from data import Loader, TokenSet
from hf import models
from training import heads, parallel
from training.arguments import check_arguments, is_snapshot
from training.meter import Meter
from training.optimizer import clip_gradients, lr_at, make_optimizer
from training.pruned import FastLoss
from training.run import Run, save_wrapped
from training.validation import validate


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="token set to train on (folder); default: the demo's")
    group.add_argument("--val", help="token set for the validation loss (folder)")
    group.add_argument("--seq-len", type=int, default=128, help="tokens per window")
    group.add_argument(
        "--verify", action="store_true", help="read and hash all of the token sets first"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--init",
        help="model to start from (folder or hub id), or 'scratch'; default: the demo's base",
    )
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument(
        "--n-layer", type=int, default=2, help="layers (scratch only, like the next four)"
    )
    group.add_argument("--n-head", type=int, default=6, help="query heads")
    group.add_argument(
        "--n-kv-head", type=int, help="key/value heads; default: as many as query heads"
    )
    group.add_argument("--d-model", type=int, default=96, help="width of the residual stream")
    group.add_argument(
        "--d-ff", type=int, help="width of the MLP; default: 8/3 d-model, to a multiple of 16"
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch-size", type=int, default=8, help="windows per optimiser step, over all ranks"
    )
    group.add_argument(
        "--micro-batch-size",
        type=int,
        help="windows per rank per forward; default: no accumulation",
    )
    group.add_argument("--steps", type=int, help="optimiser steps; or:")
    group.add_argument("--epochs", type=float, help="passes over the token set")
    group.add_argument("--lr", type=float, help="highest learning rate; default: 1e-3")
    group.add_argument(
        "--min-lr", type=float, help="learning rate at the end; default: a tenth of --lr"
    )
    group.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up")
    group.add_argument("--schedule", default="cosine", choices=["cosine", "linear", "constant"])
    group.add_argument("--weight-decay", type=float, default=0.1, help="on matrices")
    group.add_argument(
        "--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="data order, initialisation, random scores"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the forward pass; auto: bfloat16 autocast on a GPU, float32 on CPU",
    )
    group.add_argument(
        "--moments",
        default="float32",
        choices=["float32", "bfloat16"],
        help="how AdamW keeps its two moments: bfloat16 takes 4 bytes a parameter less",
    )
    group.add_argument(
        "--compile", default="auto", choices=["auto", "on", "off"], help="auto: on a GPU"
    )
    group.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"], help="under torchrun")
    group.add_argument(
        "--checkpointing", action="store_true", help="recompute activations instead of storing them"
    )
    group.add_argument(
        "--head",
        default="kept",
        choices=[*heads.HEADS],
        help="how the loss is made: full logits, logits of one micro-batch held once, or never all of them",
    )
    group.add_argument("--threads", type=int, help="CPU threads per rank")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="run folder, in the end a Hugging Face folder")
    group.add_argument(
        "--eval-every",
        type=int,
        default=50,
        help="steps between validation losses; 0: at the end only",
    )
    group.add_argument(
        "--save-every", type=int, default=250, help="steps between saved training states"
    )
    group.add_argument(
        "--snapshots",
        type=int,
        default=0,
        help="models saved on the way, evenly spaced, in step-NNNNNN/",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run in --out"
    )
    group.add_argument("--overwrite", action="store_true", help="start over in --out")
    return parser.parse_args()


def main():
    args = arguments()
    demo.chain.ensure(args, "ref")
    check_arguments(args)
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    val = TokenSet(args.val, args.verify) if args.val else None
    loader = Loader(data.n_windows(args.seq_len), args.batch_size, args.seed)
    args.steps = args.steps or math.ceil((args.epochs or 1) * loader.n_windows / args.batch_size)
    model, tokenizer_from, init = models.begin(args, data, env)
    run = Run(args, {"data": data.hash, "init": init}, env, model)
    if not run.summary:
        train(args, env, run, data, val, loader, model, tokenizer_from)
    run.show_summary()


def train(args, env, run, data, val, loader, model, tokenizer_from):
    student = parallel.wrap(FastLoss(model, args.head), args, env)
    optimizer = make_optimizer(student, args)
    if run.state:
        parallel.restore(student, optimizer, run.state)
        run.state = None  # as large as the weights and the optimiser
    T = args.seq_len

    bar = tqdm(
        total=args.steps, initial=run.step, desc=str(run.folder), unit="step", disable=not env.main
    )
    for step in range(run.step, args.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        micro_batches = loader.micro_batches(
            step, args.micro_batch_size
        )  # of all ranks, in one order
        mine = micro_batches[env.rank :: env.world]
        # How many tokens carry loss is known before any gradient. Dividing by it, over all micro-batches and ranks,
        # makes the loss the exact mean over them, however they are spread.
        counts = [int(data.valid(w, T).sum()) for w in micro_batches]
        n_kept = sum(counts)
        meter = Meter(env, data.kinds)
        for i, windows in enumerate(mine):
            x, y, valid = map(env.tensor, data.batch(windows, T))

            def select(losses):
                return valid

            parallel.sync_gradients(student, last=i == len(mine) - 1)
            with env.autocast():
                total, losses, kept = student(x, y, select, count=counts[env.rank + i * env.world])
            (
                total * (env.world / max(n_kept, 1))
            ).backward()  # DDP and FSDP average over ranks: world undoes that
            meter.add(losses, valid, kept, data.labels(windows, T))
        grad_norm = clip_gradients(student, args, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        record = {
            "tokens_seen": data.n_read(loader.windows(step), T),
            **meter.read(),
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
        }
        seconds, done = time.perf_counter() - started, step + 1
        if val and (done == args.steps or args.eval_every and done % args.eval_every == 0):
            record.update(validate(student, val, args, env))
        run.record_step(done, record, seconds, bar)
        if is_snapshot(done, args):
            save_wrapped(student, run.folder / f"step-{done:06d}", tokenizer_from, env, run)
        if done % args.save_every == 0 or done == args.steps:
            run.save_state(done, *parallel.full_state(student, optimizer))
    bar.close()
    save_wrapped(student, run.folder, tokenizer_from, env, run)
    run.finish()


if __name__ == "__main__":
    cli(main)
