"""Source files that were edited, touched or copied after a token set was made of them."""

import hashlib
import json
import os
import shutil

import pytest
from prepared import (  # noqa: F401 (fixtures)
    demo_fixture,
    folder_fixture,
    killed_at,
    prepared,
    same_files,
    texts_fixture,
    write,
)

import prepare
from common.errors import UserError
from data import TokenSet
from text import building, contents, reading

# Of a large file's bytes the plan looks at 64 samples: this one lies between two of them.
UNSEEN = 150_000


@pytest.fixture(name="large")
def large_fixture(texts, tmp_path):
    """A file of more bytes than are sampled."""
    return write(tmp_path / "large.jsonl", texts * 16)


def edit(path, at=UNSEEN):
    """Another letter in place of one; size and time of change stay the same."""
    before = os.stat(path)
    content = bytearray(open(path, "rb").read())
    at = content.index(b"the", at)
    content[at] = ord("T")
    with open(path, "wb") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def later(path):
    """A later time of change."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def test_an_edit_between_the_samples_is_seen(folder, large, tmp_path):
    out = tmp_path / "out"
    flags = ["--source", large, "--tokenizer", folder / "set"]
    first = prepared(out, *flags)
    samples = prepare.file_hash(large, sampled=True)
    edit(large)
    assert prepare.file_hash(large, sampled=True) == samples, "the test's own edit is sampled"
    with pytest.raises(UserError, match="large.jsonl: is not the file that .* was made of .sha256"):
        prepared(out, *flags)
    assert TokenSet(out, verify=True).hash == first.hash
    assert prepared(out, *flags, "--overwrite").hash != first.hash
    prepared(out, *flags)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_large_file_is_compared_in_whole_where_its_time_changed(
    folder, texts, tmp_path, monkeypatch, capsys, ending
):
    monkeypatch.setattr(contents, "SMALL", 10_000)
    monkeypatch.setattr(prepare, "file_hash", lambda *args, **more: "the samples are equal")
    path, out = write(tmp_path / f"x{ending}", texts * 9), tmp_path / "out"
    flags = ["--source", path, "--tokenizer", folder / "set"]
    prepared(out, *flags)
    note = json.loads((out / contents.NAME).read_text().splitlines()[1])
    assert note["sha256"] == hashlib.sha256(open(path, "rb").read()).hexdigest()
    assert note["hashed"] == os.stat(path).st_size > 10_000
    later(path)
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)  # another file with other times, of the same content
    capsys.readouterr()
    prepared(out, *flags)
    assert "used again" in capsys.readouterr().out
    with open(path, "r+b") as file:
        file.seek(-9, os.SEEK_END)
        last = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    later(path)
    if ending != ".parquet":  # its end is read before all else
        with pytest.raises(UserError, match="is not the file that"):
            prepared(out, *flags)
    with pytest.raises(UserError, match=f"--verify: .*x{ending} is not what it was"):
        prepare.main(["--verify", "--out", str(out)])


@pytest.mark.parametrize("small", [10_000, contents.SMALL])
def test_a_half_finished_set_does_not_go_on_with_an_edited_file(
    folder, large, texts, tmp_path, monkeypatch, small
):
    monkeypatch.setattr(reading, "BLOCK", 50_000)
    monkeypatch.setattr(building, "MARK_SECONDS", -1)
    monkeypatch.setattr(contents, "SMALL", small)
    other = write(tmp_path / "other.jsonl", texts)
    flags = ["--source", other, large, "--tokenizer", folder / "set"]
    whole = prepared(tmp_path / "whole", *flags)
    out = tmp_path / "out"
    killed_at("call:text.writing:TokenSetWriter.append:8", [*flags, "--out", out, "--workers", 1])
    shutil.copytree(out, tmp_path / "half")
    kept = open(large, "rb").read()
    edit(large)
    later(large)
    with pytest.raises(UserError, match="large.jsonl: is not the file that"):
        prepared(out, *flags)
    with open(large, "wb") as file:
        file.write(kept)
    assert prepared(out, *flags).hash == whole.hash
    header, *notes = (out / contents.NAME).read_text().splitlines()
    assert [json.loads(note)["sha256"] for note in notes] == [
        hashlib.sha256(open(path, "rb").read()).hexdigest() for path in (other, large)
    ]


@pytest.mark.parametrize("flags", [["--max-tokens", 30_000], ["--max-tokens", 900, "--mix", 1, 2]])
def test_the_notes_are_the_same_for_any_number_of_workers(
    folder, large, tmp_path, monkeypatch, flags
):
    monkeypatch.setattr(reading, "BLOCK", 20_000)
    monkeypatch.setattr(contents, "SMALL", 30_000)
    flags = ["--source", folder / "data.jsonl", large, "--tokenizer", folder / "set", *flags]
    prepared(tmp_path / "1", *flags)
    prepared(tmp_path / "3", *flags, "--workers", 3)
    assert same_files(tmp_path / "1", tmp_path / "3")


def test_verify_checks_tokens_masks_and_sources(folder, demo, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "the sum", "completion": "is 12345"}\n')
    out = tmp_path / "out"
    prepared(out, "--source", path, demo / "curated")
    check = ["--verify", "--out", str(out)]
    prepare.main(check)
    assert "verified" in capsys.readouterr().out
    for name, wanted in (
        ("loss_mask.bin", "loss_mask.bin is not the file that meta.json describes"),
        ("kind.bin", "--verify: .*kind.bin is not what it was"),
        ("tokens.bin", "tokens.bin is not the file that meta.json describes"),
    ):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        with pytest.raises(UserError, match=wanted):
            prepare.main(check)
        (out / name).write_bytes(kept)
    prepare.main(check)
    with open(path, "a") as file:
        file.write('{"prompt": "more", "completion": "than there was"}\n')
    with pytest.raises(UserError, match="--verify: .*chat.jsonl is not what it was .*bytes, has"):
        prepare.main(check)
    path.unlink()
    with pytest.raises(UserError, match="--verify: .*chat.jsonl is not what it was .*No such file"):
        prepare.main(check)
    with pytest.raises(UserError, match="--verify: got no --out"):
        prepare.main(["--verify"])


def test_a_file_of_the_users_of_that_name_is_left_alone(folder, tmp_path):
    mine = tmp_path / "out" / contents.NAME
    mine.parent.mkdir()
    mine.write_text('{"years": "of work"}\n')
    for more in ([], ["--overwrite"]):
        flags = ["--source", folder / "data.jsonl", "--tokenizer", folder / "set", *more]
        with pytest.raises(UserError, match="exists, and this kit did not write it"):
            prepared(tmp_path / "out", *flags)
    assert mine.read_text() == '{"years": "of work"}\n'


def test_sets_without_notes_are_used_as_before(folder, large, tmp_path, capsys):
    """Those of an earlier version of the kit, for instance."""
    flags = ["--source", large, "--tokenizer", folder / "set"]
    prepared(tmp_path / "out", *flags)
    (tmp_path / "out" / contents.NAME).unlink()
    capsys.readouterr()
    prepared(tmp_path / "out", *flags)
    assert "used again" in capsys.readouterr().out
    prepare.main(["--verify", "--out", str(tmp_path / "out")])
    assert "no record of its source files" in capsys.readouterr().out
