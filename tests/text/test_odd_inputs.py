"""Inputs that hang, confuse or crash other readers: each is read, or is one line."""

import gzip
import io
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import (  # noqa: F401 (fixtures)
    documents,
    folder_fixture,
    forked,
    prepared,
    texts_fixture,
    write,
)

from common.errors import UserError
from hf.tokenizer import Tokenizer
from text import reading

GOOD = b'{"text": "the sum"}\n'


def zst(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


def skippable(n):
    return b"\x50\x2a\x4d\x18" + n.to_bytes(4, "little") + b"x" * n


def with_dictionary(content):
    samples = [json.dumps({"text": f"sum {i} of {i * i}"}).encode() for i in range(500)]
    return zst(content, dict_data=zstandard.train_dictionary(1000, samples))


def odd_column():
    """A parquet file whose column's name is not UTF-8."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    return file.getvalue().replace(b"text", b"\x80ext", 1)


READ = {  # name: (bytes, the documents)
    "crlf.jsonl": (b'{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD, ["the sum"]),
    "bom.json": (b'\xef\xbb\xbf \n[{"text": "a"},{"text": "b"}]\n', ["a", "b"]),
    "lines.json": (GOOD * 2, ["the sum"] * 2),
    "commas.json": (b'[{"text": "a"},,{"text": "b"},]', ["a", "b"]),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "nul.txt": (b"a\0b", ["a\0b"]),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', ["b"]),
    "nan.jsonl": (b'{"text": "a", "n": NaN, "m": -Infinity, "k": 1e999}\n', ["a"]),
    "blank.jsonl": (b" \n\t\n\n" + GOOD + b"\n \n", ["the sum"]),
    "members.jsonl.gz": (gzip.compress(GOOD) + gzip.compress(b"") + gzip.compress(GOOD), 2),
    "zeros.jsonl.gz": (gzip.compress(GOOD) + b"\0" * 600, 1),
    "frames.jsonl.zst": (skippable(9) + zst(GOOD[:5]) + zst(b"") + zst(GOOD[5:]), 1),
    "behind.jsonl.zst": (zst(GOOD) + skippable(3000), 1),
    "checked.jsonl.zst": (zst(GOOD, write_checksum=True, write_content_size=False), 1),
    "array.json.gz": (gzip.compress(b' [{"text": "the sum"}, {"text": "the sum"}]'), 2),
    "lines.json.zst": (zst(GOOD * 2), 2),
    "empties.jsonl.zst": (zst(b"") * 20_000 + zst(GOOD), 1),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read(folder, tmp_path, name):
    content, wanted = READ[name]
    (tmp_path / name).write_bytes(content)
    flags = ["--source", tmp_path / name, "--tokenizer", folder / "set"]
    tokens = prepared(tmp_path / "out", *flags)
    if isinstance(wanted, int):
        wanted = ["the sum"] * wanted
    assert list(map(Tokenizer.load(folder / "set").decode, documents(tokens))) == wanted


REFUSED = {  # name: (bytes, what the line says)
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1: holds a whole number"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: its JSON is nested too"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "record 1: its JSON is nested too deeply"),
    "string.jsonl": (b'"text"\n', "line 1: got str, wanted a JSON object"),
    "null.jsonl": (b"null\n", "line 1: got NoneType, wanted a JSON object"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: field 'text' is int, wanted a string"),
    "inside.jsonl": (b'{"text": ["a"]}\n', "line 1: field 'text' is list, wanted a string"),
    "nul.jsonl": (GOOD + b"\0\n", "line 2: broken JSON"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8, byte 1 is 0xff"),
    "two.json": (b'[{"text": "a"}] [{"text": "b"}]', "record 1 .something stands behind"),
    "broken.json": (b'[{"text": "a"}, {"text": }, {"text": "b"}]', "record 2: broken JSON"),
    "cut.json": (b'[{"text": "a"}, {"text": "b"', "damaged after record 1 .the array's end"),
    "trailing.jsonl.gz": (gzip.compress(GOOD) + b"garbage", "damaged after line "),
    "dictionary.jsonl.zst": (with_dictionary(GOOD), "packed with a dictionary"),
    "frame.jsonl.zst": (zst(GOOD * 9)[:-4], "the compressed data ends too early"),
    "array.json.gz": (gzip.compress(b'[{"text": "a"}]')[:9], "damaged after record 0"),
    "skipped.jsonl.zst": (skippable(900)[:-1], "the compressed data ends too early"),
    "magic.parquet": (b"PAR1" + b"\0" * 9 + b"PAR1", "not a whole parquet file"),
    "encrypted.parquet": (b"PARE" + b"\0" * 90 + b"\x20\0\0\0PARE", "not a whole parquet file"),
    "column.parquet": (odd_column(), "not a whole parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(folder, tmp_path, name):
    content, wanted = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    flags = ["--source", tmp_path / name, "--text-field", "text", "--tokenizer", folder / "set"]
    with pytest.raises(UserError, match=wanted) as error:
        prepared(tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([{"a": "x"}], "row 1: field 'text' is dict, wanted a string"),
        ([["a", "b"]], "row 1: field 'text' is list, wanted a string"),
        ([b"\xff\xfe"], "row 1: not UTF-8, byte 1 is 0xff"),
        ([1.5], "row 1: field 'text' is float, wanted a string"),
    ],
)
def test_parquet_columns_of_other_types(folder, tmp_path, values, wanted):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    with pytest.raises(UserError, match=wanted):
        prepared(tmp_path / "out", "--source", path, "--tokenizer", folder / "set")


def test_what_is_no_file(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "nothing.json").symlink_to("nowhere")
    for name, wanted in (
        ("pipe.jsonl", "is a pipe or a device, wanted a file"),
        ("device.txt", "is a pipe or a device, wanted a file"),
        ("folder.jsonl", "is a folder without meta.json"),
        ("loop.jsonl", "does not exist"),
        ("nothing.json", "does not exist"),
        ("x" * 300 + ".jsonl", "File name too long"),
        ("nul\0.jsonl", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"--source .*{wanted}"):
            prepared(tmp_path / "out", "--source", tmp_path / name, "--train-vocab", 300)


def test_a_file_that_may_not_be_read(folder, tmp_path, monkeypatch):
    path = write(tmp_path / "mine.jsonl", ["a"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="mine.jsonl: may not be read by this user"):
        prepared(tmp_path / "out", "--source", path, "--train-vocab", 300)


@pytest.mark.parametrize("what", ["cut", "longer", "gone", "touched"])
def test_a_file_that_changes_while_it_is_read(folder, texts, tmp_path, monkeypatch, what):
    path = tmp_path / "x.jsonl"
    write(path, texts)
    monkeypatch.setattr(reading, "BLOCK", 5000)
    whole, read = path.read_bytes(), reading.read

    def changing(source, start):
        for number, job in enumerate(read(source, start)):
            if number == 2:
                change(path, what, whole)
            yield job

    monkeypatch.setattr(reading, "read", changing)
    flags = ["--source", path, "--tokenizer", folder / "set"]
    with pytest.raises(UserError, match="changed while it was read|cannot be read|broken JSON"):
        prepared(tmp_path / "out", *flags)
    assert not (tmp_path / "out/meta.json").exists()
    monkeypatch.setattr(reading, "read", read)
    if what == "touched":
        prepared(tmp_path / "out", *flags)
    else:
        with pytest.raises(UserError, match="does not exist|something else .sources was"):
            prepared(tmp_path / "out", *flags)


def change(path, what, whole):
    if what == "cut":
        os.truncate(path, 20_000)
    elif what == "longer":
        path.write_bytes(whole + GOOD)
    elif what == "gone":
        path.unlink()
    if path.exists():
        os.utime(path, ns=(0, 0))


def test_a_field_list_without_end_is_shortened(folder, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps({"x" * (i % 300) + str(i): i for i in range(5000)}) + "\n")
    with pytest.raises(UserError, match="has no field 'text', its fields are '0', .*, ... of 5000"):
        prepared(tmp_path / "out", "--source", path, "--tokenizer", folder / "set")


def test_a_lack_of_memory_is_one_line(folder, tmp_path):
    path = write(tmp_path / "x.jsonl", ["the sum"])

    def starve():
        def piece_of(*args):
            raise MemoryError

        pytest.MonkeyPatch().setattr("text.pieces.Preparation.piece_of", piece_of)

    for n_workers in (1, 2):
        flags = ["--tokenizer", folder / "set", "--out", tmp_path / f"out{n_workers}"]
        flags += ["--workers", n_workers]
        code, printed = forked(["--source", path, *flags], starve)
        assert code == 2 and "not enough memory" in printed and "Traceback" not in printed
