"""What the attacks may reach: files, sockets, shared memory, queues, other processes.

A state is what may be compared: equal before and after means untouched.
"""

import contextlib
import ctypes
import hashlib
import os
import resource
import signal
import socket
import sqlite3
import struct
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

from attacks import NUMBERS

SECRET = "hunter2-secret"
SHARED = ("/tmp", "/var/tmp", "/dev/shm")
RECORDED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGIO)
KEY = 0x5EC0DE
IPC_RMID, IPC_STAT, GETVAL = 0, 2, 12
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
arrived_signals = []  # at this process, if it counts them


def call(name, *values):
    given = [ctypes.c_long(v) if isinstance(v, int) else v for v in values]
    return libc.syscall(ctypes.c_long(NUMBERS[name]), *given)


class Outside:
    """Files, sockets, shared memory, queues, and a stranger: a process that only waits."""

    def __init__(self, home, library):
        self.home = home
        self.library = library
        self.mark = f"attack-{os.getpid()}"
        self.queue = f"{self.mark}-queue"
        self.arrived = 0
        self.closing = contextlib.ExitStack()
        self.make()

    def make(self):
        self.objects = set(ipc_objects())
        make_files(self.home, self.library)
        self.listening = sockets(self.home, self.mark)
        self.stranger = start_waiting()
        made = 0o1666
        self.shm = libc.shmget(KEY + os.getpid(), 4096, made)
        self.sem = libc.semget(KEY + os.getpid(), 1, made)
        self.msg = libc.msgget(KEY + os.getpid(), made)
        message = struct.pack("q8s", 1, b"original")
        assert libc.msgsnd(self.msg, message, 8, 0) == 0
        attributes = struct.pack("qqqq", 0, 4, 64, 0) + bytes(32)
        self.mq = call("mq_open", self.queue.encode(), 0o102, 0o666, attributes)
        assert self.mq >= 0 and call("mq_timedsend", self.mq, b"original", 8, 1, 0) == 0

    def remove(self):
        end(self.stranger)
        for listener in self.listening.values():
            listener.close()
        os.close(self.mq)
        call("mq_unlink", self.queue.encode())
        call("mq_unlink", self.mark.encode())
        for kind, number in set(ipc_objects()) - self.objects:
            if kind == "sem":
                libc.semctl(number, 0, IPC_RMID, 0)
            else:
                getattr(libc, f"{kind}ctl")(number, IPC_RMID, None)
        for folder in (self.home, self.library):
            subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
            subprocess.run(["find", folder, "-mindepth", "1", "-delete"])
        for path in self.stray_files():
            os.remove(path)

    def values(self):
        """What the programs call by name."""
        return {
            "HOME": self.home,
            "LIBRARY": self.library,
            "MARK": self.mark,
            "ABSTRACT": f"\0{self.mark}",
            "QUEUE": self.queue,
            "KEY": KEY + os.getpid(),
            "SHM": self.shm,
            "SEM": self.sem,
            "MSG": self.msg,
            "TCP": self.listening["tcp"].getsockname()[1],
            "UDP": self.listening["udp"].getsockname()[1],
            "STRANGER": self.stranger,
        }

    def stray_files(self):
        return [str(path) for folder in SHARED for path in Path(folder).glob(f"*{self.mark}*")]

    def look(self):
        """{name: state} of all but the processes."""
        folders = (self.home, self.library)
        paths = [path for folder in folders for path in (folder, *below(folder))]
        found = {path: file_state(path) for path in paths}
        self.arrived += sum(map(arrivals, self.listening.values()))
        found |= {
            "arrived on sockets": self.arrived,
            "signals to the caller": len(arrived_signals),
            "stray files": self.stray_files(),
            "shared memory": shared_memory(self.shm),
            "semaphore": libc.semctl(self.sem, 0, GETVAL, 0),
            "message queue": status(libc.msgctl, self.msg),
            "POSIX queue": self.posix_queue(),
            "IPC objects": sorted(ipc_objects()),
            "temporary folder": sorted(below(tempfile.gettempdir())),
            "host name": socket.gethostname(),
        }
        return found

    def posix_queue(self):
        state = ctypes.create_string_buffer(64)
        call("mq_getsetattr", self.mq, 0, state)
        again = call("mq_open", self.queue.encode(), 0, 0, 0)
        if again >= 0:
            os.close(again)
        return again >= 0, struct.unpack("qqqq", state.raw[:32])[3]


def make_files(home, library):
    folder = Path(home)
    os.chmod(home, 0o777)
    os.chmod(library, 0o777)
    for name in ("folder", "empty"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    (folder / "secret").write_text(SECRET)
    (folder / "module_outside.py").write_text(f"SECRET = {SECRET!r}")
    for path in (folder / "open", folder / "folder/file", Path(library, "readable")):
        path.write_text("original")
        path.chmod(0o666)
    (folder / "link").symlink_to("open")
    with contextlib.suppress(OSError):  # a file system without attributes
        os.setxattr(folder / "open", "user.there", SECRET.encode())
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("zipped_outside.py", f"SECRET = {SECRET!r}")
    with contextlib.closing(sqlite3.connect(folder / "database")) as database:
        database.execute("create table t (x)")
        database.execute("insert into t values (?)", [SECRET])
        database.commit()
    for name in ("database", "archive.zip", "module_outside.py"):
        (folder / name).chmod(0o666)


def sockets(home, mark):
    datagram = socket.SOCK_DGRAM
    found = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "udp": (socket.AF_INET, datagram, ("127.0.0.1", 0)),
        "stream": (socket.AF_UNIX, socket.SOCK_STREAM, "stream"),
        "datagram": (socket.AF_UNIX, datagram, "datagram"),
        "abstract stream": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{mark}s"),
        "abstract datagram": (socket.AF_UNIX, datagram, f"\0{mark}d"),
    }
    os.chdir(home)
    for name, (family, kind, address) in found.items():
        found[name] = socket.socket(family, kind)
        found[name].bind(address)
        found[name].setblocking(False)
        if kind == socket.SOCK_STREAM:
            found[name].listen()
        if name in ("stream", "datagram"):
            os.chmod(name, 0o777)
    os.chdir("/")
    return found


def arrivals(listener):
    """How many connections or messages wait; they are taken."""
    n = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            if listener.type == socket.SOCK_STREAM:
                listener.accept()[0].close()
            else:
                listener.recv(99)
            n += 1
    return n


def below(folder):
    found = []
    for path, folders, files in os.walk(folder):
        found += [os.path.join(path, name) for name in (*folders, *files)]
    return found


def file_state(path):
    """All but the time of the last access."""
    try:
        stat = os.lstat(path)
        state = [stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_size, stat.st_ino]
        state += [stat.st_mtime_ns, stat.st_ctime_ns, os.listxattr(path, follow_symlinks=False)]
        if os.path.isfile(path):
            state.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
        return state
    except OSError as error:
        return error.errno


def shared_memory(number):
    """Its owner and mode, and what it begins with. Attaching it changes the rest of its state."""
    state = status(libc.shmctl, number)
    if isinstance(state, int):
        return state
    address = ctypes.c_void_p(libc.shmat(number, None, 0))
    content = ctypes.string_at(address, 8)
    libc.shmdt(address)
    return state[:48], content


def status(control, number):
    """An object's whole state as its kernel structure, or the error."""
    state = ctypes.create_string_buffer(256)
    if control(number, IPC_STAT, state) < 0:
        return ctypes.get_errno()
    return state.raw


def ipc_objects():
    """(kind, number) of those that this user or a program's own user made."""
    for kind in ("shm", "sem", "msg"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            creator = {"shm": 9, "sem": 6, "msg": 9}[kind]
            if int(words[creator]) == os.getuid() or int(words[creator]) >= 1_900_000_000:
                yield kind, int(words[1])


# --------------------------------------------------------------------------------------------------
# processes


def start_waiting():
    """A process in a session of its own that every signal ends."""
    pid = os.fork()
    if pid == 0:
        libc.prctl(1, signal.SIGKILL)  # ends with this one
        os.closerange(3, 1 << 16)
        for number in RECORDED:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        while True:
            signal.pause()
    while os.getsid(pid) != pid:
        time.sleep(0.001)
    return pid


def end(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def process_state(pid):
    """None if it has ended. Else all that another process could change of it."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        words = rest.split()
        if words[0] in "ZX":
            return None
        stopped = words[0] in "Tt"
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pending = [line for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
        limits = [resource.prlimit(pid, limit) for limit in range(16)]
        adjust = Path(f"/proc/{pid}/oom_score_adj").read_text()
        affinity = sorted(os.sched_getaffinity(pid))
        ioprio = call("ioprio_get", 1, pid)
        scheduler = os.sched_getscheduler(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        return "closed"
    nice, started = words[16], words[19]
    return [name, stopped, pending, nice, started, affinity, ioprio, scheduler, limits, adjust]
