"""Files that unpack to far more than they are, and records that never end: memory stays bounded."""

import gzip
import io
import json
import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import folder_fixture, prepared, texts_fixture, write  # noqa: F401 (fixtures)

from common.errors import UserError
from conftest import ROOT
from text import reading, workers
from text.blocks import Damaged, blocks
from text.cutting import Array, Lines

MiB = 1 << 20
LINE = b" " * 4000 + b'{"text": "the sum"}\n'

# prepare.py on each file named: its peak of memory above what was there before, in MiB; its error.
MEASURED = """
import json, sys, prepare, text.parquet, zstandard
from pathlib import Path
from common.errors import UserError

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) // 1024

for argv in json.loads(sys.argv[1]):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    message = ""
    try:
        prepare.main(argv)
    except UserError as error:
        message = str(error)
    print("measured", json.dumps([status("VmHWM") - before, message]))
"""


def measured(folder, paths, *flags):
    """[(peak in MiB, error)] of prepare.py on each of the files, in one process."""
    argvs = []
    for path in paths:
        argv = ["--source", path, "--text-field", "text", "--tokenizer", folder / "set"]
        argv += ["--out", f"{path}.set", "--workers", 1, *flags]
        argvs.append([str(word) for word in argv])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(argvs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
    assert len(rows) == len(paths), done.stderr
    return [json.loads(row.removeprefix("measured ")) for row in rows]


def stream(part, n_bytes):
    """The part over and over, a MiB at a time."""
    block = part * (MiB // len(part))
    for _ in range(n_bytes // len(block)):
        yield block


def packed(path, blocks, window_log=20):
    """A .zst or .gz of the blocks."""
    if path.suffix == ".gz":
        out = gzip.open(path, "wb", 1)
    else:
        settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
        out = zstandard.ZstdCompressor(compression_params=settings).stream_writer(open(path, "wb"))
    with out as file:
        for block in blocks:
            file.write(block)
    return path


def plain(path, start, n):
    """A file of n bytes with this start; the rest, zeros, takes no room on the disk."""
    path.write_bytes(start)
    os.truncate(path, n)
    return path


def parquet(path, texts, **options):
    """One row group and one page, where the options do not say otherwise."""
    table = pyarrow.table({"text": texts})
    options = {"use_dictionary": False, "compression": "zstd", "write_batch_size": MiB, **options}
    pyarrow.parquet.write_table(table, path, row_group_size=1 << 30, **options)
    return path


def bombs(folder, n):
    """[(file, what its error says or "")]: each unpacks to n bytes or more."""
    long = "is longer than 1,048,576 bytes; .* raise --max-document-bytes"
    indices = pyarrow.array([0] * 100_000, pyarrow.int32())
    repeated = pyarrow.DictionaryArray.from_arrays(indices, ["x " * (MiB // 4)])
    one_page = {"data_page_size": 1 << 30}
    return [
        (packed(folder / "lines.jsonl.zst", stream(LINE, n)), ""),
        (packed(folder / "line.jsonl.zst", stream(b"a", n)), f"line.jsonl.zst line 1: {long}"),
        (packed(folder / "wide.jsonl.zst", stream(LINE, n), 30), "looks back on more than 134,217"),
        (packed(folder / "lines.jsonl.gz", stream(LINE, n)), ""),
        (packed(folder / "line.jsonl.gz", stream(b"a", n)), f"line.jsonl.gz line 1: {long}"),
        (plain(folder / "line.jsonl", b"", n), f"line.jsonl line 1: {long}"),
        (plain(folder / "one.txt", b"", n), f"one.txt: {long}"),
        (plain(folder / "one.json", b'["', n), "damaged after record 0"),
        (plain(folder / "deep.json", b"[" * (n // 64), n // 64), "damaged after record 0"),
        (parquet(folder / "page.parquet", ["x" * 1000] * (n // 1000), **one_page), "has a page of"),
        (
            parquet(folder / "rows.parquet", ["a"] * 9999 + ["x" * n, "b"], write_batch_size=1),
            "has a page of",
        ),
        (
            parquet(
                folder / "group.parquet",
                ["x" * 999] * (n // 999),
                write_batch_size=64,
                data_page_size=MiB // 4,
            ),
            "",
        ),
        (parquet(folder / "same.parquet", repeated, use_dictionary=True), ""),
    ]


@pytest.mark.slow
def test_what_unpacks_to_eighty_times_the_limit_needs_little_memory(folder, tmp_path):
    made = bombs(tmp_path, 80 * MiB)
    paths = [path for path, _ in made]
    rows = measured(folder, paths, "--max-document-bytes", MiB, "--max-tokens", 200_000)
    for (path, wanted), (peak, message) in zip(made, rows):
        assert peak < 72, (path.name, peak)
        assert re.search(wanted, message) if wanted else not message, (path.name, message)


@pytest.mark.slow
def test_three_gigabytes_in_a_small_file(folder, tmp_path):
    n = 3 << 30
    paths = [
        packed(tmp_path / "lines.jsonl.zst", stream(LINE, n), 27),
        packed(tmp_path / "line.jsonl.zst", stream(b"a", n)),
        packed(tmp_path / "line.jsonl.gz", stream(b"a", n)),
        plain(tmp_path / "one.json", b'["', n),
    ]
    assert paths[0].stat().st_size < 400_000
    rows = measured(folder, paths)
    assert [peak < 200 for peak, _ in rows] == [True] * len(paths), rows
    assert [bool(message) for _, message in rows] == [False, True, True, True]


# --- the same limit, record by record


LONG = ["x" * 90, "the sum", "y" * 300, "", "a"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
def test_a_record_that_is_too_long_is_named_or_left_out(folder, tmp_path, ending):
    path = tmp_path / f"long{ending}"
    if ending == ".json":
        path.write_text(json.dumps([{"text": text} for text in LONG], indent=1))
    else:
        write(path, LONG)
    flags = ["--source", path, "--tokenizer", folder / "set", "--max-document-bytes", 200]
    with pytest.raises(UserError, match=rf"long{ending} (line|row|record) 3: is longer than 200 b"):
        prepared(tmp_path / "out", *flags)
    tokens = prepared(tmp_path / "out", *flags, "--skip-bad")
    assert tokens.meta["bad_records"] == 1 and tokens.meta["sources"][0]["documents"] == 3
    with pytest.raises(UserError, match="fields was .*none over 200 bytes.*, is now"):
        prepared(tmp_path / "out", *flags[:-2], "--skip-bad")


def test_a_higher_limit_goes_on_where_a_lower_one_stopped(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "BLOCK", 64)
    flags = ["--source", write(tmp_path / "x.jsonl", LONG), "--tokenizer", folder / "set"]
    with pytest.raises(UserError, match="line 3: is longer than 200 bytes"):
        prepared(tmp_path / "out", *flags, "--max-document-bytes", 200)
    tokens = prepared(tmp_path / "out", *flags, "--max-document-bytes", 400)
    assert "goes on where it stopped" in capsys.readouterr().out
    assert tokens.meta["sources"][0]["documents"] == 4


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_records_are_cut_the_same_whatever_the_blocks(size):
    lines = b"one\n\ntwo two two two\nthree"
    array = rb' [ {"a": "x,\"]\\"},[1,[2]], "..............", 4 ] '
    for cutting, content, wanted in (
        (Lines(10), lines, [b"one", b"", None, b"three"]),
        (Array(13), array, [b"[1,[2]]", b"4"]),
        (Array(20), array, [rb'{"a": "x,\"]\\"}', b"[1,[2]]", b'".............."', b"4"]),
    ):
        records = []
        for at in range(0, len(content), size):
            records += cutting.cut(content[at : at + size])
        records += cutting.last()
        if cutting.damage:
            raise AssertionError(cutting.damage)
        got = [record and record.strip() for record in records]
        if len(wanted) == 2:
            wanted = [None, wanted[0], None, wanted[1]]
        assert got == wanted


class Job:
    def __init__(self, n_bytes):
        self.n_bytes = n_bytes


class Counting:
    """A pool that works when it is asked for a result, and knows how much it holds."""

    def __init__(self, *args):
        self.held = self.most = 0

    def submit(self, work, job):
        self.held += job.n_bytes
        self.most = max(self.most, self.held)
        return Result(self, job.n_bytes)

    def shutdown(self, cancel_futures):
        pass


class Result:
    def __init__(self, pool, n_bytes):
        self.pool, self.n_bytes = pool, n_bytes

    def result(self):
        self.pool.held -= self.n_bytes
        return self.n_bytes


def test_what_waits_between_processes_is_bounded(monkeypatch):
    pool = Counting()
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *args: pool)
    sizes = [5 * MiB, 60 * MiB, MiB, 31 * MiB, 8 * MiB, 0, 0, 64 * MiB, *[MiB] * 100]
    pieces = list(workers.in_order(map(Job, sizes), 2, None))
    assert pieces == sizes
    assert pool.most == 64 * MiB  # the longest one, alone


def test_what_comes_before_damage_is_read_however_it_is_packed():
    text = b"".join(b"line %d of some text\n" % i for i in range(40_000))
    for ending, pack in (("gz", gzip.compress), ("zst", zstandard.compress)):
        cut = pack(text)
        cut = cut[: len(cut) * 9 // 10]
        found = b""
        with pytest.raises(Damaged):
            for block in blocks(f"x.{ending}", io.BytesIO(cut), MiB, MiB):
                found += block
        assert text.startswith(found) and len(found) > len(text) // 2
