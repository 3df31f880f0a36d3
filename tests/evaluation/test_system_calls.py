"""The list of system calls: numbers as in the kernel's headers, verdicts by running the filter."""

import re
import struct
import sys
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT))
from attacks import CALLS
from evaluation import system_calls as s

TABLES = {
    "ALLOWED": s.ALLOWED,
    "CONDITIONAL": s.CONDITIONAL,
    "IGNORED": s.IGNORED,
    "NOT_SUPPORTED": s.NOT_SUPPORTED,
    "FORKS": s.FORKS,
    "attacks": CALLS,
}
HEADERS = {  # Debian: linux-libc-dev
    "x86_64": ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"),
    "aarch64": ("asm-generic/unistd.h",),
}
NEWER = {"fchmodat2": 452}  # than some headers
PID = 4321


def numbers_of_headers(machine):
    """{name: number}; skips where there are no headers."""
    for name in HEADERS[machine]:
        path = Path("/usr/include", name)
        if path.exists():
            break
    else:
        pytest.skip("no kernel headers")
    text = path.read_text()
    found = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    wide = {name: int(n) for name, n in re.findall(r"#define __NR3264_(\w+)\s+(\d+)", text)}
    for name, other in re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", text):
        if other in wide:
            found.setdefault(name, wide[other])
    return {**wide, **found, **NEWER}


@pytest.mark.parametrize("machine", s.MACHINES)
@pytest.mark.parametrize("table", TABLES)
def test_numbers_are_the_kernel_s(machine, table):
    kernel = numbers_of_headers(machine)
    ours = s.numbers(TABLES[table], s.MACHINES[machine][0])
    assert ours == {name: kernel[name] for name in ours}
    if machine == "aarch64":  # what has no number there does not exist there
        all_names = set(TABLES[table].split()[::3])
        assert not (all_names - set(ours)) & set(kernel)


def run(code, machine, number, *arguments, arch=None):
    """The filter's verdict, by a small interpreter of its instructions."""
    values = [value & (1 << 64) - 1 for value in (*arguments, *[0] * (6 - len(arguments)))]
    arch = s.MACHINES[machine][1] if arch is None else arch
    data = struct.pack("IIQ6Q", number, arch, 0, *values)
    instructions = list(struct.iter_unpack("HBBI", code))
    word, at = 0, 0
    while True:
        operation, if_true, if_false, value = instructions[at]
        at += 1
        if operation == s.RETURN:
            return value
        if operation == s.LOAD:
            (word,) = struct.unpack_from("I", data, value)
        elif operation == s.AND:
            word &= value
        else:
            holds = word == value if operation == s.EQUAL else word >= value
            at += if_true if holds else if_false


@pytest.fixture(params=s.MACHINES)
def verdict(request):
    """verdict(name or number, *arguments) -> "allow", "kill" or an errno."""
    machine = request.param
    code = s.filter_of(machine).replace(struct.pack("I", s.ITSELF), struct.pack("I", PID))
    table = "\n".join(TABLES.values())
    known = s.numbers(table, s.MACHINES[machine][0])

    def ask(call, *arguments, arch=None):
        number = known.get(call) if isinstance(call, str) else call
        if number is None:
            pytest.skip(f"{call} does not exist on {machine}")
        found = run(code, machine, number, *arguments, arch=arch)
        return {s.ALLOW: "allow", s.KILL: "kill"}.get(found, found & 0xFFFF)

    return ask


F_SETFL, F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, F_SETPIPE = 4, 8, 10, 1024, 1026, 1031
THREAD = 0x3D0F00


@pytest.mark.parametrize(
    "call, expected",
    [
        (("read", 0, 1, 2), "allow"),
        (("futex",), "allow"),
        (("fcntl", 3, F_SETFL, 0o4000), "allow"),
        (("fcntl", 3, F_SETFL, 0o24000), 1),
        (("fcntl", 3, F_SETOWN, PID), 1),
        (("fcntl", 3, F_SETSIG, 9), 1),
        (("fcntl", 3, F_SETLEASE, 0), 1),
        (("fcntl", 3, F_NOTIFY, 4), 1),
        (("fcntl", 3, F_SETPIPE, 4), 1),
        (("fcntl", 3, 1 << 32 | F_SETOWN, 4), 1),
        (("ioctl", 3, 0x5401), "allow"),
        (("ioctl", 3, 0x5452), 25),
        (("ioctl", 3, 0x8901), 25),
        (("kill", PID, 9), "allow"),
        (("kill", 0, 9), 1),
        (("kill", -1, 9), 1),
        (("kill", PID + 1, 9), 1),
        (("kill", -PID, 9), 1),
        (("prlimit64", 0, 7, 0, 0), "allow"),
        (("prlimit64", 1, 7, 0, 0), 1),
        (("sendto", 3, 0, 1, 0, 0, 0), "allow"),
        (("sendto", 3, 0, 1, 0, 0x1000, 16), 1),
        (("sendto", 3, 0, 1, 0, 0x7F00000000, 16), 1),  # the lower half alone would be 0
        (("socketpair", 1, 1, 0), "allow"),
        (("socketpair", 2, 1, 0), 1),
        (("clone", THREAD), "allow"),
        (("clone", 17), 11),
        (("clone", THREAD | 0x10000000), 11),
        (("openat", -100, 0, 0), "allow"),
        (("openat", -100, 0, 0o1000), 1),
        (("openat", -100, 0, 0o1001), "allow"),
        (("openat", -100, 0, 0o1002), "allow"),
        (("openat", -100, 0, 0o1003), 1),
        (("openat2",), 38),
        (("clone3",), 38),
        (("io_uring_setup",), 38),
        (("chmod",), 0),
        (("setxattr",), 95),
        (("fchownat",), 1),
        (("ptrace",), 1),
        (("bpf",), 1),
        ((10**6,), 38),
        ((0x40000000,), "kill"),
    ],
)
def test_verdicts(verdict, call, expected):
    assert verdict(*call) == expected


def test_another_machine_s_calls_are_killed(verdict):
    assert verdict("read", 0, arch=0x40000003) == "kill"  # i386


def test_an_unknown_machine_has_no_filter():
    assert s.filter_of("riscv64") is None
