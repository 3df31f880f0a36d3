"""Attacks on other processes, the network, the kernel and the verdict. See attacks.py."""

ATTACKS = {
    "network": """
connects by TCP: socket.create_connection(("127.0.0.1", TCP), 2)
sends by UDP: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"got in", ("127.0.0.1", UDP))
connects by UDP: s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);
    s.connect(("127.0.0.1", UDP)); s.send(b"got in")
connects without waiting: s = socket.socket(); s.setblocking(False);
    s.connect_ex(("127.0.0.1", TCP)); time.sleep(0.05)
sends with the connection (fast open): s = socket.socket();
    s.sendto(b"got in", 0x20000000, ("127.0.0.1", TCP))
opens a URL: import urllib.request; urllib.request.urlopen(f"http://127.0.0.1:{TCP}/", timeout=0.2)
listens: s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); out()
listens to UDP: s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0));
    out()
a raw socket: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); out()
a packet socket: socket.socket(socket.AF_PACKET, socket.SOCK_RAW); out()
a netlink socket: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); out()
a netlink socket for events: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15); out()
an IPv6 socket: socket.socket(socket.AF_INET6); out()
lists the interfaces: say("GOT OUT" if socket.if_nameindex() else "")
""",
    "sockets in the file system": """
connects to a stream socket: s = socket.socket(socket.AF_UNIX); s.connect(f"{HOME}/stream")
sends to a datagram socket: s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);
    s.sendto(b"got in", f"{HOME}/datagram")
sendto from a pair: pair()[0].sendto(b"got in", f"{HOME}/datagram")
sendmsg from a pair: pair()[0].sendmsg([b"got in"], [], 0, f"{HOME}/datagram")
sendmmsg from a pair: s = pair()[0]; m = message(unix(f"{HOME}/datagram"));
    call("sendmmsg", s.fileno(), m[0], 1, 0)
connects one of a pair: s = pair()[0]; s.connect(f"{HOME}/datagram"); s.send(b"got in")
connects by number: a = unix(f"{HOME}/datagram"); s = pair()[0];
    call("connect", s.fileno(), a, len(a)); s.send(b"got in")
sends a descriptor: pair()[0].sendmsg([b"got in"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
    struct.pack("i", 0))], 0, f"{HOME}/datagram")
an abstract stream: s = socket.socket(socket.AF_UNIX); s.connect(ABSTRACT + "s")
an abstract datagram: s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);
    s.sendto(b"got in", ABSTRACT + "d")
an abstract datagram from a pair: pair()[0].sendto(b"got in", ABSTRACT + "d")
an abstract message from a pair: pair()[0].sendmsg([b"got in"], [], 0, ABSTRACT + "d")
takes an abstract name: s = pair()[0]; s.bind(ABSTRACT + "x"); out()
binds in a folder: s = pair()[0]; s.bind(f"{HOME}/bound")
binds a stream: s = socket.socket(socket.AF_UNIX); s.bind(f"{HOME}/bound2")
through a symbolic link: os.symlink(f"{HOME}/datagram", "link"); pair()[0].sendto(b"got in", "link")
""",
    "signals to other processes": """
is TARGET there: os.kill(TARGET, 0); out()
kills TARGET: os.kill(TARGET, 9)
interrupts TARGET: os.kill(TARGET, 2)
stops TARGET: os.kill(TARGET, 19)
hangs up on TARGET: os.kill(TARGET, 1)
kills the group of TARGET: os.killpg(os.getpgid(TARGET), 9)
kills TARGET as a group: os.kill(-TARGET, 9)
tkill TARGET: call("tkill", TARGET, 9)
tgkill TARGET: call("tgkill", TARGET, TARGET, 9)
queues a signal for TARGET: call("rt_sigqueueinfo", TARGET, 15, struct.pack("iii", 15, 0,
    -1) + bytes(116))
queues one for the thread of TARGET: call("rt_tgsigqueueinfo", TARGET, TARGET, 15,
    struct.pack("iii", 15, 0, -1) + bytes(116))
a descriptor of TARGET: call("pidfd_send_signal", call("pidfd_open", TARGET, 0), 9, 0, 0)
F_SETOWN to TARGET: aim(lambda s: fcntl.fcntl(s, F_SETOWN, TARGET))
F_SETOWN to TARGET with SIGIO: aim(lambda s: fcntl.fcntl(s, F_SETOWN, TARGET), by=0)
F_SETOWN to TARGET with SIGINT: aim(lambda s: fcntl.fcntl(s, F_SETOWN, TARGET), by=2)
F_SETOWN to the group of TARGET: aim(lambda s: fcntl.fcntl(s, F_SETOWN, -os.getpgid(TARGET)))
F_SETOWN_EX to TARGET: aim(lambda s: fcntl.fcntl(s, F_SETOWN_EX, struct.pack("ii", 1, TARGET)))
F_SETOWN_EX to the thread of TARGET: aim(lambda s: fcntl.fcntl(s, F_SETOWN_EX, struct.pack("ii", 0,
    TARGET)))
FIOSETOWN to TARGET: aim(lambda s: fcntl.ioctl(s, FIOSETOWN, struct.pack("i", TARGET)))
SIOCSPGRP to TARGET: aim(lambda s: fcntl.ioctl(s, SIOCSPGRP, struct.pack("i", TARGET)))
FIOASYNC to TARGET: a, b = pair(socket.SOCK_STREAM); fcntl.fcntl(a, F_SETOWN, TARGET);
    fcntl.ioctl(a, FIOASYNC, struct.pack("i", 1)); b.send(b"x"); time.sleep(0.01)
a pipe aims at TARGET: r, w = os.pipe(); fcntl.fcntl(r, F_SETSIG, 9);
    fcntl.fcntl(r, F_SETOWN, TARGET); fcntl.fcntl(r, fcntl.F_SETFL, O_ASYNC); os.write(w, b"x");
    time.sleep(0.01)
news of a folder to TARGET: fd = os.open(".", 0); fcntl.fcntl(fd, F_SETSIG, 9);
    fcntl.fcntl(fd, F_SETOWN, TARGET); fcntl.fcntl(fd, F_NOTIFY, 4); open("new", "w");
    time.sleep(0.01)
kills everyone: os.kill(-1, 9)
""",
    "priorities of other processes": """
slows TARGET down: os.setpriority(os.PRIO_PROCESS, TARGET, 19)
slows the group of TARGET down: os.setpriority(os.PRIO_PGRP, os.getpgid(TARGET), 18)
pins TARGET to a processor: os.sched_setaffinity(TARGET, [min(os.sched_getaffinity(0))])
makes TARGET idle: os.sched_setscheduler(TARGET, os.SCHED_IDLE, os.sched_param(0))
makes TARGET a batch job: os.sched_setscheduler(TARGET, os.SCHED_BATCH, os.sched_param(0))
sched_setattr on TARGET: call("sched_setattr", TARGET, struct.pack("IIQiIQQQ", 48, 3, 0, 17, 0, 0,
    0, 0), 0)
ioprio_set on TARGET: call("ioprio_set", 1, TARGET, 3 << 13)
ioprio_set on the group of TARGET: call("ioprio_set", 2, os.getpgid(TARGET), 3 << 13)
limits TARGET: call("prlimit64", TARGET, resource.RLIMIT_CORE, struct.pack("QQ", 1, 1), 0)
looks up the limits of TARGET: call("prlimit64", TARGET, 7, 0, ctypes.create_string_buffer(16));
    out()
moves the pages of TARGET: call("migrate_pages", TARGET, 64, struct.pack("Q", 1), struct.pack("Q",
    1)); out()
asks where the pages of TARGET are: call("move_pages", TARGET, 0, 0, 0, 0, 0); out()
slows all processes of its user down: os.setpriority(os.PRIO_USER, 0, 19)
ioprio_set on its user: call("ioprio_set", 3, os.getuid(), 3 << 13)
""",
    "shared memory and queues": """
makes shared memory: call("shmget", 0, 4096, 0o1600); out()
makes shared memory with a key: call("shmget", KEY + 9, 4096, 0o1600); out()
makes a semaphore: call("semget", 0, 1, 0o1600); out()
makes a queue: call("msgget", 0, 0o1600); out()
finds shared memory: call("shmget", KEY, 0, 0); out()
finds a semaphore: call("semget", KEY, 0, 0); out()
finds a queue: call("msgget", KEY, 0); out()
attaches shared memory: libc.shmat.restype = ctypes.c_void_p; a = libc.shmat(SHM, 0, 0);
    a != ctypes.c_void_p(-1).value and ctypes.memset(a, 65, 1)
removes shared memory: call("shmctl", SHM, 0, 0)
raises a semaphore: call("semop", SEM, struct.pack("HhH", 0, 1, 0), 1)
sets a semaphore: call("semctl", SEM, 0, 16, 7)
removes a semaphore: call("semctl", SEM, 0, 0, 0)
sends a message: call("msgsnd", MSG, struct.pack("q8s", 1, b"got in"), 8, 0o4000)
takes a message: call("msgrcv", MSG, ctypes.create_string_buffer(64), 8, 0, 0o4000)
removes a queue: call("msgctl", MSG, 0, 0)
makes a POSIX queue: call("mq_open", MARK.encode(), 0o102, 0o600, 0); out();
    call("mq_unlink", MARK.encode())
sends to a POSIX queue: call("mq_timedsend", call("mq_open", QUEUE.encode(), 1, 0, 0), b"got in", 6,
    1, 0)
takes from a POSIX queue: call("mq_timedreceive", call("mq_open", QUEUE.encode(), 0, 0, 0),
    ctypes.create_string_buffer(64), 64, 0, 0)
removes a POSIX queue: call("mq_unlink", QUEUE.encode())
""",
    "system calls that no calculation needs": """
traces TARGET: call("ptrace", 0x4206, TARGET, 0, 0); out(); call("ptrace", 17, TARGET, 0, 0)
attaches to TARGET: call("ptrace", 16, TARGET, 0, 0); out(); os.waitpid(TARGET, 0);
    call("ptrace", 17, TARGET, 0, 0)
reads the memory of TARGET: call("process_vm_readv", TARGET, 0, 0, 0, 0, 0); out()
writes the memory of TARGET: call("process_vm_writev", TARGET, 0, 0, 0, 0, 0); out()
opens TARGET: call("pidfd_open", TARGET, 0); out()
takes a descriptor of TARGET: call("pidfd_getfd", call("pidfd_open", TARGET, 0), 0, 0); out()
compares itself with TARGET: call("kcmp", os.getpid(), TARGET, 1, 0, 0); out()
the locks of TARGET: call("get_robust_list", TARGET, ctypes.create_string_buffer(8),
    ctypes.create_string_buffer(8)); out()
counts events of TARGET: call("perf_event_open", struct.pack("IIQ", 1, 112, 1) + bytes(96), TARGET,
    -1, -1, 0); out()
enters a namespace of TARGET: call("setns", os.open(f"/proc/{TARGET}/ns/uts", 0), 0); out()
a user namespace: call("unshare", NEWUSER); out()
a mount namespace: call("unshare", NEWNS); out()
a network namespace: call("unshare", NEWNET); out()
a process namespace: call("unshare", NEWPID); out()
a queue namespace: call("unshare", NEWIPC); out()
a user namespace for a child: call("clone", NEWUSER | 17, 0, 0, 0, 0) or os._exit(0); out()
mounts: call("mount", b"x", b".", b"tmpfs", 0, 0); out(); call("umount2", b".", 2)
mounts /proc: call("mount", b"x", b".", b"proc", 0, 0); out(); call("umount2", b".", 2)
opens a tree of mounts: call("open_tree", AT, b"/", 1); out()
opens a file system: call("fsopen", b"tmpfs", 0); out()
changes a mount: call("mount", b"x", b".", b"tmpfs", 0, 0); out();
    call("mount_setattr", AT, b".", 0, bytes(32), 32); call("umount2", b".", 2)
another root: call("chroot", b"."); out()
!pivots the root: call("pivot_root", b".", b"."); out()
traces itself: call("ptrace", 0, 0, 0, 0); out()
a key: call("add_key", b"user", b"k", b"v", 1, -3); out()
a session of keys: call("keyctl", 1, 0); out()
asks for a key: call("keyctl", 0, -3, 1); out()
a map in the kernel: call("bpf", 0, struct.pack("IIII", 2, 4, 4, 1) + bytes(48), 64); out()
counts its own events: call("perf_event_open", struct.pack("IIQ", 1, 112, 1) + bytes(96), 0, -1, -1,
    0); out()
io_uring: call("io_uring_setup", 4, ctypes.create_string_buffer(120)); out()
asynchronous input: call("io_setup", 1, ctypes.create_string_buffer(8)); out()
handles page faults: call("userfaultfd", 1); out()
a file in memory: call("memfd_create", b"x", 0); out()
a file in memory that runs: f = call("memfd_create", b"x", 0); out()
runs another program: os.execv("/bin/echo", ["echo", "GOT OUT"])
runs Python again: os.execv("/usr/bin/env", ["env", "echo", "GOT OUT"])
runs one by its descriptor: f = os.open("/bin/echo", 0);
    a = (ctypes.c_char_p * 3)(b"echo", b"GOT OUT", None); call("execveat", f, b"", a, 0, 0x1000)
runs what it wrote: open("x", "w").write("#!/bin/echo GOT OUT\\n"); os.chmod("x", 0o700);
    os.execv("./x", ["x"])
another personality: call("personality", 0x0400000); out()
segments: call("modify_ldt", 0, ctypes.create_string_buffer(64), 64); out()
!ports: call("iopl", 3); out()
!some ports: call("ioperm", 0x80, 1, 1); out()
!swaps: call("swapon", b"x", 0); out()
!stops swapping: call("swapoff", b"x"); out()
!reboots: call("reboot", 0xFEE1DEAD, 672274793, 0, 0); out()
!loads a module: call("init_module", b"", 0, b""); out()
!removes a module: call("delete_module", b"x", 0); out()
!loads a kernel: call("kexec_load", 0, 0, 0, 0); out()
!sets the clock: call("settimeofday", struct.pack("QQ", 0, 0), 0); out()
!sets a clock: call("clock_settime", 0, struct.pack("QQ", 0, 0)); out()
!accounts for processes: call("acct", b"x"); out()
!quotas: call("quotactl", 0x800001, 0, 0, 0); out()
!hangs up the terminal: call("vhangup"); out()
the size of the kernel's log: call("syslog", 10, 0, 0); out()
names the machine: call("sethostname", b"owned", 5); out()
names the domain: call("setdomainname", b"owned", 5); out()
watches a file system: call("fanotify_init", 0x200, 0); out()
watches files: call("inotify_init1", 0); out()
a filter of its own: b = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000));
    call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(b))); out()
asks for actions of filters: call("seccomp", 2, 0, struct.pack("I", 0x7FC00000)); out()
rules of its own: call("landlock_create_ruleset", 0, 0, 1); out()
lets others trace it: call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0); out()
outlives its server: call("prctl", PR_SET_PDEATHSIG, 0, 0, 0, 0); out()
adopts orphans: call("prctl", 36, 1, 0, 0, 0); out()
keeps capabilities: call("prctl", 8, 1, 0, 0, 0); out()
slack of its timers: call("prctl", 29, 1, 0, 0, 0); out()
becomes another user: os.setresuid(*[os.getuid()] * 3); out()
becomes another group: os.setresgid(*[os.getgid()] * 3); out()
becomes root: os.setuid(0); out()
the group of root: os.setgid(0); out()
groups: os.setgroups([]); out()
capabilities: call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24)); out()
a priority of its own: os.nice(1); out()
a processor of its own: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); out()
a timer for a thread: call("timer_create", 1, 0, ctypes.create_string_buffer(8)); out()
a timer in a descriptor: call("timerfd_create", 1, 0); out()
signals in a descriptor: call("signalfd4", -1, struct.pack("Q", 0), 8, 0); out()
holds memory: m = mmap.mmap(-1, 4096); call("mlock", ctypes.addressof(ctypes.c_char.from_buffer(m)),
    4096); out()
holds all memory: call("mlockall", 2); out()
what others have read: f = open(ctypes.__file__, "rb"); m = mmap.mmap(-1, 4096);
    call("mincore", ctypes.addressof(ctypes.c_char.from_buffer(m)), 4096,
    ctypes.create_string_buffer(8)); out()
a policy for memory: call("set_mempolicy", 0, 0, 0); out()
!keys for memory: call("pkey_alloc", 0, 0); out()
pages into a pipe: r, w = os.pipe(); b = ctypes.create_string_buffer(b"x");
    call("vmsplice", w, struct.pack("QQ", ctypes.addressof(b), 1), 1, 0); out()
a pipe into a pipe: r, w = os.pipe(); a, b = os.pipe(); os.write(w, b"x"); call("tee", r, b, 1, 0);
    out()
moves a pipe: r, w = os.pipe(); a, b = os.pipe(); os.write(w, b"x");
    call("splice", r, 0, b, 0, 1, 0); out()
writes all disks: call("sync"); out()
writes one disk: call("syncfs", os.open(".", 0)); out()
a hard link of its own: open("a", "w"); os.link("a", "b"); out()
a pipe with a name: os.mkfifo("a"); out()
asks for signals: r, w = os.pipe(); fcntl.ioctl(r, FIOASYNC, struct.pack("i", 1)); out()
owns a pipe: r, w = os.pipe(); fcntl.fcntl(r, F_SETOWN, os.getpid()); out()
the size of a pipe: r, w = os.pipe(); fcntl.fcntl(r, 1031, 1 << 20); out()
""",
    "processes left behind": """
forks: os.fork() or (time.sleep(0.5), os._exit(0)); out()
fork by number: call("fork") or (time.sleep(0.5), os._exit(0)); out()
clone: call("clone", 17, 0, 0, 0, 0) or (time.sleep(0.5), os._exit(0)); out()
clone with its memory: call("clone", 0x4000 | 17, 0, 0, 0, 0) or os._exit(0); out()
clone3: call("clone3", struct.pack("QQQQQQQQ", 0, 0, 0, 0, 17, 0, 0, 0), 64) or (time.sleep(0.5),
    os._exit(0)); out()
a daemon: os.fork() or (os.setsid(), os.fork(), os.close(1), time.sleep(0.5), os._exit(0)); out()
posix_spawn: os.posix_spawn("/bin/sleep", ["sleep", "0.5"], {}); out()
subprocess: import subprocess; subprocess.Popen(["sleep", "0.5"]); out()
a shell: os.system("sleep 0.5 &") == 0 and out()
a pseudo-terminal: import pty; pty.fork()[0] or os._exit(0); out()
a pool: import multiprocessing; multiprocessing.get_context("fork").Pool(1).close(); out()
""",
    "number of processes": """
a hundred processes: for i in range(100): os.fork() or (time.sleep(0.5), os._exit(0));
    i == 99 and out()
""",
    "limits of one process": """
a file of 17 MB: os.posix_fallocate(os.open("a", CREATE), 0, 17 << 20); out()
writes 17 MB: f = open("a", "wb", 0); signal.signal(25, signal.SIG_IGN);
    out(sum(f.write(bytes(1 << 20)) for _ in range(17)) > 16 << 20)
100 open files: [os.open("/dev/null", 0) for _ in range(100)]; out()
3 GB: x = bytes(3 << 30); out()
maps 3 GB: mmap.mmap(-1, 3 << 30); out()
more memory: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); out()
more files: resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999)); out()
more processes: resource.setrlimit(resource.RLIMIT_NPROC, (5000, 5000)); out()
more time: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)); out()
larger files: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)); out()
a core dump: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)); out()
more memory by prlimit: call("prlimit64", 0, resource.RLIMIT_AS, struct.pack("qq", -1, -1), 0);
    out()
""",
    "a forged verdict": """
!writes o and fails: [w(fd, b"o") for fd in range(3, 64) for w in [lambda *a: libc.write(a[0], a[1],
    1)]]; 1 / 0
!writes o and leaves: [libc.write(fd, b"o", 1) for fd in range(3, 64)]; os._exit(0)
!writes what a report looks like: [libc.write(fd, bytes(16) + b"o", 17) for fd in range(3, 64)];
    os._exit(0)
!leaves: os._exit(0)
!leaves past Python: libc._exit(0)
!leaves by its end: libc.exit(0)
!ends itself: os.kill(os.getpid(), 15)
!closes its descriptors: os.closerange(3, 64); 1 / 0
!puts another descriptor there: [os.dup2(1, fd) for fd in range(3, 64)]; 1 / 0
!looks for the key in its callers: [libc.write(fd, key + b"o", 17) for key in keys_of_callers()
    for fd in range(3, 64)]; os._exit(0)
!replaces what reports: os.write = os._exit = None; import builtins; builtins.open = None; 1 / 0
!replaces the exit: os._exit = lambda code: None; raise SystemExit(0)
!replaces the reporter: [setattr(m, "outcome",
    lambda *a: b"o") for m in list(sys.modules.values()) if hasattr(m, "outcome")]; 1 / 0
""",
}
