"""Speed and memory beside plain training and the usual ways, in one table.

Ratios are taken within one run: the rows take turns, and each round's row is divided by the same
round's baseline.

    python -m tools.bench all --json bench.json          # CPU, a 25M model, T = 512
    python -m tools.bench train --device cuda --preset tinyllama-1b    # a GPU, T = 2048, bf16
    python -m tools.bench train --rows clm,excess,entropy,deft   # methods, by --score's names
    python -m tools.bench train --grow                   # time and memory against T, V and batch
    python -m tools.bench memory                         # measured peaks beside tools.plan's
    python -m tools.bench trainers                       # the drop-in beside a Trainer's own loss
    python -m tools.bench generate --model out/slm --data-dir data/math    # beside transformers
    python -m tools.bench prepare --model mistral --data-dir data --sizes 10 1000

A step is forward, backward and AdamW. On CPU with one thread, seconds are CPU seconds, so that
other work on the machine disturbs them less. Each row's memory is measured in a process of its own.
`peak_memory_bytes` leaves out the interpreter and its libraries; `activation_bytes` also leaves out
weights, gradients and optimiser.
"""

import argparse
import json
import platform
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import torch

import slm
from common.command_line import Parser, add_compile, add_machine, share, whole
from common.errors import UserError, cli
from common.files import write_atomic
from common.owned import refuse_taken
from tools.bench import memory, text, train, trainers
from tools.bench.rows import PRESETS, ROWS, memory_of

PARTS = ("tokenizer", "train", "score", "loader", "prepare", "generate")  # in the order of `all`


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.usage = "python -m tools.bench WHAT... [--FLAG VALUE ...]"
    add = parser.add_argument
    add("what", nargs="+", choices=[*PARTS, "memory", "trainers", "all"], help="what is measured")
    add("--json", help="write the results here too (FILE)")
    add("--preset", default="cpu-30m", choices=[*PRESETS], help="model and batch")
    add("--seq-len", type=whole(1), help="tokens per window; default: the preset's")
    add("--batch-size", type=whole(1), help="windows per step; default: the preset's")
    add("--vocab-size", type=whole(1), help="V; default: the preset's")
    add("--rows", help=f"of train, by comma: {','.join(ROWS)}, or values of --score")
    add("--grow", action="store_true", help="train: against T, V and windows per step")
    add("--checkpointing", action="store_true", help="our rows recompute activations")
    add("--k", type=share, default=0.6, help="share of the tokens that is kept")
    add("--repeats", type=whole(1), default=5, help="measured rounds, after one of warm-up")
    add("--model", help="generate, tokenizer, prepare: a Hugging Face folder")
    add(
        "--data-dir",
        help="folder of texts. generate: holds eval/ and prompts/; tokenizer: corpus/; "
        "prepare: corpus/ and eval/",
    )
    add("--sizes", type=whole(1), nargs="+", default=[10, 100], help="prepare: megabytes of text")
    add_machine(parser)
    parser.set_defaults(threads=1)
    add_compile(parser)
    add("--memory-of", help=argparse.SUPPRESS)  # a row, in this process alone
    args = parser.parse_args(argv)
    args.rows = rows_of(args.rows)
    preset = PRESETS[args.preset]
    args.seq_len = args.seq_len or preset.seq_len
    args.batch_size = args.batch_size or preset.batch_size
    args.vocab_size = args.vocab_size or preset.vocab_size
    # What the kit's own functions read beside these.
    args.lr = 1e-4
    args.weight_decay = 0.1
    args.moments = "float32"
    args.revision = None
    return args


def rows_of(text):
    """The rows that --rows names, by comma; all of them without it."""
    rows = text.split(",") if text else list(ROWS)
    unknown = sorted(set(rows) - {*ROWS, *slm.SCORES})
    if unknown:
        raise UserError(
            f"--rows: got {', '.join(unknown)}, wanted some of {', '.join(ROWS)}, or of --score's "
            f"values: {', '.join(slm.SCORES)}"
        )
    return rows


def parts_of(args):
    """What is measured. `all` leaves out what lacks its files; named by itself it is an error."""
    everything = "all" in args.what
    parts = list(PARTS if everything else args.what)
    for part in ("prepare", "generate"):
        if part not in parts or (args.model and args.data_dir):
            continue
        if not everything:
            raise UserError(
                f"{part}: --model and --data-dir are needed, a model's folder and that of the texts"
            )
        parts.remove(part)
        print(f"{part}: left out, it needs --model and --data-dir")
    return parts


def main():
    args = arguments()
    if args.json:
        refuse_taken([args.json])
    env = Env(args)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args, env)))
        return
    parts = parts_of(args)
    results = {
        "machine": machine(args, env),
        "torch": torch.__version__,
        "preset": args.preset,
        "dtype": str(env.dtype),
        "threads": args.threads,
        "k": args.k,
        "repeats": args.repeats,
    }
    print(
        f"{results['machine']}, torch {torch.__version__}, {args.preset}: T {args.seq_len}, "
        f"V {args.vocab_size}, {args.batch_size} windows, k {args.k}"
    )
    for part in parts:
        if part == "train" and args.grow:
            part = "growth"
        results[part] = measure(part, args, env)
        if args.json:
            write_atomic(args.json, json.dumps(results, indent=1))


def measure(part, args, env):
    """The results of one part, which is also printed."""
    if part == "train":
        rows = train.bench_train(args, env, args.rows)
        train.show_train(rows)
        return rows
    measures = {
        "growth": train.bench_growth,
        "score": train.bench_score,
        "loader": train.bench_loader,
        "memory": memory.bench_memory,
        "trainers": trainers.bench_trainers,
        "tokenizer": text.tokenizer,
        "prepare": text.prepare,
        "generate": text.generate,
    }
    return measures[part](args, env)


def machine(args, env):
    """The name of the GPU, or of the processor with the number of threads."""
    if env.device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    except OSError:  # not Linux
        pass
    plural = "" if args.threads == 1 else "s"
    return f"{name}, {args.threads} thread{plural}"


if __name__ == "__main__":
    cli(main)
