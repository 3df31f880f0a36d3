"""Run a language model's Python programs safely.

    python -m evaluation.sandbox < program.py                     # its output, its last error line
    python -m evaluation.sandbox --strict-sandbox < program.py    # refuse where not all is enforced

Exit code: 0, 1 (error), 124 (time), 137 (limits), 2 (the sandbox cannot start). No compiled code;
Linux only. Each worker is a fork server (fork_server.py): a clean interpreter (empty environment,
no inherited files) with sympy loaded; a program is a fork of it. Each layer of confine.py is used
where the system has it, so that losing one rarely loses a property:

    namespaces   own network, processes and files: a read-only view of Python alone, /box writable
    another uid  where we are root, who may read everything and is bound by no process limit
    Landlock     the same view of files where namespaces are forbidden; no signals out
    seccomp      the system calls of a calculation alone: no new processes (threads are allowed), no
                 sockets, nothing that names another process, no owner, mode or time of a file
    rlimits      memory, CPU, file size, processes, open files; no core dumps

What they enforce together is not inferred but tried: a probe runs first, as a program, and attacks.
"""

import json
import os
import queue
import secrets
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from common.command_line import Parser, duration, whole
from common.errors import UserError
from evaluation import fork_server
from evaluation.fork_server import SandboxError, receive, send
from evaluation.supervise import Result, remove

START_SECONDS = 600  # loading sympy on a busy machine is slow
STOP_SECONDS = 20  # for a server to end when it is told to
SPARE_SECONDS = 60  # beyond a program's own time, for its server to clean up
MOST_MEMORY = 1 << 62  # bytes: the system counts no further
EXIT_CODES = {"ok": 0, "error": 1, "timeout": 124, "limits": 137}

CLEAN = {  # the environment of the fork servers
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/box",
    "TMPDIR": "/box",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Sandbox:
    """`workers` fork servers. Each program has `timeout` seconds of wall time.

    memory: bytes of address space for a program.
    strict: raise SandboxError (an OSError) where the system cannot enforce everything. Without it
    a line on stderr says what is missing.
    """

    def __init__(
        self, workers: int = 1, timeout: float = 5.0, memory: int = 2 << 30, strict: bool = False
    ):
        self.workers = workers
        self.timeout = timeout
        self.memory = min(memory, MOST_MEMORY)
        self.strict = strict

    def __enter__(self):
        self.servers = []
        self.idle = queue.Queue()
        try:
            missing = self._start()
        except BaseException:
            self.__exit__()
            raise
        if missing:
            print(f"sandbox: this system cannot enforce: {', '.join(missing)}", file=sys.stderr)
        return self

    def __exit__(self, *_):
        for server in list(self.servers):
            self._stop(server)

    def run(self, programs: list[str]) -> list[Result]:
        """Run programs in parallel over the workers; results in the programs' order."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._run_one, programs))

    def _run_one(self, program):
        server = self.idle.get()
        try:
            for _ in range(2):  # a server that died is replaced once per program
                try:
                    send(server[1], program.encode("utf-8", "surrogatepass"))
                    return Result(**json.loads(receive(server[1])))
                except OSError:
                    self._stop(server)
                    server = self._launch()
                    self._greeting(server)
            return Result("", "Error: the program's server ended", "error", 0.0)
        finally:
            self.idle.put(server)

    # ---- servers: (keeper, our end of the socket, folder)

    def _start(self):
        """Start all servers. Returns what they cannot enforce; all find the same."""
        launched = [self._launch() for _ in range(self.workers)]  # all load sympy at the same time
        for server in launched:
            missing = self._greeting(server)
            self.idle.put(server)
        if missing and self.strict:
            raise SandboxError(
                f"--strict-sandbox: this system cannot enforce: {', '.join(missing)}"
            )
        return missing

    def _launch(self):
        folder = os.path.join(tempfile.gettempdir(), f"sandbox-{secrets.token_hex(8)}")
        ours, theirs = socket.socketpair()
        ours.settimeout(START_SECONDS)
        options = {
            "folder": folder,
            "parent": os.getpid(),
            "timeout": self.timeout,
            "memory": self.memory,
            "uid": 1_900_000_000 + int.from_bytes(os.urandom(3), "big"),
        }
        script = os.path.abspath(fork_server.__file__)
        keeper = subprocess.Popen(
            [sys.executable, script, str(theirs.fileno()), json.dumps(options)],
            env=CLEAN,
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        server = keeper, ours, folder
        self.servers.append(server)
        return server

    def _greeting(self, server):
        """What a new server cannot enforce, once it is ready."""
        try:
            greeting = json.loads(receive(server[1]))
        except OSError as error:
            raise SandboxError(f"sandbox: its server did not start: {error}") from None
        if "refused" in greeting:
            raise SandboxError(greeting["refused"])
        server[1].settimeout(self.timeout + SPARE_SECONDS)
        return greeting["missing"]

    def _stop(self, server):
        if server in self.servers:
            self.servers.remove(server)
        keeper, channel, folder = server
        channel.close()  # the server then ends its program and itself
        try:
            keeper.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.terminate()  # it kills the server
            keeper.wait()
        remove(folder)  # where someone killed the keeper


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--timeout", type=duration, default=5.0, help="wall time in seconds")
    memory = whole(1, MOST_MEMORY)
    parser.add_argument("--memory", type=memory, default=2 << 30, help="address space in bytes")
    parser.add_argument(
        "--strict-sandbox",
        action="store_true",
        help="refuse where the system cannot enforce it all",
    )
    return parser.parse_args()


def main():
    args = arguments()
    program = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        with Sandbox(1, args.timeout, args.memory, args.strict_sandbox) as sandbox:
            result = sandbox.run([program])[0]
    except SandboxError as error:
        raise UserError(str(error)) from None
    sys.stdout.buffer.write(result.stdout.encode("utf-8", "replace"))
    sys.stdout.flush()
    if result.error:
        print(result.error, file=sys.stderr)
    return EXIT_CODES[result.status]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
