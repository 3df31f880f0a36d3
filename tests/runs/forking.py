"""A `python` for recipes of many commands: each is run by a fork of one process with PyTorch in it.

    python tests/runs/forking.py SOCKET      # answers tests/runs/forked.py, which a recipe calls

Only libraries are imported before a fork. The kit's own files are read anew by each command, from
where the command says.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import pytest

from child import end_with

# Not huggingface_hub: what the environment says of a hub it reads when it is imported.
LIBRARIES = (
    "matplotlib.pyplot",
    "safetensors.torch",
    "tiktoken",
    "torch._dynamo",
    "torch.distributed.tensor",
)


@pytest.fixture(scope="module", name="python")
def python_fixture():
    """A folder that holds the program `python`."""
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, __file__, f"{folder}/socket"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout.readline() == "ready\n"
        client = Path(__file__).with_name("forked.py")
        program = Path(folder, "python")
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{folder}/socket" "$@"\n'
        )
        program.chmod(0o755)
        yield Path(folder)
        server.stdin.close()
        server.wait()


def serve(path):
    """Answer until standard input is closed."""
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
        connection.close()


def answer(connection):
    """Run a command in a process of its own, and send its exit code. Does not return.

    Where the recipe kills the command it kills the client, so the process is ended, too.
    """
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
    process = os.fork()
    if process == 0:
        run(json.loads(message), descriptors)
    ended = os.pidfd_open(process)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(process, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(code).encode())
    os._exit(0)


def run(job, descriptors):
    """As `python WORDS` would. Does not return."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    words = job["words"]
    named = words[0] == "-m"
    sys.argv = words[1:] if named else words
    sys.path[0] = job["cwd"] if named else str(Path(words[0]).resolve().parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if named:
        end_with(lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True))
    end_with(lambda: runpy.run_path(words[0], run_name="__main__"))


if __name__ == "__main__":
    serve(sys.argv[1])
