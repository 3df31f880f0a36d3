"""The layers of the sandbox, as system calls through ctypes, and the probe that tells what they enforce together.

sandbox.py's fork server calls `unshare` and `change_root` once, and every program's process `confine` before it runs.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from pathlib import Path

FILE, FOLDER, PROCESSES, OPEN_FILES = (
    16 << 20,
    64 << 20,
    64,
    64,
)  # bytes of one file, of all files; how many
libc = ctypes.CDLL(None, use_errno=True)

# A program that attacks, and prints what it was able to do.
PROBE = """
import os, socket, time
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
attempt("network", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9)))
attempt("reading outside its folder", lambda: open(CANARY).read())
attempt("writing outside its folder", lambda: open(CANARY, "a"))
attempt("writing outside its folder", lambda: os.truncate(CANARY, 0))
attempt("file modes outside its folder", lambda: os.chmod(CANARY, 0o666))
attempt("secrets in /proc", lambda: open(f"/proc/{PARENT}/environ").read(1))
attempt("signals to other processes", lambda: os.kill(PARENT, 0))
attempt("total size of files", fill)
attempt("processes left behind", lambda: os.fork() or os._exit(0))
attempt("number of processes", many)
"""


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def mount(source, target, kind, flags, data=None):
    check(libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data))


def readable_paths():
    """Where Python, its packages and the system's libraries are; nothing else can be read."""
    wanted = [
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/etc/localtime",
        sys.prefix,
        sys.base_prefix,
        *sys.path,
    ]
    wanted = {
        path
        for p in wanted
        for path in (os.path.abspath(p), os.path.realpath(p))
        if os.path.exists(p)
    } - {"/"}
    return sorted(p for p in wanted if not any(str(parent) in wanted for parent in Path(p).parents))


def unshare():
    """New mount, process, network, IPC and host-name namespaces, in a new user namespace if need be. True if done."""
    spaces = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(spaces) == 0:
        return True
    if libc.unshare(spaces | 0x10000000) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text)
    return True


def in_a_fork(act):
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if act() else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def change_root(folder, paths):
    """A new root: an empty file system with `paths` bound into it, all read-only, and the mount point /box."""
    BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
    root = os.path.join(folder, "root")
    os.mkdir(root)
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount(b"root", root, b"tmpfs", 0, b"size=1m,mode=755")
    for path in [*paths, "/dev/null", "/dev/zero", "/dev/urandom"]:
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            Path(root + path).touch()
        mount(os.fsencode(path), root + path, None, BIND | RECURSIVE)
    os.mkdir(root + "/box")
    attributes = struct.pack(
        "QQQQ", 1 | 2, 0, 0, 0
    )  # read-only, nosuid; mount_setattr of everything below
    check(libc.syscall(442, -100, os.fsencode(root), 0x8000, attributes, ctypes.c_size_t(32)))
    os.chdir(root)
    check(libc.syscall({"x86_64": 155}.get(os.uname().machine, 41), b".", b"."))  # pivot_root
    check(libc.umount2(b".", 2))
    os.chdir("/")
    return True


def confine(options):
    """Drop every privilege of this process for good. Order matters: each step may forbid the ones before it."""
    os.chdir(options["box"])
    restrict_files = landlock(options["paths"], options["box"])
    cpu = int(options["timeout"]) + 2
    for limit, value in (
        (resource.RLIMIT_AS, options["memory"]),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if options["uid"]:
        become(options["uid"])
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    libc.prctl(4, 0)
    if restrict_files is not None:
        check(libc.syscall(446, restrict_files, 0))
        os.close(restrict_files)
    seccomp()


def become(uid):
    """Another user, for good. OSError where the namespace does not map it."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def landlock(paths, box):
    """A ruleset: read `paths`, write `box` and /dev/null, no TCP, no signals out. None where the kernel has none."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return None
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 * (version >= 4), 3 * (version >= 6))
    rules = check(libc.syscall(444, attributes, ctypes.c_size_t(24), 0))
    of_files = rights & (1 | 2 | 4 | 1 << 14 | 1 << 15)
    for path, allowed in [(p, 1 | 4 | 8) for p in paths] + [
        (box, rights),
        ("/dev/null", 2 | 4),
        ("/dev/urandom", 4),
    ]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & of_files, fd)
        check(libc.syscall(445, rules, 1, rule, 0))
        os.close(fd)
    return rules


# System call numbers on x86_64 and aarch64 (None: the call does not exist there).
FORKS = [(57, None), (58, None)]  # fork vfork
FORBIDDEN = [
    (41, 198),
    (101, 117),
    (310, 270),
    (311, 271),
    (272, 97),
    (308, 268),  # socket ptrace process_vm_* ns
    (250, 219),
    (248, 217),
    (249, 218),
    (321, 280),
    (298, 241),
    (425, 425),  # keys bpf perf io_uring
    (323, 282),
    (319, 279),
    (29, 194),
    (68, 186),
    (64, 190),
    (240, 180),  # userfaultfd memfd ipc
    (434, 434),
    (424, 424),
    (438, 438),
    (200, 130),
]  # pidfd_* tkill
ONLY_ITSELF = [
    (62, 129),
    (234, 131),
    (129, 138),
    (297, 240),
    (302, 261),
]  # kill tgkill *sigqueue prlimit
MACHINES = {
    "x86_64": (0, 0xC000003E, 56),
    "aarch64": (1, 0xC00000B7, 220),
}  # column, AUDIT_ARCH, clone


def seccomp():
    """Forbid what a calculation never needs. One process is then all of the program: nothing can be left behind."""
    if os.uname().machine not in MACHINES:
        return
    column, machine, clone = MACHINES[os.uname().machine]
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
    code = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),  # no second set of numbers
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, 0x40000000),
        (RETURN, 0, 0, KILL),
    ]
    answers = [
        (FORBIDDEN, errno.EPERM),
        (FORKS, errno.EAGAIN),
        ([(435, 435)], errno.ENOSYS),
    ]  # clone3: use clone
    for numbers, error in answers:
        for number in (n[column] for n in numbers if n[column] is not None):
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | error)]
    for number in (n[column] for n in ONLY_ITSELF):
        code += [
            (EQUAL, 0, 5, number),
            (LOAD, 0, 0, 16),
            (EQUAL, 1, 0, os.getpid()),
            (EQUAL, 0, 1, 0),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, FAIL | errno.EPERM),
        ]
    code += [
        (EQUAL, 0, 4, clone),
        (LOAD, 0, 0, 16),
        (ANY_BIT, 0, 1, 0x10000),  # CLONE_THREAD
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL | errno.EAGAIN),
        (RETURN, 0, 0, ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    libc.prctl(
        22, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
    )  # the probe tells if refused
