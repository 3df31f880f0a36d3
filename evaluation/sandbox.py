"""Run a language model's Python programs safely, and the tool-integrated protocol that needs it (Rho-1, section 3).

    python -m evaluation.sandbox < program.py                      its output on stdout, its last error line on stderr
    python -m evaluation.sandbox --strict-sandbox < program.py     refuse to start where the system cannot enforce everything

Exit code: 0, 1 (error), 124 (time), 137 (limits), 2 (the sandbox cannot start). No compiled code; Linux only.
Each worker is a fork server: a clean interpreter (empty environment, no inherited files) with sympy loaded; a program
is a fork of it. Each layer is used where the system has it, so that losing one rarely loses a property:

    namespaces   own network, processes and files: a read-only view of Python alone, /box writable, no /proc
    another uid  where we are root, who may read everything and is bound by no process limit
    Landlock     the same view of files where namespaces are forbidden; no TCP, no signals to the outside
    seccomp      no new processes (threads are allowed), no sockets, no signals or ptrace to others
    rlimits      memory, CPU, file size, processes, open files; no core dumps

What they enforce together is not inferred but tried: a probe runs first, as a program, and attacks.
"""

import argparse
import contextlib
import errno
import gc
import importlib.util
import json
import os
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if (
    __name__ == "__main__"
):  # by its path, as the fork servers are started: this folder's parent is the kit
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from evaluation.confine import (
    FILE,
    FOLDER,
    PROBE,
    PROCESSES,
    become,
    change_root,
    confine,
    in_a_fork,
    libc,
    mount,
    readable_paths,
    unshare,
)

OUTPUT, REPORT = 4 << 20, 1 << 16  # bytes read from a program: its output, its error line


class SandboxError(OSError):
    """The sandbox cannot start, or not as strictly as it was asked to."""


@dataclass
class Result:
    stdout: str  # invalid UTF-8 replaced
    error: str  # last line of the traceback or the reason of the end, "" if all went well
    status: str  # "ok", "error", "timeout" or "limits"
    seconds: float  # wall time


# ---- the protocol of tool-integrated reasoning: text -> program, result -> text ----


def program_of(text: str) -> str:
    """The program to run next, rebuilt from all the text so far (Rho-1's harness).

    Earlier blocks that succeeded come first, without their lines that start with `print(`; of earlier blocks that
    failed only the import lines stay, at the very top; then the latest block. "" if there is no block.
    """
    blocks, into = [], None  # blocks: (lines of program, lines of output)
    for line in text.split("\n"):
        if line.startswith("```python"):
            blocks.append(([], []))
            into = blocks[-1][0]
        elif line.startswith("```output") and blocks:
            into = blocks[-1][1]
        elif line.startswith("```"):
            into = None
        elif into is not None:
            into.append(line)
    if not blocks:
        return ""
    imports, kept = [], []
    for program, output in blocks[:-1]:
        if re.search(
            r"error|exception|no algorithms|cannot|nan|\.\.\.", "\n".join(output), re.IGNORECASE
        ):
            imports += [line for line in program if line.startswith(("import ", "from "))]
        else:
            kept += [line for line in program if not line.startswith("print(")]
    return "\n".join(imports + kept + blocks[-1][0])


def result_text(result: Result) -> str:
    """What stands in the ```output block: the output, `Done`, the last line of the traceback or `Timeout Error`.

    A failed program's output is dropped. Of more than 400 characters the first and the last 200 are shown.
    """
    text = (result.stdout.strip() or "Done") if result.status == "ok" else result.error.strip()
    return text if len(text) <= 400 else text[:200] + "..." + text[-200:]


# ---- the caller's side ----


class Sandbox:
    """`workers` fork servers. Each program has `timeout` seconds of wall time and `memory` bytes of address space.

    A line on stderr says what the system cannot enforce; with `strict` that raises SandboxError (an OSError) instead.
    """

    def __init__(
        self, workers: int = 1, timeout: float = 5.0, memory: int = 2 << 30, strict: bool = False
    ):
        self.workers, self.timeout, self.memory, self.strict = workers, timeout, memory, strict

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        os.chmod(self.folder, 0o711)  # another uid must pass, and cannot list
        canary = Path(self.folder, "canary")  # the probe tries to read and to change it
        canary.write_text("canary")
        canary.chmod(0o666)
        self.servers, self.idle = [], queue.Queue()
        try:
            for server in [
                self._launch() for _ in range(self.workers)
            ]:  # all load sympy at the same time
                missing = self._greeting(server)
                self.idle.put(server)
            if missing and self.strict:
                raise SandboxError(
                    f"--strict-sandbox: this system cannot enforce: {', '.join(missing)}"
                )
        except BaseException:
            self.__exit__()
            raise
        if missing:
            print(f"sandbox: this system cannot enforce: {', '.join(missing)}", file=sys.stderr)
        return self

    def __exit__(self, *_):
        for server in list(self.servers):
            self._stop(server)
        remove(self.folder)

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

    def _launch(self):
        folder = tempfile.mkdtemp(dir=self.folder)
        os.chmod(folder, 0o711)
        ours, theirs = socket.socketpair()
        ours.settimeout(self.timeout + 60)  # loading sympy on a busy machine is slow
        options = dict(
            folder=folder,
            canary=f"{self.folder}/canary",
            parent=os.getpid(),
            timeout=self.timeout,
            memory=self.memory,
            uid=1_900_000_000 + int.from_bytes(os.urandom(3), "big"),
        )
        clean = dict(
            PATH="/usr/bin:/bin",
            LANG="C.UTF-8",
            HOME="/box",
            TMPDIR="/box",
            PYTHONHASHSEED="0",
            OPENBLAS_NUM_THREADS="1",
            OMP_NUM_THREADS="1",
            MKL_NUM_THREADS="1",
        )
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--serve",
            str(theirs.fileno()),
            json.dumps(options),
        ]
        process = subprocess.Popen(
            command,
            env=clean,
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self.servers.append((process, ours))
        return process, ours

    def _greeting(self, server):
        try:
            missing = json.loads(receive(server[1]))
        except OSError as error:
            raise SandboxError(f"sandbox: its server did not start: {error}") from None
        server[1].settimeout(self.timeout + 15)
        return missing

    def _stop(self, server):
        if server in self.servers:
            self.servers.remove(server)
        server[1].close()
        server[0].kill()  # takes its process namespace, if it has one, with it
        server[0].wait()


def remove(folder):
    """rm, because a program may nest its folders deeper than shutil.rmtree recurses."""
    subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL)


def send(channel, data):
    channel.sendall(struct.pack("!Q", len(data)) + data)


def receive(channel):
    def exactly(n):
        data = bytearray()
        while len(data) < n:
            part = channel.recv(min(n - len(data), 1 << 20))
            if not part:
                raise ConnectionResetError("the other side ended")
            data += part
        return bytes(data)

    return exactly(struct.unpack("!Q", exactly(8))[0])


# ---- the fork server ----


def serve(channel, options):
    """Enter the namespaces, load sympy, send what the probe found unenforced, then answer programs until the end."""
    sys.path.pop(0)  # the kit's folder is not the programs' business
    for name in ("evaluation.confine", "evaluation"):
        del sys.modules[name]
    preload = [name for name in ("numpy", "sympy", "scipy") if importlib.util.find_spec(name)]
    paths = readable_paths()
    null = os.open("/dev/null", os.O_RDWR)
    own_files = False
    if in_a_fork(unshare) and unshare():  # half a success could not be undone
        child = os.fork()  # the first process of the new process namespace
        if child:
            channel.close()
            os.waitpid(child, 0)
            return
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with contextlib.suppress(OSError):  # Landlock is left; the probe tells
            own_files = change_root(options["folder"], paths)
    libc.prctl(4, 0)  # PR_SET_DUMPABLE: no program may trace this server
    needed = [importlib.util.find_spec(name).origin for name in ("json", *preload)]
    needed += [f"{path}/." for path in paths if os.path.isdir(path)]  # "/.": may be entered, too
    options["uid"] = next(
        (
            uid
            for uid in (options["uid"], 65534)
            if os.getuid() == 0
            and in_a_fork(lambda: become(uid) or all(os.access(path, os.R_OK) for path in needed))
        ),
        None,
    )  # None: the probe tells
    for name in preload:
        importlib.import_module(name)
    options.update(own_files=own_files, paths=paths, null=null)
    gc.freeze()  # a fork then shares the loaded modules' pages for longer
    values = dict(
        CANARY=options["canary"],
        PARENT=options["parent"],
        PROCESSES=PROCESSES,
        FOLDER=FOLDER,
        FILE=FILE,
    )
    known = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    probe = run_program(known + PROBE, {**options, "timeout": 30})
    if probe.status != "ok":
        raise SandboxError(f"the sandbox's probe failed: {probe.error}")
    missing = list(dict.fromkeys(probe.stdout.splitlines()))
    if "processes left behind" in missing and os.getpid() == 1:
        missing.remove("processes left behind")  # run_program kills all of its namespace
    send(channel, json.dumps(missing).encode())
    while True:
        program = receive(channel).decode("utf-8", "surrogatepass")
        send(channel, json.dumps(run_program(program, options).__dict__).encode())


def run_program(program, options):
    if options["own_files"]:  # a file system of its own bounds the sum of its files too
        box = "/box"
        mount(
            b"box", box, b"tmpfs", 2 | 4, f"size={FOLDER},nr_inodes=10000".encode()
        )  # MS_NOSUID | MS_NODEV
    else:
        box = tempfile.mkdtemp(dir=options["folder"])
    os.chmod(box, 0o777)
    (output, output_end), (report, report_end) = os.pipe(), os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_program(program, {**options, "box": box}, output_end, report_end)
    os.close(output_end)
    os.close(report_end)
    got, limit = {output: bytearray(), report: bytearray()}, {output: OUTPUT, report: REPORT}
    poll, pipes, over, ended = select.poll(), {output, report}, False, False
    for fd in pipes:
        poll.register(fd, select.POLLIN)
    while (
        not over
        and (pipes or not ended)
        and (left := start + options["timeout"] - time.monotonic()) > 0
    ):
        # A program may close both pipes and go on, or leave them to its children: the process itself is asked, too.
        for fd, _ in poll.poll(min(left * 1000, 20 if pipes else 1)):
            data = os.read(fd, 1 << 16)
            got[fd] += data
            over = over or len(got[fd]) > limit[fd]
            if not data:
                poll.unregister(fd)
                pipes.discard(fd)
        if not ended and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            ended = True
            kill_all(child)  # whoever else holds the pipes
    kill_all(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1:  # orphans of our namespace are ours
            os.wait()
    seconds = time.monotonic() - start
    os.close(output)
    os.close(report)
    if options["own_files"]:
        libc.umount2(box.encode(), 2)  # MNT_DETACH
    else:
        remove(box)
    status, error = got[report][:1].decode("latin-1"), got[report][1:].decode("utf-8", "replace")
    if over:
        status, error = "limits", f"Error: more than {OUTPUT} bytes of output"
    elif not ended:
        status, error = "timeout", "Timeout Error"
    elif code in (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGXFSZ):
        status, error = "limits", f"Error: killed by {signal.Signals(-code).name}, over its limits"
    elif code < 0:
        status, error = "error", f"Error: killed by signal {-code}"
    elif status not in ("o", "e", "l"):  # os._exit, or another program took its place
        status, error = "error", f"Error: ended by itself with exit status {code}"
    status = dict(o="ok", e="error", l="limits").get(status, status)
    stdout = bytes(got[output][:OUTPUT]).decode("utf-8", "replace")
    return Result(stdout, "" if status == "ok" else error, status, seconds)


def kill_all(child):
    """Kill a program and all that it started: its session and, as the first of a process namespace, everyone else."""
    for kill, pid in [(os.kill, child), (os.killpg, child)] + [(os.kill, -1)] * (os.getpid() == 1):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def be_the_program(program, options, output, report):
    """In the fork: give up everything, run, report one letter and the last line of the traceback. Never returns."""
    write, leave, keep_line = (
        os.write,
        os._exit,
        traceback.format_exception_only,
    )  # the program may replace them
    letter, line = b"e", ""
    try:
        os.setsid()
        for fd, into in ((options["null"], 0), (output, 1), (options["null"], 2)):
            os.dup2(fd, into)
        os.closerange(3, report)
        os.closerange(report + 1, 1 << 16)
        sys.stdout = sys.__stdout__ = stream = open(
            1, "w", encoding="utf-8", errors="replace", closefd=False
        )
        os.environ.update(HOME=options["box"], TMPDIR=options["box"])
        confine(options)
        if "input(" in program:
            raise RuntimeError  # the harness refuses it in these words
        exec(program, {})  # __name__ is not "__main__", as in the harness
        stream.flush()
        letter = b"o"
    except BaseException as error:  # SystemExit too: the harness shows it as a failure
        broken = (
            isinstance(error, MemoryError)
            or isinstance(error, OSError)
            and error.errno in (errno.EAGAIN, errno.EFBIG, errno.ENOSPC, errno.ENOMEM, errno.EMFILE)
        )
        letter = b"l" if broken else b"e"
        line = type(error).__name__  # if there is no memory for more
        line = "".join(keep_line(type(error), error)).rstrip("\n").split("\n")[-1]
        line = re.sub(r"\.? Did you mean: .*\?$", "", line)  # only newer Pythons add it
    finally:  # no exit handlers, no waiting for threads
        with contextlib.suppress(BaseException):
            stream.flush()
        try:
            write(report, letter + line.encode("utf-8", "replace")[: REPORT - 1])
        finally:
            leave(0)


def main():
    parser = argparse.ArgumentParser(description="Run the Python program on stdin in the sandbox.")
    parser.add_argument("--timeout", type=float, default=5.0, help="wall time in seconds")
    parser.add_argument("--memory", type=int, default=2 << 30, help="address space in bytes")
    parser.add_argument(
        "--strict-sandbox",
        action="store_true",
        help="refuse where the system cannot enforce it all",
    )
    args = parser.parse_args()
    program = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        with Sandbox(1, args.timeout, args.memory, args.strict_sandbox) as sandbox:
            result = sandbox.run([program])[0]
    except OSError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
    sys.stdout.buffer.write(result.stdout.encode("utf-8", "replace"))
    sys.stdout.flush()
    if result.error:
        print(result.error, file=sys.stderr)
    return dict(ok=0, error=1, timeout=124, limits=137)[result.status]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        try:
            serve(socket.socket(fileno=int(sys.argv[2])), json.loads(sys.argv[3]))
        except ConnectionError:
            pass  # the caller ended
    else:
        sys.exit(main())
