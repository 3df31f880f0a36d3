"""A process that has imported the stages, and forks a child for each run: hundreds of kills are
cheap, because none of them starts Python.

    python tests/reliability/warm.py        # a job per line of stdin, an answer per line of stdout

A job is JSON: `stage` (a module), `argv`, `cwd`, `log` (a file for what it prints), and perhaps
`point` (of tests/killed.py), `moments` (a file that lists them) and `settings` ({"MODULE:NAME":
value}). The answer is the exit code, negative for a signal. No stage runs in this process itself:
autograd and thread pools do not survive a fork.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ("prepare", "train_ref", "train_slm", "score", "eval_math", "tools.decontaminate")
LATE = (
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "huggingface_hub.repocard_data",
    "pyarrow.parquet",
    "torch.optim",
    "torch._dynamo",
    "tokenizers",
    "safetensors.torch",
)


class Warm:
    """The process, from outside."""

    def __init__(self, **environment):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, stage, argv, cwd, **more):
        """Run a stage. Returns (exit code, what it printed)."""
        log = Path(cwd).with_name(Path(cwd).name + ".printed")
        job = {"stage": stage, "argv": argv, "cwd": str(cwd), "log": str(log), **more}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, log.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child(job):
    """One run, in a process of its own. Does not return."""
    import killed
    from child import end_with
    from common.errors import cli

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    sys.argv = [job["stage"].replace(".", "/") + ".py", *job["argv"]]
    for name, value in job.get("settings", {}).items():
        module, _, constant = name.partition(":")
        setattr(importlib.import_module(module), constant, value)
    point = killed.Point(job["point"], "SIGKILL") if job.get("point") else None
    killed.arm_changes(point, record=job.get("moments"))
    end_with(lambda: cli(importlib.import_module(job["stage"]).main))


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    from killed import wait_for_no_disk

    torch.set_num_threads(1)
    for name in (*LATE, *MODULES):
        importlib.import_module(name)
    wait_for_no_disk()
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
