"""Whose a file is, one writer at a time, and what a kill or a power loss leaves."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from common import aside, changes, files, locks, owned
from common.errors import UserError
from conftest import ROOT


def contents(folder):
    """{path: bytes} of a folder's files, without the kit's lists."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != owned.LIST:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_only_what_the_kit_wrote_is_replaced(tmp_path):
    files.write_atomic(tmp_path / "ours.json", "1")
    files.write_atomic(tmp_path / "ours.json", "2")
    assert (tmp_path / "ours.json").read_text() == "2"
    (tmp_path / "theirs.json").write_text("years of work")
    with pytest.raises(UserError, match="theirs.json: exists, and this kit did not write it"):
        files.write_atomic(tmp_path / "theirs.json", "1")
    with pytest.raises(UserError, match="theirs.json"):
        files.Growing(tmp_path / "theirs.json", 0)
    assert not files.remove(tmp_path / "theirs.json")
    assert contents(tmp_path) == {"ours.json": b"2", "theirs.json": b"years of work"}


def test_a_name_of_somebody_else_s_after_ours_was_deleted(tmp_path):
    files.write_atomic(tmp_path / "a", "ours")
    assert files.remove(tmp_path / "a") and not (tmp_path / "a").exists()
    (tmp_path / "a").write_text("theirs")
    with pytest.raises(UserError, match="did not write"):
        files.write_atomic(tmp_path / "a", "ours")


def test_a_temporary_file_of_somebody_else_s(tmp_path):
    (tmp_path / "a.json.tmp").write_text("theirs")
    files.write_atomic(tmp_path / "a.json", "ours")
    assert contents(tmp_path) == {"a.json": b"ours", "a.json.tmp": b"theirs"}
    (tmp_path / f"b.json{owned.TEMPORARY}").write_text("theirs")
    with pytest.raises(UserError, match="b.json"):
        files.write_atomic(tmp_path / "b.json", "ours")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("cut", [1, 10, 34, 35, 36])
def test_a_list_that_a_power_loss_cut(tmp_path, cut):
    """What its whole lines name is ours; the rest is not, and the next entry is readable."""
    files.write_atomic(tmp_path / "a", "1")
    files.write_atomic(tmp_path / "b", "1")
    path = tmp_path / owned.LIST
    os.truncate(path, path.stat().st_size - 1)
    assert owned.written(tmp_path) == {"a"}
    os.truncate(path, cut)
    files.write_atomic(tmp_path / "c", "1")
    assert owned.written(tmp_path) - {"a"} == {"c"}


def test_another_program_s_list(tmp_path):
    (tmp_path / owned.LIST).write_text("a plan\n")
    with pytest.raises(UserError, match="another program's file"):
        files.write_atomic(tmp_path / "a", "1")


def test_a_folder_is_one_thing(tmp_path):
    locks.lock_folder(tmp_path / "run", "run")
    locks.unlock(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run, wanted a token set's folder"):
        locks.lock_folder(tmp_path / "run", "token set")
    files.write_atomic(tmp_path / "mixed/ref_loss.bin", "1")
    with pytest.raises(UserError, match="holds ref_loss.bin, which the kit wrote"):
        locks.lock_folder(tmp_path / "mixed", "run")


HOLD = """
import sys
from common import files, locks, owned
locks.lock_folder(sys.argv[1], "run")
print("held", flush=True)
sys.stdin.read()
"""


def held_by_another(folder):
    """A process that has locked a folder, until it is killed or its input ends."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    return other


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
    other = held_by_another(tmp_path / "run")
    with pytest.raises(UserError, match="another process is writing to it"):
        locks.lock_folder(tmp_path / "run", "run")
    other.kill()
    other.wait()
    locks.lock_folder(tmp_path / "run", "run")
    descriptor = locks.locked[owned.key_of(tmp_path / "run" / owned.LIST)]
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR  # as NFS wants it
    locks.unlock(tmp_path / "run")


def test_a_folder_that_may_only_be_read_is_locked_too(tmp_path, monkeypatch):
    """A colleague's finished set, and a file system that is mounted read-only."""
    locks.lock_folder(tmp_path / "set", "token set")
    locks.unlock(tmp_path / "set")
    real = locks.opened
    for error in (PermissionError(errno.EACCES, "no"), OSError(errno.EROFS, "no")):

        def opened(path, flags, error=error):
            if flags & os.O_RDWR:
                raise error
            return real(path, flags)

        monkeypatch.setattr(locks, "opened", opened)
        locks.lock_folder(tmp_path / "set", "token set")
        locks.unlock(tmp_path / "set")


def test_one_that_is_soon_done_is_waited_for(tmp_path, monkeypatch):
    other = held_by_another(tmp_path / "set")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            other.communicate("")  # it ends

    monkeypatch.setattr(locks.time, "sleep", sleep)
    locks.lock_folder(tmp_path / "set", "run", wait=3600.0)
    assert len(waited) == 3
    locks.unlock(tmp_path / "set")


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    """A power loss leaves the old file whole, or the new one."""
    passed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: passed.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(changes, "reached", lambda moment, path: passed.append(moment))
    files.write_atomic(tmp_path / "a", "1")
    files.write_atomic(tmp_path / "a", "2")
    new, folder = (os.stat(path).st_ino for path in (tmp_path / "a", tmp_path))
    end = ["before write", new, "after write", "before rename", folder, "after rename"]
    assert passed[-len(end) :] == end


def test_growing_files_are_cut_to_the_size_that_counts(tmp_path):
    file = files.Growing(tmp_path / "log", 0)
    file.write(b"12345")
    file.close()
    again = files.Growing(tmp_path / "log", 3)
    again.write(b"x")
    again.close()
    assert (tmp_path / "log").read_bytes() == b"123x"
    with pytest.raises(UserError, match="was cut, wanted at least 9 bytes"):
        files.Growing(tmp_path / "log", 9)


def test_growing_does_not_follow_a_link(tmp_path):
    (tmp_path / "theirs").write_text("years of work")
    files.Growing(tmp_path / "log", 0).close()
    (tmp_path / "log").unlink()
    (tmp_path / "log").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError):
        files.Growing(tmp_path / "log", 0)
    assert (tmp_path / "theirs").read_text() == "years of work"


@pytest.mark.parametrize(
    "out, read, refused",
    [
        ("d/x.bin", "d", True),
        ("d", "d/x", True),
        ("d", "d", True),
        ("link/x.bin", "d", True),
        ("e", "d", False),
        ("d2", "d", False),
        ("org/model", "org/other", False),  # a hub id is no path
    ],
)
def test_outputs_and_inputs_do_not_overlap(tmp_path, monkeypatch, out, read, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d/x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("d")
    if refused:
        with pytest.raises(UserError, match="overlaps with --data"):
            owned.refuse_overlap(out, {"--data": ["org/name", None, read]})
    else:
        owned.refuse_overlap(out, {"--data": read})


# --------------------------------------------------------------------------------------------------
# --overwrite


@pytest.fixture
def old(tmp_path):
    """A folder of ours, with somebody else's files in it."""
    for name in ("args.json", "model.bin", "step-1/model.bin"):
        if "/" in name:
            owned.own_folder((tmp_path / "run" / name).parent)
        files.write_atomic(tmp_path / "run" / name, f"old {name}")
    for name in ("mine.txt", "step-1/mine.txt"):
        (tmp_path / "run" / name).write_text(f"years of work: {name}")
    return tmp_path / "run"


class Killed(BaseException):
    """Where a process would end."""


def moments_of(function, monkeypatch, stop=None):
    """How many moments a function passes; it ends at number `stop`."""
    passed = []

    def reached(moment, path):
        passed.append(moment)
        if len(passed) == stop:
            raise Killed

    monkeypatch.setattr(changes, "reached", reached)
    try:
        function()
    except Killed:
        pass
    finally:
        monkeypatch.setattr(changes, "reached", lambda moment, path: None)
    return len(passed)


def test_what_was_there_stays_until_it_is_discarded(old):
    before = contents(old)
    aside.set_aside(old)
    mine = {name: text for name, text in before.items() if "mine" in name}
    kept = {name.removeprefix(".before/"): text for name, text in contents(old).items()}
    assert {name: text for name, text in kept.items() if name != ".whole"} == before
    assert {name for name in contents(old) if not name.startswith(".before")} == set(mine)
    aside.discard(old)
    assert contents(old) == mine and not (old / ".before").exists()


def test_killed_anywhere_while_it_is_set_aside(old, monkeypatch):
    """It is put back; at no moment is anything lost."""
    before = contents(old)
    n = 0
    while True:
        n += 1
        passed = moments_of(lambda: aside.set_aside(old), monkeypatch, stop=n)
        found = contents(old)
        assert set(before.values()) <= set(found.values()), f"lost at moment {n}"
        if passed < n:
            break
        if (old / ".before/.whole").exists():
            continue  # the next one comes to its end, too
        aside.put_back(old)
        assert contents(old) == before, f"moment {n}"
    assert n > 20


def test_killed_anywhere_while_it_is_set_aside_and_tried_again(old, monkeypatch):
    before = contents(old)
    for n in range(1, 200):
        if moments_of(lambda: aside.set_aside(old), monkeypatch, stop=n) < n:
            break
    kept = {name.removeprefix(".before/"): text for name, text in contents(old).items()}
    kept.pop(".whole")
    assert kept == before and n > 5


def test_killed_anywhere_while_it_is_discarded(old, monkeypatch):
    mine = {name: text for name, text in contents(old).items() if "mine" in name}
    aside.set_aside(old)
    files.write_atomic(old / "args.json", "new")
    kills = 0
    while moments_of(lambda: aside.discard(old), monkeypatch, stop=4) == 4:
        kills += 1
        aside.put_back(old)
        assert contents(old)["args.json"] == b"new"
    assert kills > 3 and contents(old) == mine | {"args.json": b"new"}


def test_started_over_twice_the_first_run_is_what_is_kept(old):
    before = contents(old)
    aside.set_aside(old)
    files.write_atomic(old / "args.json", "a run that saved nothing")
    aside.set_aside(old)
    assert (old / ".before/args.json").read_bytes() == before["args.json"]
    assert not (old / "args.json").exists()
