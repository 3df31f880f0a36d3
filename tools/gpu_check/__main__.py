"""Everything that only a GPU can show, in one table: speed, memory, graphs, kernels, rounding.

    bash runs/gpu_check.sh                                   # all of it; the same command goes on
    python -m tools.gpu_check --out gpu_check --part train   # one of train, numbers, ranks, stages
    python -m tools.gpu_check --preset demo --device cpu     # the same path on a CPU, tiny

TinyLlama's shapes with random weights; no network, nothing but the kit's own requirements
("SLM, the usual way" also needs transformers, and is noted as failed without it). Each case runs in
a process of its own and is kept in OUT/gpu_check.json at once; where one fails, all that it said is
in a log beside it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common.device import Env  # first: it sets how torch's threads wait

import torch

from common.command_line import Parser, add_compile, add_machine, share, whole
from common.errors import UserError, cli
from common.files import write_atomic
from common.json_files import read_json
from tools.bench.__main__ import machine
from tools.bench.rows import PRESETS
from tools.gpu_check.cases import NUMBERS, RANKS, TRAIN, measure
from tools.gpu_check.stages import cause, n_devices, ways
from tools.gpu_check.table import line_of, markdown

KIT = Path(__file__).parents[2]
PARTS = ("train", "numbers", "ranks", "stages")


def arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", default="gpu_check", metavar="DIR", help="folder of the results")
    add("--part", default="all", choices=[*PARTS, "all"], help="which cases")
    add("--preset", default="tinyllama-1b", choices=[*PRESETS], help="shapes and batch")
    add("--seq-len", type=whole(1), help="tokens per window; default: the preset's")
    add("--batch-size", type=whole(1), help="windows per step; default: the preset's")
    add("--steps", type=whole(1), default=20, help="measured steps of a case")
    add("--k", type=share, default=0.6, help="share of the tokens that is kept")
    add_machine(parser)
    add_compile(parser)
    add("--case", help=argparse.SUPPRESS)  # one case, in this process
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    args.seq_len = args.seq_len or preset.seq_len
    args.batch_size = args.batch_size or preset.batch_size
    args.vocab_size = preset.vocab_size
    # What the kit's own functions read beside these.
    args.lr = 1e-5
    args.weight_decay = 0.1
    args.moments = "float32"
    args.checkpointing = False
    args.shard_size = None
    args.reshard_after_forward = "default"
    args.revision = None
    return args


def cases_of(args):
    """The names of the cases of `--part`."""
    n = n_devices(args.device)
    cases = [TRAIN, NUMBERS, RANKS if n > 1 else (), ways(n)]
    wanted = PARTS if args.part == "all" else [args.part]
    return [case for part, some in zip(PARTS, cases) if part in wanted for case in some]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.case:
        result = measure(args.case, args)
        if int(os.environ.get("RANK", 0)) == 0:
            print("result: " + json.dumps(result))
        return
    path = Path(args.out) / "gpu_check.json"
    known = known_results(path, args)
    for case in cases_of(args):
        if "failed" in known["cases"].get(case, {"failed": "not run yet"}):
            known["cases"][case] = in_own_process(case, argv, path.parent)
            write_atomic(path, json.dumps(known, indent=1))
        print(f"{case}: {line_of(known['cases'][case])}", flush=True)
    write_atomic(path.with_suffix(".md"), markdown(known))
    print(f"{path.with_suffix('.md')}: the table")


def known_results(path, args):
    """What an earlier call left, or a new file's head. Raises UserError for another setting."""
    env = Env(SimpleNamespace(device=args.device, dtype=args.dtype, threads=args.threads))
    head = {
        "machine": machine(SimpleNamespace(threads=args.threads or torch.get_num_threads()), env),
        "torch": torch.__version__,
        "preset": args.preset,
        "dtype": str(env.dtype).removeprefix("torch."),
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "k": args.k,
    }
    if not path.exists():
        return {**head, "cases": {}}
    known = read_json(path, "results")
    differing = [key for key, value in head.items() if known.get(key) != value]
    if differing:
        raise UserError(
            f"{path}: is of another setting ({', '.join(differing)}); name another --out"
        )
    return known


def in_own_process(case, argv, out):
    """A case's result; {"failed": what went wrong} where it ends in an error.

    All that it said then is in `out`, in CASE.log.
    """
    command = [sys.executable, "-m", "tools.gpu_check", *argv, "--case", case]
    if case in RANKS:
        ranks = torch.cuda.device_count() or 2
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command[1:1] = torchrun
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, cwd=KIT, env=environment, capture_output=True, text=True)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("result: "):
            return json.loads(line.removeprefix("result: "))
    log = out / f"{re.sub('[^a-zA-Z0-9]+', '-', case)}.log"
    write_atomic(log, done.stdout + done.stderr)
    return {"failed": f"{cause(done.stderr)} ({log})", "exit_code": done.returncode}


if __name__ == "__main__":
    cli(main)
