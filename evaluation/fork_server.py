"""The sandbox's inner side: a server whose forks become the programs.

sandbox.py starts this file by its path, with a socket and its options, in an empty environment.
The server enters the namespaces, loads sympy, lets the probe attack, and then answers programs: a
program costs a fork, not an interpreter that imports sympy. Nothing of a program outlives its
answer.
"""

import contextlib
import errno
import gc
import importlib
import importlib.util
import json
import os
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
from dataclasses import asdict, dataclass

if __name__ == "__main__":  # by its path: this folder's parent is the kit
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
    mount_box,
    no_dumps,
    readable_paths,
    unmount_box,
    unshare,
)

OUTPUT = 4 << 20  # bytes read of a program's output
REPORT = 1 << 16  # bytes read of its error line
PROBE_SECONDS = 120
NOBODY = 65534
PR_SET_PDEATHSIG = 1
BROKEN_LIMITS = (errno.EAGAIN, errno.EFBIG, errno.ENOSPC, errno.ENOMEM, errno.EMFILE)


class SandboxError(OSError):
    """The sandbox cannot start, or not as strictly as it was asked to."""


@dataclass
class Result:
    stdout: str  # invalid UTF-8 replaced
    error: str  # last line of the traceback or the reason of the end, "" if all went well
    status: str  # "ok", "error", "timeout" or "limits"
    seconds: float  # wall time


# --------------------------------------------------------------------------------------------------
# messages between both sides: a length and so many bytes


def send(channel, data):
    channel.sendall(struct.pack("!Q", len(data)) + data)


def receive(channel):
    """The next message. ConnectionResetError where the other side ended."""
    (n,) = struct.unpack("!Q", receive_bytes(channel, 8))
    return receive_bytes(channel, n)


def receive_bytes(channel, n):
    data = bytearray()
    while len(data) < n:
        part = channel.recv(min(n - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the other side ended")
        data += part
    return bytes(data)


def remove(folder):
    """rm, because a program may nest its folders deeper than shutil.rmtree recurses."""
    subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------------------
# the server


def serve(channel, options):
    """Shut itself in, send what the probe found unenforced, then answer programs until the end."""
    sys.path.pop(0)  # the kit's folder is not the programs' business
    for name in ("evaluation.confine", "evaluation"):
        del sys.modules[name]
    preload = [name for name in ("numpy", "sympy", "scipy") if importlib.util.find_spec(name)]
    paths = readable_paths()
    null = os.open("/dev/null", os.O_RDWR)
    own_files = False
    if in_a_fork(unshare) and unshare():  # tried first: half a success could not be undone
        child = os.fork()  # the first process of the new process namespace
        if child:
            channel.close()
            os.waitpid(child, 0)
            return
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # Landlock is left; the probe tells
            own_files = change_root(options["folder"], paths)
    no_dumps()  # no program may trace this server
    uid = usable_uid(options["uid"], preload, paths)
    for name in preload:
        importlib.import_module(name)
    options.update(uid=uid, own_files=own_files, paths=paths, null=null, caller=channel.fileno())
    gc.freeze()  # a fork then shares the loaded modules' pages for longer
    send(channel, json.dumps(probe(options)).encode())
    while True:
        program = receive(channel).decode("utf-8", "surrogatepass")
        send(channel, json.dumps(asdict(run_program(program, options))).encode())


def usable_uid(wanted, preload, paths):
    """Another user's id that programs can run as, else None: then the probe tells.

    Only root may become another user, who may not be allowed to read Python and its modules.
    """
    if os.getuid() != 0:
        return None
    needed = [importlib.util.find_spec(name).origin for name in ("json", *preload)]
    needed += [f"{path}/." for path in paths if os.path.isdir(path)]  # "/.": may be entered, too

    def can_read(uid):
        become(uid)
        return all(os.access(path, os.R_OK) for path in needed)

    for uid in (wanted, NOBODY):
        if in_a_fork(can_read, uid):
            return uid
    return None


def probe(options):
    """What the layers together do not enforce, as a list: the probe attacks, as a program."""
    values = {
        "CANARY": options["canary"],
        "PARENT": options["parent"],
        "PROCESSES": PROCESSES,
        "FOLDER": FOLDER,
        "FILE": FILE,
    }
    known = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    result = run_program(known + PROBE, {**options, "timeout": PROBE_SECONDS})
    if result.status != "ok":
        raise SandboxError(f"the sandbox's probe failed: {result.error}")
    missing = list(dict.fromkeys(result.stdout.splitlines()))
    if "processes left behind" in missing and os.getpid() == 1:
        missing.remove("processes left behind")  # run_program kills all of its namespace
    return missing


# --------------------------------------------------------------------------------------------------
# one program, seen from the server


def run_program(program, options):
    """Fork, let the child become the program, read what it says until it ends or has to."""
    if options["own_files"]:  # a file system of its own bounds the sum of its files too
        box = "/box"
        mount_box(box)
    else:
        box = tempfile.mkdtemp(dir=options["folder"])
    os.chmod(box, 0o777)
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_program(program, {**options, "box": box}, output_end, report_end)
    os.close(output_end)
    os.close(report_end)

    end = start + options["timeout"]
    limits = {output: OUTPUT, report: REPORT}
    got, ending = read_until_end(child, limits, end, options["caller"])
    kill_all(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1:  # orphans of our namespace are ours
            os.wait()
    seconds = time.monotonic() - start
    os.close(output)
    os.close(report)
    if options["own_files"]:
        unmount_box(box)
    else:
        remove(box)
    if ending == "no caller":
        raise ConnectionResetError("the other side ended")
    status, error = verdict(ending, code, got[report])
    stdout = got[output][:OUTPUT].decode("utf-8", "replace")
    return Result(stdout, error, status, seconds)


def read_until_end(child, limits, end, caller):
    """({pipe: what was read}, how it ended: "ended", "too much", "time" or "no caller").

    limits: {pipe: bytes}. end: on the monotonic clock. caller: the socket to the caller.
    """
    got = {fd: bytearray() for fd in limits}
    is_open = set(limits)
    ended = False
    poll = select.poll()
    for fd in limits:
        poll.register(fd, select.POLLIN)
    poll.register(caller, 0)  # tells only of its end
    while is_open or not ended:
        left = end - time.monotonic()
        if left <= 0:
            break
        # A program may close both pipes and go on, or leave them to its children: the process
        # itself is asked, too.
        wait = min(left * 1000, 20 if is_open else 1)
        for fd, _ in poll.poll(wait):
            if fd == caller:
                return got, "no caller"
            data = os.read(fd, 1 << 16)
            got[fd] += data
            if len(got[fd]) > limits[fd]:
                return got, "too much"
            if not data:
                poll.unregister(fd)
                is_open.discard(fd)
        if not ended and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            ended = True
            kill_all(child)  # whoever else holds the pipes
    return got, "ended" if ended else "time"


def verdict(ending, code, report):
    """(status, error line) of a program: how it ended, its exit code, what it reported."""
    if ending == "too much":
        return "limits", f"Error: more than {OUTPUT} bytes of output"
    if ending == "time":
        return "timeout", "Timeout Error"
    if code in (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGXFSZ):
        return "limits", f"Error: killed by {signal.Signals(-code).name}, over its limits"
    if code < 0:
        return "error", f"Error: killed by signal {-code}"
    status = {b"o": "ok", b"e": "error", b"l": "limits"}.get(bytes(report[:1]))
    if status is None:  # os._exit, or another program took its place
        return "error", f"Error: ended by itself with exit status {code}"
    if status == "ok":
        return "ok", ""
    return status, report[1:].decode("utf-8", "replace")


def kill_all(child):
    """Kill a program and all that it started.

    That is its session and, where we are the first of a process namespace, everyone else in it.
    """
    targets = [(os.kill, child), (os.killpg, child)]
    if os.getpid() == 1:
        targets.append((os.kill, -1))
    for kill, pid in targets:
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------
# one program, from inside


def be_the_program(program, options, output, report):
    """In the fork: give up everything, run, report. Never returns.

    The report is one letter (o: ok, e: error, l: limits) and the last line of the traceback.
    """
    # The program may replace them.
    write, leave, last_line = os.write, os._exit, last_line_of
    letter = b"e"
    line = ""
    try:
        os.setsid()
        for fd, into in ((options["null"], 0), (output, 1), (options["null"], 2)):
            os.dup2(fd, into)
        os.closerange(3, report)
        os.closerange(report + 1, 1 << 16)
        stream = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
        sys.stdout = sys.__stdout__ = stream
        os.environ.update(HOME=options["box"], TMPDIR=options["box"])
        confine(options)
        if "input(" in program:
            raise RuntimeError  # the harness refuses it in these words
        exec(program, {})  # __name__ is not "__main__", as in the harness
        stream.flush()
        letter = b"o"
    except BaseException as error:  # SystemExit too: the harness shows it as a failure
        if over_its_limits(error):
            letter = b"l"
        line = type(error).__name__  # if there is no memory for more
        line = last_line(error)
    finally:  # no exit handlers, no waiting for threads
        with contextlib.suppress(BaseException):
            stream.flush()
        try:
            write(report, letter + line.encode("utf-8", "replace")[: REPORT - 1])
        finally:
            leave(0)


def over_its_limits(error):
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and error.errno in BROKEN_LIMITS


def last_line_of(error, lines_of=traceback.format_exception_only):
    line = "".join(lines_of(type(error), error)).rstrip("\n").split("\n")[-1]
    return re.sub(r"\.? Did you mean: .*\?$", "", line)  # only newer Pythons add it


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the caller ended
        serve(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
