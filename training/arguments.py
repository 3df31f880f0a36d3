"""The flags of both trainers: what they are, and what they may be together."""

import argparse
import sys
from functools import partial

from common.device import n_ranks

from common.command_line import (
    COUNTED,
    LARGEST,
    LONGEST,
    SEED,
    SEEDS,
    add_compile,
    add_machine,
    not_negative,
    positive,
    whole,
)
from common.errors import UserError
from common.owned import refuse_overlap
from common.records import as_record, read_json
from hf.config import LIMITS
from training import finished, track
from training.heads import HEADS
from training.moments import FORMS, refuse_missing

# The model that --init scratch makes, unless flags say otherwise.
SHAPE = {
    "n_layer": 2,
    "n_head": 6,
    "n_kv_head": None,
    "d_model": 96,
    "d_ff": None,
    "rope_theta": None,
    "qk_norm": None,
}
# Arguments that name what a run reads.
READ = ("data", "val", "init", "ref_loss", "base_loss", "short_loss")


def add_arguments(parser):
    """Add the flags that train_ref.py and train_slm.py have in common, in titled groups."""
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="token set to train on; default: the demo's, with its own steps and rates",
    )
    group.add_argument(
        "--val", nargs="+", metavar="DIR", help="token sets for the validation loss, the main first"
    )
    group.add_argument("--seq-len", type=whole(1, LONGEST), default=128, help="tokens per window")
    group.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="attention stays inside of each document",
    )
    group.add_argument("--verify", action="store_true", help="read and hash the token sets first")
    group.add_argument("--init", help="model: folder, hub id or scratch; default: the demo's base")
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument(
        "--n-layer",
        type=whole(1, LIMITS["num_hidden_layers"]),
        default=SHAPE["n_layer"],
        help="layers; from scratch only, as the next six",
    )
    group.add_argument(
        "--n-head",
        type=whole(1, LIMITS["num_attention_heads"]),
        default=SHAPE["n_head"],
        help="query heads",
    )
    group.add_argument(
        "--n-kv-head",
        type=whole(1, LIMITS["num_key_value_heads"]),
        help="key/value heads; default: --n-head",
    )
    group.add_argument(
        "--d-model",
        type=whole(1, LIMITS["hidden_size"]),
        default=SHAPE["d_model"],
        help="width of the residual stream",
    )
    group.add_argument(
        "--d-ff",
        type=whole(1, LIMITS["intermediate_size"]),
        help="width of the MLP; default: 8/3 --d-model",
    )
    group.add_argument(
        "--rope-theta",
        type=positive,
        help="base of the rotary wavelengths, the longest of which is 2 to 6 times as many "
        "tokens; default: 10000",
    )
    group.add_argument(
        "--qk-norm",
        action="store_true",
        default=None,
        help="norm each head's queries and keys, as Qwen3 does",
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch-size",
        type=whole(1, LONGEST),
        default=8,
        help="windows per optimiser step, over all ranks",
    )
    group.add_argument(
        "--micro-batch-size",
        type=whole(1, LONGEST),
        help="windows per rank per forward, which are ranked together (--rank-windows, --scope); "
        "default: all",
    )
    group.add_argument("--steps", type=whole(1, COUNTED), help="optimiser steps; or:")
    group.add_argument("--epochs", type=positive, help="passes over the token set; default: 1")
    group.add_argument("--lr", type=positive, help="highest learning rate; default: 1e-3")
    group.add_argument(
        "--min-lr", type=not_negative, help="approached at the end; default: a tenth of --lr"
    )
    group.add_argument(
        "--warmup", type=whole(0, COUNTED), default=20, help="steps of linear warm-up"
    )
    schedules = ["cosine", "linear", "constant"]
    group.add_argument("--schedule", default="cosine", choices=schedules, help="then")
    group.add_argument("--weight-decay", type=not_negative, default=0.1, help="on matrices")
    group.add_argument(
        "--clip", type=not_negative, default=1.0, help="largest gradient norm; 0: no limit"
    )
    group.add_argument(
        "--seed",
        type=whole(0, SEEDS),
        default=SEED,
        help="data order, initialisation, random scores",
    )

    group = parser.add_argument_group("machine")
    add_machine(group)
    group.add_argument(
        "--moments",
        default="float32",
        choices=FORMS,
        help="how AdamW's moments are kept; int8 needs torchao",
    )
    add_compile(group)
    group.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"], help="under torchrun")
    group.add_argument(
        "--shard-size", type=whole(1), help="fsdp: ranks that share a copy; default: all"
    )
    group.add_argument(
        "--reshard-after-forward",
        default="default",
        choices=["default", "always", "never"],
        help="fsdp: blocks that are gathered again for the backward pass; default: all but the "
        "last, never: more memory, half of the gathers",
    )
    group.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations, store none",
    )
    group.add_argument(
        "--head", default="kept", choices=[*HEADS], help="how the loss is made (training/heads.py)"
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--from",
        dest="earlier",
        metavar="FILE",
        help="args.json of a run: repeat it; not taken over: --out, --overwrite, --threads, "
        "--device, --track, --verify",
    )
    group.add_argument("--out", metavar="DIR", help="run folder, in the end a Hugging Face folder")
    group.add_argument(
        "--eval-every",
        type=whole(0, COUNTED),
        default=50,
        help="steps between validations; 0: at the end",
    )
    group.add_argument(
        "--save-every",
        type=whole(1, COUNTED),
        default=250,
        help="steps between training states",
    )
    group.add_argument(
        "--save-minutes",
        type=positive,
        help="minutes after which one is due, too; default: by steps alone",
    )
    group.add_argument(
        "--snapshots", type=whole(0), default=0, help="models saved on the way, evenly spaced"
    )
    group.add_argument(
        "--track",
        type=track.wanted,
        metavar="NAME",
        help=f"log to {', '.join(track.TRACKERS)} too, if need be NAME:PROJECT",
    )
    group.add_argument("--overwrite", action="store_true", help="start over in --out")


def parse(parser, argv=None, drop=None):
    """The command line, where `--from RUN/args.json` says what its flags leave open.

    `drop(saved, given)` takes out of args.json what follows from other flags; `given(flag)` is
    what the command line says of one, or None. Raises UserError where that file is not a run's, or
    the package of `--track` is missing.
    """
    to_be_run = argv is None  # and not read by tools.plan, perhaps for another machine
    argv = sys.argv[1:] if argv is None else argv
    earlier = earlier_arguments(argv, drop)
    known = {action.dest: action for action in parser._actions}
    for key, value in earlier.items():
        choices = known[key].choices if key in known else None
        if choices and value is not None and value not in choices:
            flag = "--" + key.replace("_", "-")
            if given(argv, flag) is None:  # else the command line says it
                known_values = ", ".join(choices)
                raise UserError(f"--from: {flag} is {value} there, wanted one of {known_values}")
    if "score" not in known and (earlier.get("k", 1.0) != 1.0 or earlier.get("source")):
        raise UserError(
            "--from: is a run of train_slm.py, which chose or weighed tokens; repeat it with that, "
            "or its baseline with --score excess --k 1.0"
        )
    parser.set_defaults(**{key: value for key, value in earlier.items() if key in known})
    args = parser.parse_args(argv)
    del args.earlier
    if to_be_run and args.track:
        track.refuse_missing(args.track)
    return args


def given(argv, flag):
    """What a command line says of a flag, or None."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument(flag, dest="value", nargs="?", const="")
    return words.parse_known_args(argv)[0].value


def earlier_arguments(argv, drop=None):
    """What `--from FILE` says: a run's args.json, but for what follows from other flags."""
    says = partial(given, argv)
    path = says("--from")
    if path is None:
        return {}
    saved = read_json(path, "--from")
    if "inputs" not in saved or "steps" not in saved:
        raise UserError(f"--from {path}: is not the args.json of a run; name RUN/args.json")
    as_record(saved, finished.Arguments, f"--from: {path}")
    saved |= saved.pop("execution", {})
    if saved.get("k_schedule"):  # train_slm.py's: as it was written
        saved["k"] = saved["k_schedule"]
    if says("--epochs") is not None or (
        saved.get("epochs") is not None and says("--steps") is None
    ):
        saved.pop("steps")  # they follow from the epochs
    else:
        saved.pop("epochs", None)
    if says("--batch-size") is not None and saved["micro_batch_size"] == saved["batch_size"]:
        saved.pop("micro_batch_size")
    if says("--init") is not None:
        saved.pop("revision", None)
    if says("--init") not in (None, "scratch"):  # another model brings its own
        for name in SHAPE:
            saved.pop(name, None)
    if says("--parallel") is not None:
        for name in ("shard_size", "reshard_after_forward"):
            saved.pop(name, None)
    if says("--lr") is not None and saved.get("min_lr") == saved["lr"] / 10:
        saved.pop("min_lr")
    if drop:
        drop(saved, says)
    return saved


def settle(args, run=True, world=None):
    """Fill in the defaults that follow from other flags, and refuse what does not go together.

    run: it is run here and now, so what it needs has to be installed. world: on so many ranks, by
    default those that there are.
    """
    world = world or n_ranks()
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, args.batch_size // world)
    if isinstance(args.val, list) and len(args.val) == 1:
        args.val = args.val[0]
    if args.lr is None:
        args.lr = 1e-3
    if args.min_lr is None:
        args.min_lr = args.lr / 10
    per_forward = args.micro_batch_size * world
    if args.batch_size % per_forward != 0:
        raise UserError(
            f"--batch-size: got {args.batch_size}, wanted a multiple of --micro-batch-size times "
            f"the number of ranks, {per_forward}"
        )
    divides = not run or args.shard_size is None or world % args.shard_size == 0
    if args.shard_size and (args.parallel != "fsdp" or not divides):
        raise UserError(
            f"--shard-size: got {args.shard_size} with --parallel {args.parallel} and {world} "
            f"ranks, wanted --parallel fsdp and a divisor of the number of ranks"
        )
    if args.reshard_after_forward != "default" and args.parallel != "fsdp":
        raise UserError(
            f"--reshard-after-forward: got {args.reshard_after_forward} with --parallel "
            f"{args.parallel}, wanted --parallel fsdp"
        )
    if args.steps is not None and args.epochs is not None:
        raise UserError(f"--epochs: got {args.epochs}, wanted either --steps or --epochs")
    if args.steps is None and args.epochs is None:
        args.epochs = 1.0
    if args.epochs is not None and args.epochs > LARGEST:
        raise UserError(f"--epochs: got {args.epochs:g}, wanted at most {LARGEST}")
    if run:
        refuse_missing(args.moments)
    if args.init is None:
        raise UserError("--init: got none, wanted a model's folder or hub id, or scratch")
    if args.init == "scratch" and args.revision:
        raise UserError(
            f"--revision: got {args.revision} with --init scratch, wanted a hub id, or no revision"
        )
    for name, default in SHAPE.items():
        if args.init != "scratch" and getattr(args, name) != default:
            raise UserError(
                f"--{name.replace('_', '-')}: got {getattr(args, name)} with --init {args.init}, "
                f"which brings its own shape; wanted --init scratch, or no such flag"
            )
    if args.out is None:
        raise UserError("--out: got none, wanted a folder for the run")
    read = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in READ}
    refuse_overlap(args.out, read)


def is_snapshot(done, args):
    """Is one of `--snapshots` N evenly spaced models due after `done` steps?

    The last of the N is the run's own folder.
    """
    if done >= args.steps:
        return False
    due = [round(args.steps * i / args.snapshots) for i in range(1, args.snapshots)]
    return done in due
