"""Each attack of attacks.py, in each world of worlds.py: held, or its kind is stated at start.

An attack is held if nothing of the outside differs after it: files with their modes, owners and
times, other processes with their priorities and limits, sockets, queues, semaphores; no process and
no folder of the program is left. Without a sandbox the same programs get out.
"""

import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
from attacks import ATTACKS, UNCONDITIONAL, attacks
from worlds import NO_SANDBOX, WORLDS, CannotBeMade, attacked, escapes

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox is for Linux"
)
# What got out before its rule was there, and one or two of each kind.
SAMPLE = [
    "connects by TCP",
    "connects to a stream socket",
    "sendto from a pair",
    "sendmsg from a pair",
    "stat",
    "open",
    "through the root of a process",
    "appends",
    "truncates a file that it may read",
    "in /tmp",
    "chmod",
    "chown",
    "utime",
    "setxattr",
    "environment of the caller",
    "kills the server",
    "interrupts the server",
    "F_SETOWN to the stranger",
    "FIOSETOWN to the stranger",
    "slows the server down",
    "slows the caller down",
    "pins the server to a processor",
    "ioprio_set on the stranger",
    "sends a message",
    "removes a semaphore",
    "a user namespace",
    "io_uring",
    "runs another program",
    "forks",
    "96 MB in files",
    "3 GB",
    "writes o and fails",
    "looks for the key in its callers",
]


def attacked_or_skipped(world, names=None):
    try:
        return attacked(world, names)
    except CannotBeMade as reason:
        pytest.skip(str(reason))


def check(world, names=None):
    found, stated, left = attacked_or_skipped(world, names)
    assert set(stated) <= set(ATTACKS) and not set(stated) & set(UNCONDITIONAL)
    assert not escapes(found, stated)
    assert not left
    return found, stated


def test_there_are_many_attacks_and_each_has_its_own_name():
    names = [(kind, name) for kind, name, *_ in attacks()]
    assert len(set(names)) == len(names) > 400
    assert set(SAMPLE) <= {name for _, name in names}
    assert {kind for kind, name in names if name in SAMPLE} >= set(ATTACKS) - {
        "number of processes"
    }


@pytest.mark.parametrize("name", ["root", "user, no namespaces"])
def test_a_sample_of_the_attacks(name):
    found, stated = check(WORLDS[name], SAMPLE)
    assert len(found) >= len(SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_all_attacks(name):
    found, stated = check(WORLDS[name])
    assert len(found) == len(attacks())


@pytest.mark.slow
def test_without_a_sandbox_they_get_out():
    """A check that no attack is held by its own mistake."""
    found, _, _ = attacked_or_skipped(NO_SANDBOX)
    assert [attack for attack, reached in found.items() if not reached] == []
    assert len(found) > 400
