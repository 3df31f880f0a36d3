"""Attacks on files. attacks.py says how to read them."""

ATTACKS = {
    "names of files outside its folder": """
stat: os.stat(f"{HOME}/secret"); out()
lstat: os.lstat(f"{HOME}/secret"); out()
access: out(os.access(f"{HOME}/secret", os.F_OK))
enters a folder: os.chdir(HOME); out()
reads a link: say("GOT OUT" if os.readlink(f"{HOME}/link") else "")
opens without reading: os.open(f"{HOME}/secret", os.O_PATH); out()
space of a file system: os.statvfs(HOME); out()
a process by name: os.stat(f"/proc/{STRANGER}"); out()
through a link of its own: os.symlink(HOME, "link"); os.stat("link/secret"); out()
asks who is there: os.getpgid(STRANGER); out()
asks for a session: os.getsid(STRANGER); out()
asks for a priority: os.getpriority(os.PRIO_PROCESS, STRANGER); out()
asks for processors: os.sched_getaffinity(STRANGER); out()
asks for a scheduler: os.sched_getscheduler(STRANGER); out()
""",
    "reading outside its folder": """
open: say(load(f"{HOME}/secret"))
a list of a folder: out("secret" in os.listdir(HOME))
walks from the root: out(any(HOME in found for found in glob.glob(f"{HOME}/*")))
through the root of a process: say(load(f"/proc/self/root{HOME}/secret"))
through a parent folder: say(load("../" * 20 + f"{HOME[1:]}/secret"))
through a symbolic link: os.symlink(f"{HOME}/secret", "link"); say(load("link"))
through a hard link: os.link(f"{HOME}/secret", "link"); say(load("link"))
opens a path again: fd = os.open(f"{HOME}/secret", os.O_PATH); say(load(f"/proc/self/fd/{fd}"))
a folder without reading it: fd = os.open(HOME, os.O_PATH);
    say(os.read(os.open("secret", 0, dir_fd=fd), 99))
enters first: os.chdir(HOME); say(load("secret"))
moves it here: os.rename(f"{HOME}/secret", "mine"); say(load("mine"));
    os.rename("mine", f"{HOME}/secret")
openat2: how = struct.pack("QQQ", 0, 0, 0); say(os.read(call("openat2", AT,
    f"{HOME}/secret".encode(), how, 24), 99))
openat by number: say(os.read(call("openat", AT, f"{HOME}/secret".encode(), 0, 0), 99))
maps it: f = open(f"{HOME}/secret"); say(mmap.mmap(f.fileno(), 0, prot=1)[:])
sendfile: f = open(f"{HOME}/secret"); os.sendfile(1, f.fileno(), 0, 99)
copies it: import shutil; shutil.copyfile(f"{HOME}/secret", "mine"); say(load("mine"))
imports it: sys.path.append(HOME); import module_outside; say(module_outside.SECRET)
imports from an archive: sys.path.append(f"{HOME}/archive.zip"); import zipped_outside;
    say(zipped_outside.SECRET)
the C library opens: f = libc.open(f"{HOME}/secret".encode(), 0); say(os.read(f, 99))
another program reads: os.execv("/bin/cat", ["cat", f"{HOME}/secret"])
another program by another loader: os.execv("/bin/sh", ["sh", "-c", f"cat {HOME}/secret"])
a child reads: say(os.popen(f"cat {HOME}/secret").read())
a database: import sqlite3; c = sqlite3.connect(f"file:{HOME}/database?mode=ro", uri=True);
    say(c.execute("select * from t").fetchall())
users: out(b"root:" in load("/etc/passwd"))
this machine's name: out(bool(load("/etc/hostname")))
host names: out(bool(load("/etc/hosts")))
mounted file systems: out(bool(load("/proc/self/mountinfo")))
its own command line: out(bool(load("/proc/self/cmdline")))
the processor: out(b"processor" in load("/proc/cpuinfo").lower())
the kernel's version: out(bool(load("/proc/version")))
settings of the kernel: out(bool(load("/proc/sys/kernel/osrelease")))
devices: out(bool(os.listdir("/sys/class")))
control groups: out(bool(os.listdir("/sys/fs/cgroup")))
temporary files: out(len(os.listdir("/tmp")) >= 0)
a terminal: os.open("/dev/ptmx", os.O_RDWR); out()
watches a folder: fd = call("inotify_init1", 0);
    libc.inotify_add_watch(fd, HOME.encode(), 0xFFF) < 0 or out()
a handle of a file: call("name_to_handle_at", AT, HOME.encode(),
    ctypes.create_string_buffer(struct.pack("I", 120), 128), ctypes.create_string_buffer(8), 0);
    out()
""",
    "writing outside its folder": """
a named semaphore: libc.sem_open.restype = ctypes.c_void_p;
    s = libc.sem_open(f"/{MARK}".encode(), 0o100, 0o600, 1); s and out();
    libc.sem_unlink(f"/{MARK}".encode())
POSIX shared memory: from multiprocessing import shared_memory;
    s = shared_memory.SharedMemory(MARK, create=True, size=64); out(); s.close(); s.unlink()
prefers TARGET when memory ends: open(f"/proc/{TARGET}/oom_score_adj", "w").write("1000")
appends: open(f"{HOME}/open", "a").write("x")
overwrites: open(f"{HOME}/open", "w").write("x")
creates: open(f"{HOME}/created", "x")
creates exclusively: os.open(f"{HOME}/created2", CREATE | os.O_EXCL)
creat: libc.creat(f"{HOME}/created3".encode(), 0o600)
truncates by name: os.truncate(f"{HOME}/open", 1)
truncates as it opens: os.open(f"{HOME}/open", os.O_TRUNC | os.O_WRONLY)
truncates a file that it may read: os.open(f"{LIBRARY}/readable", os.O_TRUNC | os.O_RDONLY)
the same by number: call("openat", AT, f"{LIBRARY}/readable".encode(), os.O_TRUNC, 0)
the same with openat2: call("openat2", AT, f"{LIBRARY}/readable".encode(), struct.pack("QQQ",
    os.O_TRUNC, 0, 0), 24)
truncates what it may read by name: os.truncate(f"{LIBRARY}/readable", 1)
writes to what it may read: open(f"{LIBRARY}/readable", "a").write("x")
maps what it may read: f = open(f"{LIBRARY}/readable", "r+b"); m = mmap.mmap(f.fileno(), 0);
    m[0] = 65
removes: os.remove(f"{HOME}/open")
removes a tree: import shutil; shutil.rmtree(f"{HOME}/folder")
makes a folder: os.mkdir(f"{HOME}/made")
removes a folder: os.rmdir(f"{HOME}/empty")
renames there: os.rename(f"{HOME}/open", f"{HOME}/renamed")
moves in: open("mine", "w"); os.rename("mine", f"{HOME}/mine")
moves out: os.rename(f"{HOME}/open", "mine")
exchanges: open("mine", "w"); call("renameat2", AT, b"mine", AT, f"{HOME}/open".encode(), EXCHANGE)
a symbolic link there: os.symlink("/", f"{HOME}/symlink")
a hard link there: os.link(f"{HOME}/open", f"{HOME}/hard")
a hard link by its descriptor: fd = os.open("mine", CREATE);
    call("linkat", AT, f"/proc/self/fd/{fd}".encode(), AT, f"{HOME}/hard2".encode(), 0x400)
a nameless file: fd = os.open(HOME, os.O_TMPFILE | os.O_WRONLY); out()
a hard link here, then writes: os.link(f"{HOME}/open", "mine"); open("mine", "a").write("x")
a symbolic link here, then writes: os.symlink(f"{HOME}/open", "mine"); open("mine", "a").write("x")
a link to a folder, then creates: os.symlink(HOME, "mine"); open("mine/through", "w")
a pipe with a name: os.mkfifo(f"{HOME}/fifo")
a device: os.mknod(f"{HOME}/device", 0o20666, os.makedev(1, 3))
a pipe by number: call("mknodat", AT, f"{HOME}/fifo2".encode(), 0o10666, 0)
allocates: os.posix_fallocate(os.open(f"{HOME}/open", os.O_WRONLY), 0, 99)
copies over it: a = os.open("mine", os.O_RDWR | os.O_CREAT); os.write(a, b"xyz"); os.lseek(a, 0, 0);
    os.copy_file_range(a, os.open(f"{HOME}/open", os.O_WRONLY), 3)
sendfile: a = os.open("mine", os.O_RDWR | os.O_CREAT); os.write(a, b"xyz");
    os.sendfile(os.open(f"{HOME}/open", os.O_WRONLY), a, 0, 3)
maps it: f = open(f"{HOME}/open", "r+b"); m = mmap.mmap(f.fileno(), 0); m[0] = 65
through the root of a process: open(f"/proc/self/root{HOME}/open", "a").write("x")
opens a path again: fd = os.open(f"{HOME}/open", os.O_PATH);
    open(f"/proc/self/fd/{fd}", "a").write("x")
enters first: os.chdir(HOME); open("open", "a").write("x")
a parent folder: open("../" * 20 + HOME[1:] + "/open", "a").write("x")
beside its own folder: open(f"../{MARK}", "w"); out()
in /tmp: open(f"/tmp/{MARK}", "w")
in /var/tmp: open(f"/var/tmp/{MARK}", "w")
in /dev/shm: open(f"/dev/shm/{MARK}", "w")
a database: import sqlite3; c = sqlite3.connect(f"{HOME}/database");
    c.execute("create table x (y)"); c.commit()
a child writes: os.system(f"echo x >> {HOME}/open")
another program writes: os.execv("/bin/sh", ["sh", "-c", f"echo x >> {HOME}/open"])
a lock that others wait for: fcntl.flock(os.open(f"{LIBRARY}/readable", 0),
    fcntl.LOCK_EX | fcntl.LOCK_NB); out()
a lease: fcntl.fcntl(os.open(f"{HOME}/open", 0), fcntl.F_SETLEASE, fcntl.F_RDLCK); out()
""",
    "file attributes outside its folder": """
chmod: os.chmod(f"{HOME}/open", 0o600)
chmod of a folder: os.chmod(f"{HOME}/folder", 0)
chmod of what it may read: os.chmod(f"{LIBRARY}/readable", 0)
fchmod: os.fchmod(os.open(f"{LIBRARY}/readable", 0), 0)
fchmodat: call("fchmodat", AT, f"{HOME}/open".encode(), 0o600)
fchmodat2: call("fchmodat2", AT, f"{HOME}/open".encode(), 0o600, 0)
chmod through a descriptor: fd = os.open(f"{HOME}/open", os.O_PATH);
    os.chmod(f"/proc/self/fd/{fd}", 0o600)
chmod through a link: os.symlink(f"{HOME}/open", "mine"); os.chmod("mine", 0o600)
chown: os.chown(f"{HOME}/open", os.getuid(), os.getgid())
lchown: os.lchown(f"{HOME}/link", os.getuid(), os.getgid())
fchown: os.fchown(os.open(f"{LIBRARY}/readable", 0), os.getuid(), os.getgid())
fchownat: call("fchownat", AT, f"{HOME}/open".encode(), os.getuid(), os.getgid(), 0)
utime: os.utime(f"{HOME}/open", (1, 1))
utime of a folder: os.utime(f"{HOME}/folder", (1, 1))
utime of a link: os.utime(f"{HOME}/link", (1, 1), follow_symlinks=False)
futimens: os.utime(os.open(f"{LIBRARY}/readable", 0), (1, 1))
utimensat: call("utimensat", AT, f"{HOME}/open".encode(), struct.pack("QQQQ", 1, 0, 1, 0), 0)
utimes: call("utimes", f"{HOME}/open".encode(), struct.pack("QQQQ", 1, 0, 1, 0))
old utime: call("utime", f"{HOME}/open".encode(), struct.pack("QQ", 1, 1))
futimesat: call("futimesat", AT, f"{HOME}/open".encode(), struct.pack("QQQQ", 1, 0, 1, 0))
setxattr: os.setxattr(f"{HOME}/open", "user.a", b"x")
lsetxattr: os.setxattr(f"{HOME}/open", "user.b", b"x", follow_symlinks=False)
fsetxattr: os.setxattr(os.open(f"{LIBRARY}/readable", 0), "user.a", b"x")
setxattr of a folder: os.setxattr(f"{HOME}/folder", "user.a", b"x")
removexattr: os.removexattr(f"{HOME}/open", "user.there")
lremovexattr: os.removexattr(f"{HOME}/open", "user.there", follow_symlinks=False)
reads an attribute: say(os.getxattr(f"{HOME}/open", "user.there"))
lists attributes: out(bool(os.listxattr(f"{HOME}/open")))
flags of a file: fcntl.ioctl(os.open(f"{LIBRARY}/readable", 0), 0x40086602, struct.pack("Q", 0x40))
""",
    "secrets in /proc": """
environment of TARGET: say(load(f"/proc/{TARGET}/environ")); out()
command line of TARGET: out(bool(load(f"/proc/{TARGET}/cmdline")))
memory of TARGET: os.open(f"/proc/{TARGET}/mem", os.O_RDWR); out()
map of TARGET: out(bool(load(f"/proc/{TARGET}/maps")))
descriptors of TARGET: out(bool(os.listdir(f"/proc/{TARGET}/fd")))
root of TARGET: out("usr" in os.listdir(f"/proc/{TARGET}/root"))
folder of TARGET: os.listdir(f"/proc/{TARGET}/cwd"); out()
status of TARGET: out(bool(load(f"/proc/{TARGET}/status")))
all environments: out(any(map(load, glob.glob("/proc/[0-9]*/environ"))))
the first process: out(bool(load("/proc/1/status")))
addresses in the kernel: out(bool(load("/proc/kallsyms")))
""",
    "total size of files": """
96 MB in files: [os.posix_fallocate(os.open(str(i), CREATE), 0, 16 << 20) for i in range(6)]; out()
96 MB written: [open(str(i), "wb").write(bytes(16 << 20)) for i in range(6)]; out()
""",
}
