"""A `python` for recipes of many commands: each is run by a fork of one process with PyTorch in it.

    python tests/runs/forking.py SOCKET      # answers tests/runs/forked.py, which a recipe calls

Only libraries are imported before a fork. The kit's own files are read anew by each command, from
where the command says. It is for commands on one thread: thread pools do not survive a fork.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

LIBRARIES = (
    "huggingface_hub.repocard_data",
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
        server.kill()
        server.wait()


def serve(path):
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
        connection.close()


def answer(connection):
    """Run a command in a process of its own, and send its exit code. Does not return."""
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
    process = os.fork()
    if process == 0:
        run(json.loads(message), descriptors)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
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
    sys.path[1:1] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    code = 0
    try:
        if named:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
