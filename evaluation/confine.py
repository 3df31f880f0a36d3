"""The sandbox's layers but for its list of system calls, and the probe that attacks them all.

fork_server.py calls `unshare` and `change_root` once, and every program's process `confine` before
it runs. Numbers are the kernel's; where Python has no name for one, it has a name here.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

from evaluation import system_calls
from evaluation.system_calls import libc

FILE = 16 << 20  # bytes of one file
FOLDER = 64 << 20  # bytes of all files
PROCESSES = 64
OPEN_FILES = 64

# A program that attacks, and prints what it was able to do. Every kind of attack in
# tests/evaluation/attacks.py has its line here.
PROBE = """
import ctypes, os, resource, socket, time
libc = ctypes.CDLL(None)
def attempt(what, act):
    try:
        act()
        print(what)
    except OSError:
        pass
def many():
    for _ in range(PROCESSES + 8):
        os.fork() or (time.sleep(1), os._exit(0))
def fill():
    for i in range(FOLDER // FILE + 1):
        os.posix_fallocate(os.open(str(i), os.O_CREAT | os.O_WRONLY), 0, FILE)
def connect():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
def send():
    socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"", SOCKET)
def change_mode():
    os.chmod(CANARY, 0o646)
    if os.stat(CANARY).st_mode & 0o777 != 0o646:  # a success that is only reported
        raise PermissionError
def share():
    for made in libc.shmget(0, 4096, 0o600), libc.semget(0, 1, 0o600), libc.msgget(0, 0o600):
        if made < 0:
            raise OSError
def slow_down(pid):
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
attempt("network", connect)
attempt("sockets in the file system", send)
attempt("names of files outside its folder", lambda: os.stat(CANARY))
attempt("reading outside its folder", lambda: open(CANARY).read())
attempt("writing outside its folder", lambda: open(CANARY, "a"))
attempt("writing outside its folder", lambda: os.truncate(CANARY, 0))
attempt("file attributes outside its folder", change_mode)
attempt("secrets in /proc", lambda: open(f"/proc/{PARENT}/environ").read(1))
attempt("signals to other processes", lambda: os.kill(PARENT, 0))
attempt("signals to other processes", lambda: os.kill(os.getppid(), 0))
attempt("priorities of other processes", lambda: slow_down(PARENT))
attempt("priorities of other processes", lambda: slow_down(os.getppid()))
attempt("priorities of other processes", lambda: resource.prlimit(os.getppid(), 0))
attempt("shared memory and queues", share)
attempt("system calls that no calculation needs", lambda: os.memfd_create("probe"))
attempt("total size of files", fill)
attempt("processes left behind", lambda: os.fork() or os._exit(0))
attempt("number of processes", many)
"""


def check(result):
    """A system call's result. OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def in_a_fork(act, *args):
    """Does act(*args) return something true, and raise nothing? Tried in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if act(*args) else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


# --------------------------------------------------------------------------------------------------
# namespaces and another root

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def readable_paths():
    """Where Python, its packages and the system's libraries are; nothing else can be read."""
    named = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    named += [sys.prefix, sys.base_prefix, *sys.path]
    wanted = set()
    for path in named:
        if os.path.exists(path):
            wanted |= {os.path.abspath(path), os.path.realpath(path)}
    wanted.discard("/")
    inside = {path for path in wanted if any(str(p) in wanted for p in Path(path).parents)}
    return sorted(wanted - inside)


def unshare():
    """New mount, process, network, IPC and host-name namespaces. True if done.

    In a new user namespace where we may not make them otherwise.
    """
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(spaces) == 0:
        return True
    if libc.unshare(spaces | CLONE_NEWUSER) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return True


def mount(source, target, kind, flags, data=None):
    check(libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data))


def mount_box(box):
    """An empty file system of FOLDER bytes for one program's files."""
    size = f"size={FOLDER},nr_inodes=10000"
    mount(b"box", box, b"tmpfs", MS_NOSUID | MS_NODEV, size.encode())


def unmount_box(box):
    libc.umount2(box.encode(), MNT_DETACH)


def change_root(folder, paths):
    """A new root: `paths` bound into an empty file system, all read-only, and a place for /box."""
    root = os.path.join(folder, "root")
    os.mkdir(root)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount(b"root", root, b"tmpfs", 0, b"size=1m,mode=755")
    for path in [*paths, "/dev/null", "/dev/zero", "/dev/urandom"]:
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            Path(root + path).touch()
        mount(os.fsencode(path), root + path, None, MS_BIND | MS_REC)
    os.mkdir(root + "/box")
    make_read_only(root)
    os.chdir(root)
    # The new root is put over the old one, which is then taken away below it.
    check(libc.syscall(SYS_PIVOT_ROOT.get(os.uname().machine, 41), b".", b"."))
    check(libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    return True


def make_read_only(root):
    """Everything mounted below."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    call = SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(root), AT_RECURSIVE
    check(libc.syscall(*call, attributes, size))


def die_with_parent():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def no_dumps():
    """Nobody may trace this process or read its memory."""
    libc.prctl(PR_SET_DUMPABLE, 0)


# --------------------------------------------------------------------------------------------------
# a program's process


def confine(options):
    """Drop every privilege of this process for good.

    Order matters: each step may forbid the ones before it.
    """
    os.chdir(options["box"])
    restrict_files = landlock(options["paths"], options["box"])
    limit_resources(options["memory"], int(options["timeout"]) + 2)
    if options["uid"]:
        become(options["uid"])
    die_with_parent()  # after the change of user, which would undo it
    no_capabilities = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(*no_capabilities))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    no_dumps()
    if restrict_files is not None:
        check(libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, restrict_files, 0))
        os.close(restrict_files)
    if options["calls"]:
        system_calls.install(options["calls"])


def limit_resources(memory, cpu):
    """memory: bytes. cpu: seconds."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))


def become(uid):
    """Another user, for good. OSError where the namespace does not map it."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# --------------------------------------------------------------------------------------------------
# Landlock: which files

SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
N_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # on files, by Landlock's version; 16 in later ones
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the others are on folders
NET_TCP = 3  # bind and connect
SCOPED = 3  # abstract sockets and signals


def landlock(paths, box):
    """A ruleset: read `paths`, write `box` and /dev/null, no TCP, no signals out.

    None where the kernel has no Landlock.
    """
    version = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return None
    everything = (1 << N_RIGHTS.get(version, 16)) - 1
    net = NET_TCP if version >= 4 else 0
    scoped = SCOPED if version >= 6 else 0
    attributes = struct.pack("QQQ", everything, net, scoped)
    size = ctypes.c_size_t(len(attributes))
    rules = check(libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0))
    allowed = [(path, EXECUTE | READ_FILE | READ_DIR) for path in paths]
    allowed += [
        (box, everything),
        ("/dev/null", WRITE_FILE | READ_FILE),
        ("/dev/urandom", READ_FILE),
    ]
    for path, rights in allowed:
        if not os.path.isdir(path):
            rights &= everything & ON_FILES
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, fd)
        check(libc.syscall(SYS_LANDLOCK_ADD_RULE, rules, 1, rule, 0))
        os.close(fd)
    return rules
