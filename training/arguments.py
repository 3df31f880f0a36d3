"""Arguments that both trainers share."""

import math
import os

from common.errors import UserError


def check_arguments(args):
    """Refuse what cannot be meant, before anything is read or written."""

    def need(ok, flag, wanted):
        if not ok:
            raise UserError(
                f"{flag}: got {getattr(args, flag[2:].replace('-', '_'))}, wanted {wanted}"
            )

    args.micro_batch_size = args.micro_batch_size or max(
        1, args.batch_size // int(os.environ.get("WORLD_SIZE", 1))
    )
    args.lr = 1e-3 if args.lr is None else args.lr
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    for flag in ("--seq-len", "--batch-size", "--micro-batch-size"):
        need(getattr(args, flag[2:].replace("-", "_")) > 0, flag, "at least 1")
    per_forward = args.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    need(
        args.batch_size % per_forward == 0,
        "--batch-size",
        f"a multiple of --micro-batch-size times the number of ranks, {per_forward}",
    )
    need(args.steps is None or args.epochs is None, "--epochs", "either --steps or --epochs")
    need(args.steps is None or args.steps > 0, "--steps", "at least 1")
    need(args.epochs is None or 0 < args.epochs < math.inf, "--epochs", "a number above 0")
    need(math.isfinite(args.lr) and args.lr > 0, "--lr", "a positive number")
    for flag in ("--warmup", "--clip", "--weight-decay", "--min-lr", "--eval-every", "--snapshots"):
        need(getattr(args, flag[2:].replace("-", "_")) >= 0, flag, "0 or more")
    need(args.save_every > 0, "--save-every", "at least 1")
    need(args.seed >= 0, "--seed", "0 or more")
    need(args.init is not None, "--init", "a model's folder or hub id, or scratch")
    for flag in ("--n-layer", "--n-head", "--n-kv-head", "--d-model", "--d-ff"):
        value = getattr(args, flag[2:].replace("-", "_"))
        need(value is None or value > 0, flag, "at least 1")
    need(args.out is not None, "--out", "a folder for the run")


def is_snapshot(done, args):
    """Is one of `--snapshots` N evenly spaced models due after `done` steps? The last one is the run's own folder."""
    return done < args.steps and any(
        done == round(args.steps * i / args.snapshots) for i in range(1, args.snapshots)
    )
