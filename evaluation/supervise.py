"""One program of the sandbox, seen from the server: it is started, read, ended and cleaned up."""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass

from evaluation.confine import mount_box, unmount_box
from evaluation.program import KEY, REPORT, be_the_program

OUTPUT = 4 << 20  # bytes read of a program's output


@dataclass
class Result:
    stdout: str  # invalid UTF-8 replaced
    error: str  # last line of the traceback or the reason of the end, "" if all went well
    status: str  # "ok", "error", "timeout" or "limits"
    seconds: float  # wall time


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
    key = os.urandom(KEY)
    child = os.fork()
    if child == 0:
        secret = [key, report_end]
        del key, report_end
        be_the_program(program, {**options, "box": box}, output_end, secret)
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
    status, error = verdict(ending, code, got[report], key)
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
    watched = watch(child)
    if watched is not None:
        poll.register(watched, select.POLLIN)
    try:
        while is_open or not ended:
            left = end - time.monotonic()
            if left <= 0:
                break
            # A program may close both pipes and go on, or leave them to its children: the process
            # itself is asked, too.
            wait = left * 1000
            if watched is None:
                wait = min(wait, 20 if is_open else 1)
            for fd, _ in poll.poll(wait):
                if fd == caller:
                    return got, "no caller"
                if fd == watched:
                    poll.unregister(fd)
                    continue
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
    finally:
        if watched is not None:
            os.close(watched)
    return got, "ended" if ended else "time"


def watch(child):
    """A descriptor that tells when a process has ended. None before Linux 5.3."""
    try:
        return os.pidfd_open(child)
    except (AttributeError, OSError):
        return None


def verdict(ending, code, report, key):
    """(status, error line) of a program: how it ended, its exit code, what it reported.

    A report counts if it is the only one and begins with the program's key.
    """
    if ending == "too much":
        return "limits", f"Error: more than {OUTPUT} bytes of output"
    if ending == "time":
        return "timeout", "Timeout Error"
    if code in (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGXFSZ):
        return "limits", f"Error: killed by {signal.Signals(-code).name}, over its limits"
    if code < 0:
        return "error", f"Error: killed by signal {-code}"
    if not report:  # os._exit
        return "error", f"Error: ended by itself with exit status {code}"
    if not report.startswith(key) or report.count(key) > 1:
        return "error", "Error: wrote to the sandbox's own descriptor"
    letter = bytes(report[KEY : KEY + 1])
    line = report[KEY + 1 :].decode("utf-8", "replace")
    if letter == b"o" and not line:
        return "ok", ""
    return "limits" if letter == b"l" else "error", line


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


def remove(folder):
    """rm, because a program may nest its folders deeper than shutil.rmtree recurses."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # most programs leave nothing
        return
    rm = ["rm", "-rf", "--", folder]
    if subprocess.run(rm, stderr=subprocess.DEVNULL).returncode:  # folders may be closed to us
        subprocess.run(["chmod", "-R", "u+rwx", "--", folder], stderr=subprocess.DEVNULL)
        subprocess.run(rm, stderr=subprocess.DEVNULL)
