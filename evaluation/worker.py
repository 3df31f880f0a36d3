"""Comparisons that may hang or kill a process, in a process of their own with limits.

    with Worker() as worker:
        worker.compare("x+x", "2x")        # (True, "")
        worker.compare("1000000!!", "1")   # (False, "no verdict within 5 s")

A single answer such as 9^9^9 can take all memory or for ever. This file, run as a script, is the
worker's side: one comparison in, one verdict out, as lines of JSON. Nothing here imports torch,
whose libraries alone would take most of the memory limit.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from evaluation.equality import equal
from evaluation.strict import same

MEMORY = 2 << 30  # bytes of address space
SECONDS = 5.0  # of processor time for a comparison: a busy machine changes no verdict
PATIENCE = 60  # times as long on the clock, and the worker counts as hung
START_SECONDS = 600  # on the clock
ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A process that compares answers. It starts when first asked; if it dies, a new one does."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def compare(self, pred, gt, strict=False, seconds=SECONDS):
        """(equal, reason) of two normalised answers or, with `strict`, of two as written.

        reason: "" for a verdict, else why there is none (and equal is False).
        """
        if self.process is None:
            self.start()
        process = self.process
        try:
            process.stdin.write(json.dumps([pred, gt, strict, seconds]) + "\n")
            process.stdin.flush()
            line, hung = self.read_line(PATIENCE * seconds)
        except OSError:  # it died between two comparisons
            line, hung = "", False
        if line:
            return tuple(json.loads(line))
        self.stop()
        if hung or process.returncode == -signal.SIGPROF:
            return False, f"no verdict within {seconds:g} s"
        return False, f"worker died (exit code {process.returncode})"

    def start(self):
        """Start the process and wait until it has loaded math-verify."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.worker"],
            text=True,
            cwd=ROOT,
            # sympy's answers may depend on the order of sets
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        line, _ = self.read_line(START_SECONDS)
        if line.strip() != "ready":
            self.stop()
            raise UserError(
                "grading: got a worker process that does not start, wanted math-verify to be "
                "importable; pip install -r requirements.txt"
            )

    def stop(self):
        process = self.process
        if process is None:
            return
        self.process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # a line that it never read

    def read_line(self, seconds):
        """(line, hung): the process's next line, "" when it died or said nothing for so long."""
        answers = self.process.stdout
        if not select.select([answers], [], [], seconds)[0]:
            return "", True
        line = answers.readline()
        if not line.endswith("\n"):
            self.process.wait()  # its pipe is closed: it is about to end, and says how
            return "", False
        return line, False


# --------------------------------------------------------------------------------------------------
# the worker's side


def work():
    """Answer comparisons [pred, gt, strict, seconds] from stdin until it closes."""
    import logging

    import math_verify  # noqa: F401  now, so that no comparison pays for the import

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    limit_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        reply = answer(*json.loads(line))
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)


def limit_memory():
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError):
        pass  # macOS has no such limit


def answer(pred, gt, strict, seconds):
    """[equal, reason]. Ends the process after so many seconds of processor time."""
    # The default action of its signal ends the process also in the middle of a long call in C.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return [same(pred, gt) if strict else equal(pred, gt), ""]
    except Exception as error:
        return [False, f"not comparable ({type(error).__name__})"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    work()
