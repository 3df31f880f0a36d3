"""Reading text for prepare.py: files and token sets, cut into jobs for its workers.

A source is a dict: type ("txt", "jsonl", "parquet", "set" or "demo"), path, and size (bytes; tokens of a set; pages of
the demo). A job is a dict: source (its number), records (what is to be tokenised), first (the number of the first
record in its source), next (where a restart goes on) and read (how much of the source's size lies behind it). Jobs are
cut the same way on every run, and only one is in memory. Every error names the file and the line, row or byte.
"""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from data import TokenSet
from runtime import UserError

BLOCK = 1 << 20     # bytes of text per job, about
JOIN = "\n"         # between prompt and response; it belongs to the prompt
ENDINGS = {".txt": "txt", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}

open_set = cache(TokenSet)


def find(names, fields, skip_bad):
    """The sources of --source. Raises UserError for whatever can be seen to be wrong without reading everything."""
    sources = []
    for name in names:
        path, ending = Path(name), max((e for e in ENDINGS if name.endswith(e)), key=len, default=None)
        if name == "demo":
            raise UserError("--source demo: goes alone; to mix its token sets, name data/demo/corpus and so on")
        if not path.exists():
            raise UserError(f"--source {name}: does not exist")
        if path.is_dir():
            if not (path / "meta.json").exists():
                raise UserError(f"--source {name}: is a folder without meta.json, so not a finished token set; "
                                f"name files or token sets")
            sources.append({"type": "set", "path": name, "size": open_set(name).count})
            continue
        if ending is None:
            raise UserError(f"--source {name}: got the ending {path.suffix!r}, wanted one of {', '.join(ENDINGS)}")
        if path.stat().st_size == 0 and not skip_bad:
            raise UserError(f"--source {name}: the file is empty")
        if ending == ".parquet":
            columns = open_parquet(name).schema_arrow.names
            for field in fields:
                if field not in columns:
                    raise UserError(f"--source {name}: has no field {field!r}, {listed(columns)}")
        sources.append({"type": ENDINGS[ending], "path": name, "size": path.stat().st_size})
    return sources


def listed(fields):
    return f"its fields are {', '.join(map(repr, fields)) or 'none'}; name one with --text-field or --prompt-field"


def jobs(sources, state, fields):
    """Jobs of all sources, from record state["record"] of source state["source"] on. Damage to a file is a job, too
    ({"error": line}): it is met after everything that was read well."""
    for number in range(state["source"], len(sources)):
        try:
            for job in read(sources[number], state["record"] if number == state["source"] else 0, fields):
                yield {"source": number, **job}
        except UserError as error:
            yield {"error": str(error)}


def read(source, start, fields):
    """Jobs of one source from record `start` on."""
    if source["type"] == "txt" and start == 0:
        yield {"records": [Path(source["path"]).read_bytes()], "first": 0, "next": 1, "read": source["size"]}
    elif source["type"] == "jsonl":
        yield from read_lines(source, start)
    elif source["type"] == "parquet":
        yield from read_rows(source, start, fields)
    elif source["type"] in ("demo", "set"):     # the records are numbers: of pages to write, of tokens to copy
        step = 256 if source["type"] == "demo" else BLOCK
        for first in range(start, source["size"], step):
            stop = min(source["size"], first + step)
            yield {"records": range(first, stop), "first": first, "next": stop, "read": stop}


def read_lines(source, start):
    path, number, parts = source["path"], 0, []
    with open(path, "rb") as file:
        try:
            for block in blocks(path, file):
                parts.append(block)
                if b"\n" in block:
                    *lines, tail = b"".join(parts).split(b"\n")
                    first, end, parts = max(number, start), number + len(lines), [tail]
                    if first < end:
                        yield {"records": lines[first - number:], "first": first, "next": end, "read": file.tell()}
                    number = end
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(f"{path}: damaged after line {number} ({error}); copy the file again") from None
    if b"".join(parts) and number >= start:     # a last line without its newline
        yield {"records": [b"".join(parts)], "first": number, "next": number + 1, "read": source["size"]}


def blocks(path, file):
    """The uncompressed bytes of an open file, piece by piece. Raises EOFError where compressed data ends too early."""
    if path.endswith(".zst"):
        frame, ended = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), True
        while piece := file.read(BLOCK // 8):
            while piece:
                yield frame.decompress(piece)
                ended, piece = frame.eof, frame.unused_data if frame.eof else b""
                if ended:                       # a file may hold several frames
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        if not ended:
            raise EOFError("the compressed data ends too early")
    else:
        stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        while piece := stream.read(BLOCK):
            yield piece


def open_parquet(path):
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)}); copy it again") from None


def read_rows(source, start, fields):
    file, row = open_parquet(source["path"]), 0
    try:
        for group in range(file.num_row_groups):
            table = file.metadata.row_group(group)
            if row + table.num_rows <= start:
                row += table.num_rows
                continue
            rows = max(1, min(8192, BLOCK * table.num_rows // max(1, table.total_byte_size)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=fields, use_threads=False):
                first, end = max(row, start), row + batch.num_rows
                if first < end:
                    columns = [as_bytes(batch.column(field).slice(first - row)).to_pylist() for field in fields]
                    yield {"records": list(zip(*columns)), "first": first, "next": end,
                           "read": source["size"] * end // file.metadata.num_rows}
                row = end
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source['path']}: damaged after row {row} ({first_line(error)}); copy it again") from None


def as_bytes(column):
    """Strings as bytes: one that is not UTF-8 is then a bad record, not the end of the file."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def first_line(error):
    return str(error).strip().split("\n")[0]


def documents(source, job, fields, skip_bad):
    """For each record of a job: [text], or [prompt + JOIN, response], or None where it is broken and skip_bad.
    Blank ones are passed over. Raises UserError naming file and place of a broken one where not skip_bad."""
    unit = {"txt": "", "jsonl": " line {}", "parquet": " row {}"}[source["type"]]
    for number, record in enumerate(job["records"], job["first"]):
        if isinstance(record, bytes):
            record = record.removeprefix(b"\xef\xbb\xbf") if number == 0 else record    # Windows' mark of UTF-8
            if not record.strip():
                continue
        try:
            values = strings(source, record, fields)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                line = f" (line {record.count(10, 0, error.start) + 1})" if source["type"] == "txt" else ""
                error = f"not UTF-8, byte {error.start + 1}{line} is 0x{error.object[error.start]:02x}"
            elif isinstance(error, UnicodeEncodeError):
                error = "holds a lone surrogate, which is not text"
            if not skip_bad:
                raise UserError(f"{source['path']}{unit.format(number + 1)}: {error}; mend it, or leave out what is "
                                f"broken with --skip-bad") from None
            yield None
        else:
            if any(map(str.strip, values)):
                yield [values[0] + JOIN, values[1]] if len(values) == 2 else values


def strings(source, record, fields):
    """The fields of one record. Raises ValueError where it is broken."""
    values = [record] if source["type"] == "txt" else record
    if source["type"] == "jsonl":
        try:
            record = json.loads(record.decode())
        except json.JSONDecodeError as error:
            raise ValueError(f"broken JSON, {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise ValueError(f"got {type(record).__name__}, wanted a JSON object")
        for field in fields:
            if field not in record:
                raise ValueError(f"has no field {field!r}, {listed(record)}")
        values = [record[field] for field in fields]
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    for field, value in zip(fields, values):
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is {type(value).__name__}, wanted a string")
        value.encode()                          # a lone surrogate has no UTF-8
    return values


def sample(sources, fields, skip_bad, n_bytes):
    """Texts from the start of the sources, an equal share of n_bytes from each."""
    for source in sources:
        room = n_bytes // len(sources)
        for job in read(source, 0, fields):
            for values in filter(None, documents(source, job, fields, skip_bad)):
                if room > 0:
                    yield "".join(values)
                    room -= len("".join(values).encode())
            if room <= 0:
                break
