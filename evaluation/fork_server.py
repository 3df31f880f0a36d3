"""The sandbox's inner side: a server whose forks become the programs.

sandbox.py starts this file by its path, with a socket and its options, in an empty environment.
A keeper makes the server's folder, waits, and removes it, however the server or the caller ended.
The server enters the namespaces, loads sympy, lets the probe attack, and then answers programs: a
program costs a fork, not an interpreter that imports sympy. Nothing of a program outlives its
answer.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import asdict

if __name__ == "__main__":  # by its path: this folder's parent is the kit
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from evaluation import system_calls
from evaluation.confine import (
    FILE,
    FOLDER,
    PROBE,
    PROCESSES,
    become,
    change_root,
    die_with_parent,
    in_a_fork,
    no_dumps,
    readable_paths,
    unshare,
)
from evaluation.supervise import remove, run_program

PROBE_SECONDS = 120
NOBODY = 65534
LEAST_MEMORY = 64 << 20  # bytes of address space beside what Python and its modules take


class SandboxError(OSError):
    """The sandbox cannot start, or not as strictly as it was asked to."""


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


# --------------------------------------------------------------------------------------------------
# the keeper and the server


def keep(channel, options):
    """Start the server in a folder of its own, and remove that in the end."""
    folder = options["folder"]
    os.mkdir(folder)
    os.chmod(folder, 0o711)  # another uid must pass, and cannot list
    server = os.fork()
    if server == 0:
        die_with_parent()
        with contextlib.suppress(ConnectionError):  # the caller ended
            serve(channel, options)
        os._exit(0)
    channel.close()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(server, signal.SIGKILL))
    os.waitpid(server, 0)
    remove(folder)


def serve(channel, options):
    """Shut itself in, send what the probe found unenforced, then answer programs until the end."""
    sys.path.pop(0)  # the kit's folder is not the programs' business
    for name in [name for name in sys.modules if name.startswith("evaluation")]:
        del sys.modules[name]
    preload = [name for name in ("numpy", "sympy", "scipy") if importlib.util.find_spec(name)]
    paths = readable_paths()
    null = os.open("/dev/null", os.O_RDWR)
    lay_bait(options["folder"])
    own_files = False
    if in_a_fork(unshare) and unshare():  # tried first: half a success could not be undone
        child = os.fork()  # the first process of the new process namespace
        if child:
            channel.close()
            os.waitpid(child, 0)
            return
        die_with_parent()
        with contextlib.suppress(OSError):  # Landlock is left; the probe tells
            own_files = change_root(options["folder"], paths)
    no_dumps()  # no program may trace this server
    uid = usable_uid(options["uid"], preload, paths)
    for name in preload:
        importlib.import_module(name)
    calls = system_calls.filter_of(os.uname().machine)
    options.update(uid=uid, own_files=own_files, paths=paths, null=null, calls=calls)
    options["caller"] = channel.fileno()
    gc.freeze()  # a fork then shares the loaded modules' pages for longer
    send(channel, json.dumps(greeting(options)).encode())
    while True:
        program = receive(channel).decode("utf-8", "surrogatepass")
        send(channel, json.dumps(asdict(run_program(program, options))).encode())


def lay_bait(folder):
    """What the probe tries to read, to change and to reach."""
    canary = os.path.join(folder, "canary")
    with open(canary, "w") as file:
        file.write("canary")
    os.chmod(canary, 0o666)
    os.chdir(folder)  # a socket's whole name may be too long
    bait = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bait.bind("socket")
    os.chmod("socket", 0o666)
    os.set_inheritable(bait.detach(), False)  # open for as long as this process lives
    os.chdir("/")


def greeting(options):
    """{"missing": what the layers together do not enforce} or {"refused": why there is no start}"""
    if not in_a_fork(leaves_room, options["memory"]):
        least = 64 << 20
        while not in_a_fork(leaves_room, least):
            least *= 2
        wanted = f"at least {least}: Python and its modules are counted"
        return {"refused": f"memory: got {options['memory']} bytes, wanted {wanted}"}
    try:
        return {"missing": probe(options)}
    except SandboxError as error:
        return {"refused": str(error)}


def leaves_room(memory):
    """May a program whose address space is limited to so many bytes still take LEAST_MEMORY?"""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    mmap.mmap(-1, LEAST_MEMORY).close()
    return True


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
        "CANARY": os.path.join(options["folder"], "canary"),
        "SOCKET": "../socket",
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


if __name__ == "__main__":
    keep(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
