"""A finished run as a record for results/: its numbers, and what they may depend on."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from common.provenance import git
from tools.results.files import ROOT, Run
from training import finished

LOCK = ROOT / "requirements.lock"
NUMBERS = ("val_loss", "exact_match", "tokens_seen", "tokens_selected", "seconds")
LEFT_OUT = (
    "data",
    "val",
    "init",
    "out",
    "ref_loss",
    "inputs",
    "overwrite",
    "verify",
    "chain",
    "made",
)
LAST = 100  # records of the log over which a share kept is averaged
PACKAGES = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors")
# Instruction sets between which the libraries choose their kernels.
SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")
# What a user may set to choose kernels and threads.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
)


def collected(folder, method, variant=""):
    """The `Run` of a run's folder. Raises UserError where it is not finished.

    Versions, machine and environment are this process's: call it where the run was made.
    """
    folder = Path(folder)
    arguments = finished.arguments(folder)
    summary = finished.summary(folder, f"{method}, to be added to results")
    curve = []
    for step in finished.steps(folder):
        if step.get("val_loss") is not None:
            curve.append([step["tokens_seen"], round(step["val_loss"], 5)])
    numbers = {key: summary.get(key) for key in (*NUMBERS, "peak_memory_bytes")}
    return Run(
        method=method,
        seed=arguments["seed"],
        variant=variant,
        numbers=numbers,
        curve=curve,
        arguments={key: value for key, value in arguments.items() if key not in LEFT_OUT},
        inputs=arguments["inputs"],
        made=made(folder, arguments.get("made", {})),
    )


def made(folder, noted):
    """Commit, date, versions, machine and environment of a run that this environment made.

    The commit is the one that the run `noted` in args.json; an older run noted none.
    """
    ended = datetime.datetime.fromtimestamp((folder / "summary.json").stat().st_mtime)
    return {
        "commit": commit_of(noted) if noted.get("commit") else commit(),
        "date": ended.date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "lock": lock(),
        "machine": machine(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def lock():
    """requirements.lock as {"sha256": ..., "differing": {package: the version that is here}}.

    A version's local part (+cpu, +cu128) is no difference, nor is a package that is not here.
    """
    content = LOCK.read_bytes()
    differing = {}
    for line in content.decode().splitlines():
        name, is_pinned, wanted = line.partition("==")
        if not is_pinned:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.partition("+")[0] != wanted:
            differing[name] = version
    return {"sha256": hashlib.sha256(content).hexdigest(), "differing": differing}


def share_kept(log, kind):
    """What was kept of a kind of text, or its mean weight, at a run's end; None: not noted."""
    shares = [step["kept"][kind] for step in log[-LAST:] if kind in step.get("kept", {})]
    return statistics.mean(shares) if shares else None


def commit_of(noted):
    """As `commit`, of what a run noted."""
    return noted["commit"][:10] + ("+" if noted["changed"] else "")


def commit():
    """The checkout's commit, with a + where files differ from it; "unknown" without git."""
    try:
        head = git(ROOT, "rev-parse", "--short=10", "HEAD")
        changed = git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" if changed else head


def machine():
    """Processor, its instruction sets, the kernels that torch takes, cores."""
    told = {"processor": platform.machine(), "instructions": []}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                told["processor"] = value
            if key in ("flags", "Features"):
                told["instructions"] = [name for name in SETS if name in value.split()]
    except OSError:
        pass  # not Linux
    told["torch_kernels"] = torch.backends.cpu.get_cpu_capability()
    told["cores"] = os.cpu_count()
    return told
