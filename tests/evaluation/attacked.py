"""Run the attacks of attacks.py, and look at the outside before and after each of them.

worlds.py starts this file as some user, with one argument (JSON): `home`, a folder to attack;
`library`, a folder that programs may read; `deny`, system calls that this world lacks; `names` of
attacks. With `plain` there is no sandbox: the attacks have to succeed. The answer is JSON on
stdout.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

from attacks import CALLS, NUMBERS, PRELUDE, attacks
from outside import (
    RECORDED,
    SECRET,
    Outside,
    arrived_signals,
    end,
    libc,
    process_state,
    start_waiting,
)

HERE = os.path.dirname(os.path.abspath(__file__))
SECONDS = 60  # of an attack, at most


def servers():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{HERE}/evaluation/fork_server.py".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# --------------------------------------------------------------------------------------------------
# with and without a sandbox: start() what runs a program, run() it, finish()


class Contained:
    def __init__(self, sandbox):
        self.sandbox = sandbox
        self.caller = os.getpid()

    def start(self):
        pass

    def run(self, program):
        result = self.sandbox.run([program])[0]
        return result.status, result.stdout

    def finish(self):
        pass

    def processes(self):
        return [self.caller, *servers()]


class Plain:
    """Each program is a child of a process that stands for its server."""

    def __init__(self):
        self.caller = start_waiting()

    def start(self):
        self.ours, theirs = socket.socketpair()
        self.server = os.fork()
        if self.server == 0:
            for number in RECORDED:
                signal.signal(number, signal.SIG_DFL)
            self.ours.close()
            serve_one(theirs)
        theirs.close()
        self.ours.settimeout(3)
        self.ours.recv(1)

    def run(self, program):
        self.ours.sendall(program.encode())
        said = bytearray()
        with contextlib.suppress(OSError):
            while not said.endswith(b"\0done"):
                data = self.ours.recv(1 << 16)
                if not data:
                    break
                said += data
        return "ok", said.decode(errors="replace")

    def finish(self):
        self.ours.close()
        with contextlib.suppress(OSError):
            os.killpg(self.server, signal.SIGKILL)
        end(self.server)
        if process_state(self.caller) is None:
            end(self.caller)
        else:
            os.kill(self.caller, signal.SIGKILL)
            os.waitpid(self.caller, 0)
        self.caller = start_waiting()

    def processes(self):
        return [self.caller, self.server]


def serve_one(channel):
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, 1 << 16)
    os.setsid()
    channel.sendall(b"r")
    program = channel.recv(1 << 20).decode()
    folder = tempfile.mkdtemp()
    if os.fork() == 0:
        try:
            os.setsid()
            os.chdir(folder)
            os.dup2(channel.fileno(), 1)
            sys.stdout = open(1, "w", closefd=False)
            exec(program, {})
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.wait()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        channel.sendall(b"\0done")
        channel.recv(1)
    os._exit(0)


# --------------------------------------------------------------------------------------------------


def lack(calls):
    """Take system calls away from this process: [(name, its first argument or None, error)]."""
    from evaluation import system_calls as s

    code = [(s.LOAD, 0, 0, s.NUMBER)]
    for name, first, error in calls:
        result = (s.RETURN, 0, 0, s.FAIL | getattr(errno, error))
        if first is None:
            code += [(s.EQUAL, 0, 1, NUMBERS[name]), result]
        else:
            tests = [(s.LOAD, 0, 0, s.low(0)), (s.EQUAL, 0, 1, first), result]
            code += [(s.EQUAL, 0, 4, NUMBERS[name]), *tests, (s.LOAD, 0, 0, s.NUMBER)]
    code.append((s.RETURN, 0, 0, s.ALLOW))
    libc.prctl(38, 1, 0, 0, 0)
    s.install(b"".join(struct.pack("HBBI", *line) for line in code))


def look(outside, world):
    found = outside.look()
    for pid in [outside.stranger, *world.processes()]:
        found[f"process {pid}"] = process_state(pid)
    return found


def differences(before, after):
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def attack(outside, world, kind, program):
    """What of the outside is different afterwards, and what the program says that it has."""
    world.start()
    values = {**outside.values(), "CALLER": world.caller, "CALLS": CALLS}
    known = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    before = look(outside, world)
    status, said = world.run(f"{known}{PRELUDE}\n{program}\n")
    after = look(outside, world)
    for _ in range(200):  # what has been killed needs a moment to end
        different = differences(before, after)
        if not different or any(name in before for name in different):
            break
        time.sleep(0.01)
        after = look(outside, world)
    got = [what for what in (SECRET, "GOT OUT") if what in said]
    if kind == "a forged verdict" and status == "ok":
        got.append("ok")
    world.finish()
    if different:
        outside.remove()
        outside.make()
    return different + got


def main():
    options = json.loads(sys.argv[1])
    for number in RECORDED:
        signal.signal(number, lambda *_: arrived_signals.append(1))
    if options["deny"]:
        lack(options["deny"])
    outside = Outside(options["home"], options["library"])
    with contextlib.ExitStack() as stack:
        if options["plain"]:
            world = Plain()
        else:
            from evaluation.sandbox import Sandbox

            sandbox = stack.enter_context(Sandbox(1, timeout=SECONDS, memory=1 << 30))
            world = Contained(sandbox)
        found = {}
        for kind, name, program, has_control in attacks():
            wanted = options["names"] is None or name in options["names"]
            if wanted and (has_control or not options["plain"]):
                found[f"{kind}: {name}"] = attack(outside, world, kind, program)
    if options["plain"]:
        end(world.caller)
    left = servers()
    outside.remove()
    print(json.dumps({"attacks": found, "left": left}))


if __name__ == "__main__":
    main()
