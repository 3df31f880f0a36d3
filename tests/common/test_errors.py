"""How a program ends: one line, an exit code, and no traceback, whatever became of its streams."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import errors
from common.command_line import THREADS, Parser, whole
from common.errors import UserError, cli
from conftest import HANGS, ROOT

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from common.errors import UserError, cli

def main():
    {body}

cli(main)
"""


def program(body):
    return [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)]


def ended(raises, capsys):
    """(exit code, stderr) of a stage whose main() raises this."""

    def main():
        raise raises

    with pytest.raises(SystemExit) as stop:
        cli(main)
    return stop.value.code, capsys.readouterr().err


def huge_array():
    np.ones((1 << 50,))


def huge_tensor():
    torch.ones(1 << 55)


def overflowing_tensor():
    torch.empty(1 << 62, 1 << 10)


def huge_bytes():
    bytearray(1 << 60)


@pytest.mark.parametrize(
    "allocate", [huge_array, huge_tensor, overflowing_tensor, huge_bytes], ids=lambda f: f.__name__
)
def test_memory_that_runs_out_is_one_line(allocate, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_slm.py"])
    try:
        allocate()
    except Exception as error:
        code, err = ended(error, capsys)
    assert code == 2
    assert err.startswith("error: out of memory") and err.count("\n") == 1
    assert "lower --micro-batch-size (with --rank-windows it changes no choice), or add" in err


def test_a_gpu_whose_memory_runs_out_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score.py"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\nmuch.")
    code, err = ended(error, capsys)
    assert code == 2
    assert err == (
        "error: out of memory (CUDA out of memory); lower --batch-size or --seq-len; "
        "what was finished before is kept\n"
    )


def test_an_error_of_our_own_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a mistake"):
        cli(lambda: (_ for _ in ()).throw(RuntimeError("a mistake")))


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "make room on the disk, then the same command goes on"),
        (errno.EROFS, "make the place writable, or name another one, then"),
        (errno.EACCES, "allow it, or name another place, then the same command goes on"),
    ],
)
def test_what_to_mend_first_is_said_first(number, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score.py"])
    code, err = ended(OSError(number, os.strerror(number), "out/x"), capsys)
    assert code == 2
    assert f"error: {os.strerror(number)} (out/x); {words}" in err


def test_a_message_is_one_line_that_does_nothing_to_a_terminal():
    assert str(UserError("a\nb\x1b[31mc\u202e é 数")) == "a b\\x1b[31mc\\u202e é 数"
    assert str(UserError("a" * 9000 + "; mend it")) == f"{'a' * 1000} [...] {'a' * 991}; mend it"


@pytest.mark.parametrize("stream", ["1", "2"])
def test_closed_streams(stream, tmp_path):
    """`>&-`: no traceback, and what is printed does not go into the next file that is opened."""
    file = tmp_path / "file"
    body = f"f = open({str(file)!r}, 'w'); import os; os.write({stream}, b'printed'); f.close()"
    code = subprocess.run(
        ["bash", "-c", f'"$@" {stream}>&-', "-", *program(body)], capture_output=True, timeout=HANGS
    )
    assert (code.returncode, code.stdout, code.stderr) == (0, b"", b"")
    assert file.read_bytes() == b""


def test_an_error_with_a_closed_stderr_has_its_code():
    line = ["bash", "-c", '"$@" 2>&-', "-", *program("raise UserError('x')")]
    done = subprocess.run(line, capture_output=True, timeout=HANGS)
    assert (done.returncode, done.stderr) == (2, b"")


def test_nobody_reads_any_further():
    """`| head -1`: the reader is gone before the rest is printed."""
    process = subprocess.Popen(
        program("input(); print('x' * 100_000); print('more', flush=True)"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    err = process.stderr.read()
    assert (process.wait(timeout=HANGS), err) == (errors.CLOSED_PIPE, b"")


def test_a_full_disk_behind_stdout():
    done = subprocess.run(
        ["bash", "-c", '"$@" > /dev/full', "-", *program("print('x')")],
        capture_output=True,
        timeout=HANGS,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: No space left on device; make room on the disk")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("stage", ["train_slm.py", "prepare.py", "tools/plan/__main__.py"])
def test_interrupted_while_it_loads(stage, tmp_path):
    """Ctrl-C in the middle of an import: a module that is loaded early sends it."""
    for name in ("numpy", "torch"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()\n"
        )
    done = subprocess.run(
        [sys.executable, str(ROOT / stage), "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        timeout=HANGS,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("value", ["0", "1025", "100000", "1e3", "9" * 5000, "-1", ""])
def test_bounds(value):
    parser = Parser("")
    parser.add_argument("--threads", type=whole(1, THREADS))
    with pytest.raises(UserError) as caught:
        parser.parse_args([f"--threads={value}"])
    message = str(caught.value)
    assert message.startswith("--threads: got ")
    assert message.endswith("wanted a whole number of at least 1, at most 1,024")
    assert len(message) < 200
