"""Speed and memory beside plain training and the usual ways, in one table. Ratios are taken within one run: the rows
take turns, and each round's row is divided by the same round's baseline.

    python -m tools.bench all --json bench.json                            # CPU, a 25M model, T = 512
    python -m tools.bench train --device cuda --preset tinyllama-1b        # a GPU, 1.1B, T = 2048, bf16, compiled
    python -m tools.bench train --grow                                     # time and memory against T, V and batch
    python -m tools.bench generate --model out/slm --data-dir data/math    # beside transformers, on GSM8K
    python -m tools.bench prepare --model mistral --data-dir data --sizes 10 1000    # beside the bare tokenizer

A step is forward, backward and AdamW. On CPU with one thread, seconds are CPU seconds, so that other work on the
machine disturbs them less. Memory: each row in a process of its own; `peak_memory_bytes` leaves out the interpreter and
its libraries, `activation_bytes` also weights, gradients and optimiser.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.device import Env

import numpy as np
import torch

import slm
from common.errors import UserError, cli
from common.files import write_atomic
from data import Loader, Stored
from tools.bench.rows import PRESETS, SCORED, Rows, memory_of, token_set
from training.optimizer import flops_per_token

ROWS = (
    "clm_transformers",
    "clm",
    "clm_chunked",
    "slm_usual",
    "slm_full",
    "slm_kept",
    "slm_lean",
    "slm_pruned",
    "slm_pruned_all",
    "forward",
    "score",
)  # see bench_rows.py
GROW = [
    (512, 32000, 1),
    (1024, 32000, 1),
    (2048, 32000, 1),
    (4096, 32000, 1),
    (512, 64000, 1),
    (512, 128000, 1),
    (512, 32000, 2),
    (512, 32000, 4),
    (512, 32000, 8),
]  # T, V, windows per step


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="+",
        choices=["train", "score", "loader", "tokenizer", "prepare", "generate", "all"],
    )
    parser.add_argument("--json", help="write the results here too (FILE)")
    parser.add_argument("--preset", default="cpu-30m", choices=[*PRESETS], help="model and batch")
    for name, what in (
        ("seq-len", "tokens per window"),
        ("batch-size", "windows per step"),
        ("vocab-size", "V"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: the preset's")
    parser.add_argument("--rows", help=f"of train, by comma: {','.join(ROWS)}")
    parser.add_argument(
        "--grow", action="store_true", help="train: against T, V and windows per step"
    )
    parser.add_argument("--k", type=float, default=0.6, help="share of the tokens that is kept")
    parser.add_argument(
        "--repeats", type=int, default=5, help="measured rounds, after one of warm-up"
    )
    parser.add_argument("--model", help="generate, tokenizer, prepare: a Hugging Face folder")
    parser.add_argument(
        "--data-dir",
        help="generate: the folder that holds eval/ and prompts/; tokenizer: corpus/; "
        "prepare: corpus/ and eval/",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 100], help="prepare: megabytes of text"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument(
        "--compile", default="auto", choices=["auto", "on", "off"], help="auto: on a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a row, in this process alone
    args = parser.parse_args(argv)
    for flag, ok in (
        ("repeats", args.repeats > 0),
        ("k", 0 < args.k <= 1),
        ("sizes", min(args.sizes) > 0),
    ):
        if not ok:
            raise UserError(
                f"--{flag}: got {getattr(args, flag)}, wanted "
                + ("0 < k <= 1" if flag == "k" else "at least 1")
            )
    *_, seq_len, batch_size = PRESETS[args.preset]
    args.seq_len, args.batch_size = args.seq_len or seq_len, args.batch_size or batch_size
    args.vocab_size = args.vocab_size or PRESETS[args.preset][0]
    args.lr, args.weight_decay, args.moments, args.revision = 1e-4, 0.1, "float32", None
    return args


def timed(run, args, env):
    """Seconds that one call takes."""
    clock = (
        time.process_time if env.device.type == "cpu" and args.threads == 1 else time.perf_counter
    )
    synchronise = torch.cuda.synchronize if env.device.type == "cuda" else lambda: None
    synchronise()
    start = clock()
    run()
    synchronise()
    return clock() - start


def interleaved(runs, args, env):
    """{name: [seconds of each round]}: every round calls all of them, in an order of its own; one round of warm-up."""
    seconds = {name: [] for name in runs}
    for i in range(1 + args.repeats):
        for name in random.Random(i).sample(list(runs), len(runs)):
            took = timed(runs[name], args, env)
            if i:
                seconds[name].append(took)
    return seconds


def ratio(times, base):
    """Median, lowest and highest of the ratios of the rounds."""
    each = [a / b for a, b in zip(times, base)]
    return statistics.median(each), min(each), max(each)


# ---------------------------------------------------------------------------------------------------------------------
# train


def memory_in_own_process(row, args):
    """`memory_of` in a process whose freed memory goes back at once, so that what is resident is what is in use."""
    command = [sys.executable, "-m", "tools.bench", "train", "--memory-of", row]
    for name in (
        "preset",
        "seq_len",
        "batch_size",
        "vocab_size",
        "k",
        "device",
        "dtype",
        "compile",
        "threads",
    ):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def bench_train(args, env, names, baseline="clm"):
    """{row: {step_s, tok_per_s, ratio, low, high, mfu, peak_memory_bytes, activation_bytes}}; ratios to `baseline`."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        seconds = interleaved({name: rows.step(name) for name in names}, args, env)
        # The same for every row: what a row skips counts as its gain.
        flops = flops_per_token(rows.ours("full")[0].lm, args.seq_len)
    if "score" in seconds:
        seconds["score"] = [s / SCORED for s in seconds["score"]]
    out = {}
    for row in names:
        step = statistics.median(seconds[row])
        middle, low, high = (
            ratio(seconds[row], seconds[baseline]) if baseline in seconds else (None,) * 3
        )
        out[row] = {
            "step_s": step,
            "tok_per_s": rows.n / step,
            "ratio": middle,
            "low": low,
            "high": high,
            "mfu": None if row in ("forward", "score") else env.mfu(flops * rows.n / step),
        }
    del rows, seconds
    if env.device.type == "cuda":
        torch.cuda.empty_cache()
    for row in names:
        out[row].update(memory_in_own_process(row, args))
    return out


def show_train(rows):
    base = rows.get("clm", {})
    print(
        f"{'':17}{'step s':>9}{'tok/s':>9}{'of clm':>8}  {'(spread)':14}{'MFU':>6}{'peak MB':>9}{'of clm':>7}"
        f"{'act. MB':>9}{'of clm':>7}"
    )
    for name, r in rows.items():

        def of(key):
            return f"{r[key] / base[key]:7.2f}" if base else "      -"

        spread = (
            "      -  " + " " * 14
            if r["ratio"] is None
            else f"{r['ratio']:8.3f}  " + f"({r['low']:.3f}-{r['high']:.3f})".ljust(14)
        )
        mfu = "n/a" if r["mfu"] is None else f"{r['mfu']:.0%}"
        print(
            f"{name:17}{r['step_s']:9.4f}{r['tok_per_s']:9.0f}{spread}{mfu:>6}"
            f"{r['peak_memory_bytes'] / 1e6:9.0f}{of('peak_memory_bytes')}{r['activation_bytes'] / 1e6:9.0f}"
            f"{of('activation_bytes')}",
            flush=True,
        )


def bench_growth(args, env):
    """Plain and selective steps as T, V and the number of windows grow; ratios to `clm` of the same shape."""
    out = {}
    for T, V, B in GROW:
        args.seq_len, args.vocab_size, args.batch_size = T, V, B
        key = f"T={T} V={V} B={B}"
        print(key, flush=True)
        out[key] = bench_train(args, env, ["clm", "slm_kept", "slm_lean", "slm_pruned"])
        show_train(out[key])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# score, loader


def bench_score(args, env):
    """score.py's rate as a share of a bare forward pass over the same tokens."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        seconds = interleaved({name: rows.step(name) for name in ("forward", "score")}, args, env)
    share, low, high = ratio([SCORED * s for s in seconds["forward"]], seconds["score"])
    rate = SCORED * rows.n / statistics.median(seconds["score"])
    print(
        f"score: {rate:.0f} tok/s, {share:.1%} of a bare forward pass's rate ({low:.1%}-{high:.1%})"
    )
    return {"tok_per_s": rate, "share_of_forward": share, "low": low, "high": high}


def bench_loader(args, env):
    """What the loader takes of a selective step: windows, tokens, masks, reference losses, and the copies to the
    device."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        data = token_set(folder, 1_000_000, args.vocab_size)
        path = Path(folder) / "ref_loss.bin"
        np.ones(data.count, "<f2").tofile(path)
        path.with_suffix(".json").write_text(
            json.dumps(
                {
                    "data": data.hash,
                    "count": data.count,
                    "seq_len": args.seq_len,
                    "n_scored": data.n_windows(args.seq_len),
                }
            )
        )
        stored = Stored(path, data, args.seq_len)
        loader, step = Loader(data.n_windows(args.seq_len), args.batch_size, 0), iter(range(10**9))

        def load():
            (windows,) = loader.micro_batches(next(step), args.batch_size)
            x, y, valid = data.batch(windows, args.seq_len)
            slm.Selection(args.k).count(valid)
            for array in (x, y, valid, stored.batch(windows, valid)):
                env.tensor(array)

        seconds = interleaved({"loader": load, "step": rows.step("slm_kept")}, args, env)
    share, low, high = ratio(seconds["loader"], seconds["step"])
    print(f"loader: {share:.3%} of a step ({low:.3%}-{high:.3%})")
    return {
        "loader_s": statistics.median(seconds["loader"]),
        "share_of_step": share,
        "low": low,
        "high": high,
    }


def main():
    args = arguments()
    env = Env(args)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args, env)))
        return
    what = (
        ["tokenizer", "train", "score", "loader", "prepare", "generate"]
        if "all" in args.what
        else args.what
    )
    names = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := set(names) - set(ROWS):
        raise UserError(
            f"--rows: got {', '.join(sorted(unknown))}, wanted some of {', '.join(ROWS)}"
        )
    for part in ("prepare", "generate"):
        if part in what and not (args.model and args.data_dir):
            if "all" not in args.what:
                raise UserError(
                    f"{part}: --model and --data-dir are needed, a model's folder and that of the texts"
                )
            what.remove(part)
            print(f"{part}: left out, it needs --model and --data-dir")
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
        f"{results['machine']}, torch {torch.__version__}, {args.preset}: T {args.seq_len}, V {args.vocab_size}, "
        f"{args.batch_size} windows, k {args.k}"
    )
    for part in what:
        if part == "train" and args.grow:
            results["growth"] = bench_growth(args, env)
        elif part == "train":
            results["train"] = bench_train(args, env, names)
            show_train(results["train"])
        elif part in ("score", "loader"):
            results[part] = {"score": bench_score, "loader": bench_loader}[part](args, env)
        else:
            from tools.bench import text as bench_text

            results[part] = getattr(bench_text, part)(args, env)
        if args.json:
            write_atomic(args.json, json.dumps(results, indent=1))


def machine(args, env):
    if env.device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        model = (
            Path("/proc/cpuinfo")
            .read_text()
            .split("model name")[1]
            .split(":")[1]
            .split("\n")[0]
            .strip()
        )
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    return f"{model}, {args.threads} thread{'s' * (args.threads > 1)}"


if __name__ == "__main__":
    cli(main)
