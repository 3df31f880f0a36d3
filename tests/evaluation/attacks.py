"""Programs that try to get out of the sandbox, by kind. attacked.py runs them in several worlds.

A line is one attack, `name: program`, and goes on where the next one is indented. TARGET stands for
each of CALLER, SERVER and STRANGER in turn. An attack got out if

    it prints GOT OUT, or the secret, or
    anything of the outside differs afterwards (attacked.py: files, processes, sockets, queues), or
    for the kind "a forged verdict": its status is "ok".

A line that begins with `!` has no control run: it would harm the machine, or needs the sandbox. The
kinds are those that the sandbox's probe states where it cannot hold them; an attack of
UNCONDITIONAL has to be held in every world.
"""

import os

import attacks_on_files
import attacks_on_others

ATTACKS = attacks_on_files.ATTACKS | attacks_on_others.ATTACKS
UNCONDITIONAL = ("limits of one process", "a forged verdict")

# Numbers on x86_64 and aarch64, as in evaluation/system_calls.py.
CALLS = """
    ptrace 101 117   process_vm_readv 310 270   process_vm_writev 311 271
    setns 308 268   keyctl 250 219   add_key 248 217   request_key 249 218   bpf 321 280
    perf_event_open 298 241   io_uring_setup 425 425   userfaultfd 323 282   memfd_create 319 279
    memfd_secret 447 447   shmget 29 194   shmat 30 196   shmctl 31 195   semget 64 190
    semop 65 193   semctl 66 191   msgget 68 186   msgsnd 69 189   msgrcv 70 188   msgctl 71 187
    mq_open 240 180   mq_unlink 241 181   mq_timedsend 242 182   mq_timedreceive 243 183
    pidfd_open 434 434   pidfd_send_signal 424 424   pidfd_getfd 438 438
    tkill 200 130   tgkill 234 131   rt_sigqueueinfo 129 138
    rt_tgsigqueueinfo 297 240   prlimit64 302 261
    sched_setattr 314 274   ioprio_set 251 30   migrate_pages 256 238   move_pages 279 239
    kcmp 312 272   get_robust_list 274 100
    mount 165 40   umount2 166 39   pivot_root 155 41   chroot 161 51   open_tree 428 428
    fsopen 430 430   mount_setattr 442 442   name_to_handle_at 303 264
    execveat 322 281   personality 135 92   modify_ldt 154 -   iopl 172 -   ioperm 173 -
    swapon 167 224   swapoff 168 225   reboot 169 142   init_module 175 105
    delete_module 176 106   kexec_load 246 104   settimeofday 164 170   clock_settime 227 112
    acct 163 89   quotactl 179 60   syslog 103 116   sethostname 170 161
    setdomainname 171 162   vhangup 153 58   fanotify_init 300 262   inotify_init1 294 26
    seccomp 317 277   landlock_create_ruleset 444 444   capset 126 91
    mlock 149 228   mlockall 151 230   mincore 27 232   splice 275 76   vmsplice 278 75   tee 276 77
    io_setup 206 0   timer_create 222 107   timerfd_create 283 85   signalfd4 289 74
    pkey_alloc 330 289   set_mempolicy 238 237   remap_file_pages 216 234
    sync 162 81   syncfs 306 267   fork 57 -   vfork 58 -   clone 56 220   clone3 435 435
    openat2 437 437   openat 257 56   fchmodat2 452 452   fchmodat 268 53   fchownat 260 54
    utimensat 280 88   utime 132 -   utimes 235 -   futimesat 261 -   linkat 265 37
    mknodat 259 33   renameat2 316 276   sendmmsg 307 269   connect 42 203
    prctl 157 167   ioctl 16 29   unshare 272 97   mq_getsetattr 245 185   ioprio_get 252 31
"""
_words = CALLS.split()
_column = 2 if os.uname().machine == "aarch64" else 1
NUMBERS = {
    name: int(number) for name, number in zip(_words[::3], _words[_column::3]) if number != "-"
}

# Runs before each of them. attacked.py fills in the values in capitals that are missing here.
PRELUDE = """
import contextlib, ctypes, errno, fcntl, glob, mmap, os, platform
import resource, signal, socket, struct, sys, time
SERVER = os.getppid()
AT, CREATE, EXCHANGE = -100, os.O_CREAT | os.O_WRONLY, 2
F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY, O_ASYNC = 8, 10, 15, 1026, 0o20000
FIOSETOWN, SIOCSPGRP, FIOASYNC = 0x8901, 0x8902, 0x5452
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER = 1, 4, 0x59616D61
NEWUSER, NEWNS, NEWNET, NEWPID, NEWIPC = 0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000
libc = ctypes.CDLL(None, use_errno=True)
words = CALLS.split()
numbers = dict(zip(words[::3], words[2 if platform.machine() == "aarch64" else 1 :: 3]))

def call(name, *values):
    # a system call by its number, past the C library
    given = [ctypes.c_long(v) if isinstance(v, int) else v for v in values]
    result = libc.syscall(ctypes.c_long(int(numbers[name])), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result

def out(truth=True):
    if truth is not False:
        os.write(1, b"GOT OUT")

def say(text):
    sys.stdout.write(str(text))

def pair(kind=socket.SOCK_DGRAM):
    return socket.socketpair(type=kind)

def aim(own, by=9):
    # A signal to whomever own(descriptor) names, as soon as there is something to read.
    one, other = pair(socket.SOCK_STREAM)
    if by:
        fcntl.fcntl(one, F_SETSIG, by)
    own(one)
    fcntl.fcntl(one, fcntl.F_SETFL, O_ASYNC | os.O_NONBLOCK)
    other.send(b"x")
    time.sleep(0.01)

def message(address, data=b"got in"):
    # sendmmsg's array of one message; the others are what it points to
    name, part = ctypes.create_string_buffer(address), ctypes.create_string_buffer(data)
    vector = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(part), len(data)))
    where = ctypes.addressof(name), len(address), ctypes.addressof(vector), 1
    head = struct.pack("QIxxxxQQQQiIxxxxxxxx", *where, 0, 0, 0, 0)
    return ctypes.create_string_buffer(head), name, part, vector

def unix(path):
    return struct.pack("H", socket.AF_UNIX) + path.encode() + b"\\0"

def load(name):
    with open(name, "rb", 0) as file:
        return file.read(1 << 16)

def keys_of_callers():
    # what may be a report's key, in the variables of all functions that are under way
    found, frame = [], sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            inner = value if isinstance(value, (list, tuple)) else [value]
            found += [v for v in inner if isinstance(v, bytes) and len(v) == 16]
        frame = frame.f_back
    return found
"""


def attacks():
    """[(kind, name, program, has a control run)]"""
    found = []
    for kind, lines in ATTACKS.items():
        for line in lines.strip().replace("\n    ", " ").splitlines():
            name, _, program = line.partition(": ")
            targets = ("CALLER", "SERVER", "STRANGER") if "TARGET" in line else ("",)
            for target in targets:
                named = name.lstrip("!").replace("TARGET", f"the {target.lower()}")
                found.append((kind, named, program.replace("TARGET", target), name[0] != "!"))
    return found
