"""Which system calls a program may make: those that a calculation needs, and no others.

A list of what is allowed also forbids what a later kernel adds. Some calls depend on their
arguments. The kernel runs the list as a filter (seccomp, in classic BPF) before every call.
"""

import ctypes
import errno
import fcntl
import os
import struct

# Name, number on x86_64, number on aarch64 (-: the call does not exist there).
ALLOWED = """
    read 0 63               write 1 64              readv 19 65             writev 20 66
    pread64 17 67           pwrite64 18 68          preadv 295 69           pwritev 296 70
    preadv2 327 286         pwritev2 328 287        close 3 57              close_range 436 436
    lseek 8 62              dup 32 23               dup2 33 -               dup3 292 24
    pipe 22 -               pipe2 293 59            fsync 74 82             fdatasync 75 83
    ftruncate 77 46         fallocate 285 47        fadvise64 221 223       sendfile 40 71
    copy_file_range 326 285

    creat 85 -              access 21 -             faccessat 269 48        faccessat2 439 439
    stat 4 -                lstat 6 -               fstat 5 80              newfstatat 262 79
    statx 332 291           statfs 137 43           fstatfs 138 44          readlink 89 -
    readlinkat 267 78       getcwd 79 17            chdir 80 49             fchdir 81 50
    getdents 78 -           getdents64 217 61       mkdir 83 -              mkdirat 258 34
    rmdir 84 -              unlink 87 -             unlinkat 263 35         rename 82 -
    renameat 264 38         renameat2 316 276       symlink 88 -            symlinkat 266 36
    umask 95 166

    brk 12 214              mmap 9 222              munmap 11 215           mremap 25 216
    mprotect 10 226         madvise 28 233          msync 26 227            exit 60 93
    exit_group 231 94       futex 202 98            set_robust_list 273 99  set_tid_address 218 96
    rseq 334 293            membarrier 324 283      sched_yield 24 124      getcpu 309 168
    sched_get_priority_max 146 125                  sched_get_priority_min 147 126

    time 201 -              gettimeofday 96 169     clock_gettime 228 113   clock_getres 229 114
    nanosleep 35 101        clock_nanosleep 230 115 times 100 153           pause 34 -
    alarm 37 -              getitimer 36 102        setitimer 38 103        sigaltstack 131 132
    rt_sigaction 13 134     rt_sigprocmask 14 135   rt_sigreturn 15 139     rt_sigpending 127 136
    rt_sigtimedwait 128 137 rt_sigsuspend 130 133   restart_syscall 219 128

    poll 7 -                ppoll 271 73            select 23 -             pselect6 270 72
    epoll_create 213 -      epoll_create1 291 20    epoll_ctl 233 21        epoll_wait 232 -
    epoll_pwait 281 22      epoll_pwait2 441 441    eventfd 284 -           eventfd2 290 19
    wait4 61 260            waitid 247 95           recvfrom 45 207         shutdown 48 210
    getsockname 51 204      getpeername 52 205      getsockopt 55 209

    getpid 39 172           gettid 186 178          getppid 110 173         getpgrp 111 -
    getuid 102 174          geteuid 107 175         getgid 104 176          getegid 108 177
    getresuid 118 148       getresgid 120 150       getgroups 115 158       uname 63 160
    sysinfo 99 179          getrusage 98 165        getrlimit 97 163        setrlimit 160 164
    getrandom 318 278
"""
# Allowed with some arguments: see `rules`.
CONDITIONAL = """
    open 2 -                openat 257 56           fcntl 72 25             ioctl 16 29
    prctl 157 167           socketpair 53 199       sendto 44 206           clone 56 220
    kill 62 129             tgkill 234 131          tkill 200 130           rt_sigqueueinfo 129 138
    rt_tgsigqueueinfo 297 240                       prlimit64 302 261       getpgid 121 155
    getsid 124 156          sched_getaffinity 204 123
"""
# These do nothing and report success, so that shutil.copy and tarfile go on: a filter cannot see
# whether a name is outside the program's folder.
IGNORED = """
    chmod 90 -              fchmod 91 52            fchmodat 268 53         fchmodat2 452 452
    utime 132 -             utimes 235 -            futimesat 261 -         utimensat 280 88
"""
# These fail as on a file system that has no attributes.
NOT_SUPPORTED = """
    setxattr 188 5          lsetxattr 189 6         fsetxattr 190 7         getxattr 191 8
    lgetxattr 192 9         fgetxattr 193 10        listxattr 194 11        llistxattr 195 12
    flistxattr 196 13       removexattr 197 14      lremovexattr 198 15     fremovexattr 199 16
"""
FORKS = "fork 57 -   vfork 58 -   clone 56 220"  # over the limit of one process
NEW = 424  # numbers from here on are the same on all machines

# {machine: (column above, the kernel's name of the machine)}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

FCNTL = (
    fcntl.F_DUPFD,
    fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_GETLK,
    fcntl.F_SETLK,
    fcntl.F_SETLKW,
)
O_ASYNC = 0o20000  # a signal when there is something to read, to whomever F_SETOWN names
TCGETS, TIOCGWINSZ, FIONREAD = 0x5401, 0x5413, 0x541B  # is it a terminal, how large, what waits
FIONBIO, FIONCLEX, FIOCLEX = 0x5421, 0x5450, 0x5451
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41  # names of threads and of memory
AF_UNIX = 1
THREAD = 0x3D0F00, 0x7D0F00  # clone's flags in pthread_create of glibc and of musl

# Instructions of the filter: load a word of the call's data; and; compare and jump; end.
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCH = 0, 4  # offsets in the call's data
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000  # numbers from here on are a second set for the same calls
EVERY = 0xFFFFFFFF  # bit
ITSELF = 0xFFFFFFF1  # stands for the program's process id until that is known
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

libc = ctypes.CDLL(None, use_errno=True)


def numbers(table, column):
    """{name: number} of a table's calls that exist on the machine of this column."""
    words = table.split()
    found = dict(zip(words[::3], words[1 + column :: 3]))
    return {name: int(number) for name, number in found.items() if number != "-"}


def low(argument):
    """Where the lower half of an argument stands in the call's data. Many are no longer."""
    return 16 + 8 * argument


def high(argument):
    return 20 + 8 * argument


def rules():
    """[(call, [(where, mask, values), ...])]: allowed where each masked word is one of the values.

    A call that stands here twice is allowed in both ways.
    """
    terminal = TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    found = [
        ("fcntl", [(low(1), EVERY, FCNTL)]),
        ("fcntl", [(low(1), EVERY, [fcntl.F_SETFL]), (low(2), O_ASYNC, [0])]),
        ("ioctl", [(low(1), EVERY, terminal)]),
        ("prctl", [(low(0), EVERY, [PR_SET_NAME, PR_GET_NAME, PR_SET_VMA])]),
        ("socketpair", [(low(0), EVERY, [AF_UNIX])]),
        ("sendto", [(low(4), EVERY, [0]), (high(4), EVERY, [0])]),  # to the other one of the pair
        ("clone", [(low(0), EVERY, THREAD)]),
    ]
    # Old versions of Landlock let a file that may be read be truncated.
    for call, flags in (("open", low(1)), ("openat", low(2))):
        found.append((call, [(flags, os.O_TRUNC, [0])]))
        found.append((call, [(flags, os.O_ACCMODE, [os.O_WRONLY, os.O_RDWR])]))
    for call in ("kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        found.append((call, [(low(0), EVERY, [ITSELF])]))
    for call in ("prlimit64", "getpgid", "getsid", "sched_getaffinity"):
        found.append((call, [(low(0), EVERY, [ITSELF, 0])]))
    return found


def filter_of(machine):
    """The filter as bytes, with ITSELF for the process. None for a machine that is not known."""
    if machine not in MACHINES:
        return None
    column, arch = MACHINES[machine]
    code = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, arch),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    code += for_each(ALLOWED, column, ALLOW)
    conditional = numbers(CONDITIONAL, column)
    for call, conditions in rules():
        if call in conditional:
            code += rule(conditional[call], conditions)
    code += for_each(IGNORED, column, FAIL)
    code += for_each(NOT_SUPPORTED, column, FAIL | errno.ENOTSUP)
    code += for_each(FORKS, column, FAIL | errno.EAGAIN)
    code += [
        (EQUAL, 0, 1, conditional["ioctl"]),
        (RETURN, 0, 0, FAIL | errno.ENOTTY),
        (AT_LEAST, 0, 1, NEW),  # as on an older kernel: libraries then use the older calls
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (RETURN, 0, 0, FAIL | errno.EPERM),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def for_each(table, column, verdict):
    """One verdict for each call of a table. Neighbours share lines: a short filter costs less."""
    code = []
    known = set(numbers(table, column).values())
    for first in sorted(number for number in known if number - 1 not in known):
        behind = first
        while behind in known:
            behind += 1
        code += [
            (AT_LEAST, 0, 2, first),
            (AT_LEAST, 1, 0, behind),
            (RETURN, 0, 0, verdict),
        ]
    return code


def rule(number, conditions):
    """Allow a call whose arguments fulfil all conditions; else go on behind the rule."""
    code = [(RETURN, 0, 0, ALLOW)]
    for where, mask, values in reversed(conditions):
        # From the last value to the first: how many lines until the condition is fulfilled.
        tests = []
        for place, value in enumerate(reversed(values)):
            otherwise = len(code) if place == 0 else 0
            tests.insert(0, (EQUAL, place, otherwise, value))
        masked = [] if mask == EVERY else [(AND, 0, 0, mask)]
        code = [(LOAD, 0, 0, where), *masked, *tests, *code]
    code = [(EQUAL, 0, len(code), number), *code]
    return [*code, (LOAD, 0, 0, NUMBER)]


def install(code):
    """Let this process make only the calls that `code` of `filter_of` allows, for good.

    Where the kernel has no seccomp nothing happens: the probe tells.
    """
    itself = struct.pack("I", os.getpid())
    program = ctypes.create_string_buffer(code.replace(struct.pack("I", ITSELF), itself))
    pointer = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(program))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer)
