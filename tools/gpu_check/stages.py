"""The stages themselves on this machine: one GPU, then all of them in each way that there is.

The demo's text, a small model, a few steps of two micro-batches a rank. A run on several GPUs
should end where the run on one GPU ends: the table says how far it is from it. Of each way one run
is stopped by SIGTERM, and the same command goes on with it.
"""

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.errors import UserError

KIT = Path(__file__).parents[2]
ONE = "stages: one"
STEPS = 6
LONG = 200  # steps of the run that is stopped
# Where a process says what is wrong. A CUDA error goes on below it, and torchrun says more still.
ERROR = re.compile(r"(\[rank\d+\]: ?)?(error:|[\w.]*(Error|Exception)\b)")
SHAPE = "--init scratch --n-layer 2 --d-model 128 --n-head 4 --micro-batch-size 2"
# One for each way in which it is known how many tokens carry loss, and one with documents.
METHODS = {
    "plain": "--k 1.0",
    "excess": "--ref-loss {ref_loss}",
    "batch": "--ref-loss {ref_loss} --scope batch",
    "weights": "--score mile",
    "documents": "--score loss --document-mask",
}


def n_devices(device):
    """How many ranks a run of all GPUs has; on a CPU two."""
    return 2 if device == "cpu" else torch.cuda.device_count()


def ways(n):
    """{case: (number of ranks, flags)} on a machine of n devices."""
    found = {ONE: (1, "")}
    if n > 1:
        found["stages: ddp"] = (n, "--parallel ddp")
        found["stages: fsdp"] = (n, "--parallel fsdp")
    if n > 1 and n % 2 == 0:
        found["stages: hsdp"] = (n, f"--parallel fsdp --shard-size {n // 2}")
    return found


def stages_case(case, args, env):
    """Each method's validation loss, and how far the furthest is from that on one GPU, in nats.

    stopped_at, steps: where the long run was stopped, and how many it has in the end.
    """
    n = n_devices(args.device)
    ranks, way = ways(n)[case]
    root = Path(args.out).resolve() / "stages"
    corpus, curated, val = (root / "data" / name for name in ("corpus", "curated", "val"))
    name = case.removeprefix("stages: ")
    common = f"{SHAPE} --val {val} --batch-size {4 * n}"
    if case == ONE:
        run(args, f"prepare.py --source demo --out {root / 'data'}")
        run(args, f"train_ref.py --data {curated} {common} --steps {STEPS} --out {root / 'ref'}", 1)
    ref_loss = root / f"{name}.bin"
    run(args, f"score.py --model {root / 'ref'} --data {corpus} --out {ref_loss}", ranks)
    result = {}
    for method, flags in METHODS.items():
        flags = f"{common} {way} {flags.format(ref_loss=ref_loss)} --steps {STEPS}"
        run(args, f"train_slm.py --data {corpus} {flags} --out {root / name}-{method}", ranks)
        result[method] = read(f"{root / name}-{method}/summary.json")["val_loss"]
    if case != ONE:
        alone = {m: read(f"{root / 'one'}-{m}/summary.json")["val_loss"] for m in METHODS}
        result["furthest"] = max(abs(result[m] - alone[m]) for m in METHODS)
    flags = f"{common} {way} --ref-loss {ref_loss} --steps {LONG} --out {root / name}-long"
    long = f"train_slm.py --data {corpus} {flags}"
    log = Path(f"{root / name}-long/log.jsonl")
    stop(words_of(args, f"{long} --overwrite", ranks), log)
    result["stopped_at"] = last_step(log)
    run(args, long, ranks)
    result["steps"] = last_step(log)
    return result


def words_of(args, stage, ranks=None):
    """The words of a stage's command, on so many ranks. prepare.py (None) knows no device."""
    words = [sys.executable]
    if (ranks or 1) > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script, *flags = stage.split()
    words += [str(KIT / script), *flags]
    if ranks:
        words += ["--device", args.device, "--dtype", args.dtype, "--compile", args.compile]
        words += ["--threads", str(args.threads)] if args.threads else []
    return words


def run(args, stage, ranks=None):
    """Raises UserError, with what went wrong, where a stage fails."""
    done = subprocess.run(words_of(args, stage, ranks), capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)  # all of it; the table holds a line
        raise UserError(f"{stage.split()[0]} on {ranks or 1} ranks: {cause(done.stderr)}")


def cause(stderr):
    """Of all that processes said the line that tells what went wrong; the last where none does."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if ERROR.match(line)), lines[-1])[:300]


def stop(words, log):
    """Start a run and ask it to stop, by SIGTERM, as soon as it has logged a step."""
    log.unlink(missing_ok=True)
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = ThreadPoolExecutor(1).submit(running.communicate)
    while running.poll() is None and not last_step(log):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said, _ = told.result()
    if not 0 < last_step(log) < LONG or running.returncode == 0:
        raise UserError(f"the long run was not stopped on its way, it said: {cause(said)}")


def last_step(log):
    """The last step in a log, 0 where there is none; a line that is being written is none yet."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return whole[-1]["step"] if whole else 0


def read(path):
    return json.loads(Path(path).read_text())
