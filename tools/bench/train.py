"""Training steps by turns, scoring and the loader, timed; and each row's memory."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from common.device import free_memory

import numpy as np

import slm
from common.checksums import Checksums
from common.errors import UserError
from data import STORED_FORMAT, Loader, Stored
from tools.bench.rows import SCORED, Rows, token_set
from tools.bench.timing import interleaved, ratio
from training.optimizer import flops_per_token

GROW = [  # T, V, windows per step
    (512, 32000, 1),
    (1024, 32000, 1),
    (2048, 32000, 1),
    (4096, 32000, 1),
    (512, 64000, 1),
    (512, 128000, 1),
    (512, 32000, 2),
    (512, 32000, 4),
    (512, 32000, 8),
]
PASSED_ON = (  # to the process that measures a row's memory
    "preset",
    "seq_len",
    "batch_size",
    "vocab_size",
    "k",
    "device",
    "dtype",
    "compile",
    "threads",
)

# --------------------------------------------------------------------------------------------------
# training steps


def memory_in_own_process(row, args):
    """`rows.memory_of` in a fresh process: {"peak_memory_bytes", "activation_bytes"}.

    Its allocator gives freed memory back at once, so what is resident is what is in use.
    """
    command = [sys.executable, "-m", "tools.bench", "train", "--memory-of", row]
    for name in PASSED_ON:
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    if args.checkpointing:
        command.append("--checkpointing")
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def bench_train(args, env, names):
    """What each row of `names` takes; ratios are to the row "clm", None where it is not there.

    Returns {row: {step_s, tok_per_s, ratio, low, high, mfu, peak_memory_bytes, activation_bytes}}.
    """
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
        middle, low, high = None, None, None
        if "clm" in seconds:
            middle, low, high = ratio(seconds[row], seconds["clm"])
        trains = row not in ("forward", "score")
        out[row] = {
            "step_s": step,
            "tok_per_s": rows.n / step,
            "ratio": middle,
            "low": low,
            "high": high,
            "mfu": env.mfu(flops * rows.n / step) if trains else None,
        }
    # The models of this process must not lie on the GPU while others measure theirs.
    del rows, seconds
    free_memory(env.device)
    for row in names:
        out[row].update(memory_in_own_process(row, args))
    return out


def show_train(rows):
    print(
        f"{'':17}{'step s':>9}{'tok/s':>9}{'of clm':>8}  {'(spread)':14}{'MFU':>6}"
        f"{'peak MB':>9}{'of clm':>7}{'act. MB':>9}{'of clm':>7}"
    )
    base = rows.get("clm")
    for name, row in rows.items():
        print(f"{name:17}{cells_of(row, base)}", flush=True)


def cells_of(row, base):
    """One line of the table, without its name; `base` is the row clm, or None."""
    cells = [f"{row['step_s']:9.4f}{row['tok_per_s']:9.0f}"]
    if row["ratio"] is None:
        cells.append(f"{'-':>8}  {'':14}")
    else:
        spread = f"({row['low']:.3f}-{row['high']:.3f})"
        cells.append(f"{row['ratio']:8.3f}  {spread:14}")
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.0%}"
    cells.append(f"{mfu:>6}")
    for key in ("peak_memory_bytes", "activation_bytes"):
        share = f"{row[key] / base[key]:.2f}" if base else "-"
        cells.append(f"{row[key] / 1e6:9.0f}{share:>7}")
    return "".join(cells)


def bench_growth(args, env):
    """Plain and selective steps as T, V and the number of windows grow.

    Ratios are to `clm` of the same shape.
    """
    out = {}
    for seq_len, vocab_size, batch_size in GROW:
        args.seq_len = seq_len
        args.vocab_size = vocab_size
        args.batch_size = batch_size
        key = f"T={seq_len} V={vocab_size} B={batch_size}"
        print(key, flush=True)
        out[key] = bench_train(args, env, ["clm", "slm_kept", "slm_lean", "slm_pruned"])
        show_train(out[key])
    return out


# --------------------------------------------------------------------------------------------------
# scoring, the loader


def bench_score(args, env):
    """score.py's rate as a share of a bare forward pass over the same tokens."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        runs = {name: rows.step(name) for name in ("forward", "score")}
        seconds = interleaved(runs, args, env)
    forward = [SCORED * s for s in seconds["forward"]]
    share, low, high = ratio(forward, seconds["score"])
    rate = SCORED * rows.n / statistics.median(seconds["score"])
    print(
        f"score: {rate:.0f} tok/s, {share:.1%} of a bare forward pass's rate ({low:.1%}-{high:.1%})"
    )
    return {"tok_per_s": rate, "share_of_forward": share, "low": low, "high": high}


def bench_loader(args, env):
    """What the loader takes of a selective step.

    That is windows, tokens, masks and reference losses, and their copies to the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        data = token_set(folder, 1_000_000, args.vocab_size)
        stored = stored_losses(folder, data, args.seq_len)
        loader = Loader(data.n_windows(args.seq_len), args.batch_size, 0)
        steps = count()

        def load():
            (windows,) = loader.micro_batches(next(steps), args.batch_size)
            x, y, valid = data.batch(windows, args.seq_len)
            slm.Selection(args.k).count(valid)
            for array in (x, y, valid, stored.batch(windows, valid)):
                env.tensor(array)

        runs = {"loader": load, "step": rows.step("slm_kept")}
        seconds = interleaved(runs, args, env)
    share, low, high = ratio(seconds["loader"], seconds["step"])
    print(f"loader: {share:.3%} of a step ({low:.3%}-{high:.3%})")
    return {
        "loader_s": statistics.median(seconds["loader"]),
        "share_of_step": share,
        "low": low,
        "high": high,
    }


def stored_losses(folder, data, seq_len):
    """Reference losses of 1 nat for each token of `data`, as score.py stores them."""
    path = Path(folder) / "ref_loss.bin"
    np.ones(data.count, "<f2").tofile(path)
    note = {
        "format": STORED_FORMAT,
        "checksums": {path.name: Checksums(path, 2 * data.count).all()},
        "data": data.hash,
        "reference": "none",
        "count": data.count,
        "seq_len": seq_len,
        "n_scored": data.n_windows(seq_len),
    }
    path.with_suffix(".json").write_text(json.dumps(note))
    return Stored(path, data, seq_len)
