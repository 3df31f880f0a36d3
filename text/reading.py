"""Reading text for prepare.py: files, shards of the hub and token sets, cut into jobs for its workers.

A source is a dict: type ("txt", "jsonl", "json", "parquet", "set" or "demo"), path, size (bytes; tokens of a set; pages
of the demo), entry (which --source it belongs to: a hub's has many shards), form and fields (formats.py). A job is a
dict: source (its number), records (what is to be tokenised), first (the number of the first record in its source), next
(where a restart goes on) and read (how much of the source's size lies behind it). Jobs are cut the same way on every
run, and only one is in memory. Every error names the file and the line, row or byte.
"""

import codecs
import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from common.errors import UserError
from data import TokenSet
from text import formats, hub_datasets

BLOCK = 1 << 20  # bytes of text per job, about
DAMAGED = 1 << 60  # the record to go on from, behind a shard that could not be read to its end
ENDINGS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".json": "json",
}  # an array of objects, or lines after all
SHARDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

open_set = cache(TokenSet)


def find(names, form, fields, skip_bad, out):
    """The sources of --source. `form` and `fields`: as the flags say, or None: by the names of the first record's fields.
    Raises UserError for whatever can be seen to be wrong without reading everything."""
    sources = []
    for entry, name in enumerate(names):
        if name == "demo":
            raise UserError(
                "--source demo: goes alone; to mix its token sets, name data/demo/corpus and so on"
            )
        found = on_the_hub(name, out) if name.startswith("hf:") else [here(name, skip_bad)]
        if found[0]["type"] == "set":
            sources.append({**found[0], "entry": entry})
            continue
        taken = (
            (form, fields) if form else found[0].get("noted") or known_format(name, found[0], out)
        )
        if found[0]["type"] == "parquet" and "repo" not in found[0]:
            columns = open_parquet(found[0]).schema_arrow.names
            for field in taken[1]:
                if field not in columns:
                    raise UserError(f"--source {name}: has no field {field!r}, {listed(columns)}")
        for source in found:
            source.pop("noted", None)
            sources.append({**source, "entry": entry, "form": taken[0], "fields": taken[1]})
    return sources


def ending_of(name):
    return max((e for e in ENDINGS if name.endswith(e)), key=len, default=None)


def here(name, skip_bad):
    """The source of a local file or token set."""
    path, ending = Path(name), ending_of(name)
    if not path.exists():
        raise UserError(f"--source {name}: does not exist")
    if path.is_dir():
        if not (path / "meta.json").exists():
            raise UserError(
                f"--source {name}: is a folder without meta.json, so not a finished token set; "
                f"name files or token sets"
            )
        return {"type": "set", "path": name, "size": open_set(name).count}
    if ending is None:
        raise UserError(
            f"--source {name}: got the ending {path.suffix!r}, wanted one of {', '.join(ENDINGS)}"
        )
    if path.stat().st_size == 0 and not skip_bad:
        raise UserError(f"--source {name}: the file is empty")
    return {"type": ENDINGS[ending], "path": name, "size": path.stat().st_size}


def on_the_hub(name, out):
    """A source for each shard; "noted" is the format, where an earlier run saw it."""
    repo = hub_datasets.parse(name)["repo"]
    found = hub_datasets.listing(name, out, SHARDS, ".json")
    sources = [
        {
            "type": ENDINGS[ending_of(file)],
            "path": f"hf:{repo}@{found['commit'][:12]}/{file}",
            "size": max(1, size),
            "repo": repo,
            "commit": found["commit"],
            "file": file,
            "folder": str(Path(out) / hub_datasets.FOLDER),
        }
        for file, size in found["files"]
    ]
    sources[0]["noted"] = found.get("format")
    return sources


def known_format(name, source, out):
    """(form, fields) by the names of the first record's fields; what was found is shown. Nothing known: field text."""
    form, fields = "text", ["text"]
    if "repo" in source:
        hub_datasets.fetch(source)
    record = first_record(source)
    if record and (guess := formats.guess(record)):
        form, fields = guess
    if record and ("repo" in source or fields != ["text"]):
        try:
            text = "".join(formats.document(form, fields, [record[field] for field in fields]))
        except (KeyError, ValueError):
            text = "(not readable so)"
        print(
            f"{name}: fields {', '.join(map(repr, record))}; taken as {form} from {', '.join(map(repr, fields))}, "
            f"the first document:\n    "
            + text[:400].replace("\n", "\n    ")
            + " ..." * (len(text) > 400)
        )
    if record and "repo" in source:
        hub_datasets.note(name, out, format=[form, fields])
    return form, fields


def first_record(source):
    """The first record as a dict; None where there is none, or it cannot be read (reading will say it better)."""
    try:
        if source["type"] == "parquet":
            return next(
                (batch.to_pylist()[0] for batch in open_parquet(source).iter_batches(1)), None
            )
        if source["type"] == "txt":
            return None
        for job in read(source, 0):
            for line in job["records"]:
                if line.strip():
                    record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
                    return record if isinstance(record, dict) else None
    except (UserError, ValueError, RecursionError, pyarrow.ArrowException):
        pass
    return None


def listed(fields):
    return f"its fields are {', '.join(map(repr, fields)) or 'none'}; name one with --text-field or --prompt-field"


def jobs(sources, state, stop, skip_bad):
    """Jobs of the sources before number `stop`, from record state["record"] of source state["source"] on. Damage to a
    file is a job, too ({"error": line}): it is met after everything that was read well. With skip_bad the rest of a
    damaged shard of the hub is left out instead, and counted."""
    for number in range(state["source"], stop):
        source = sources[number]
        start = state["record"] if number == state["source"] else 0
        if start == DAMAGED:
            continue
        try:
            if "repo" in source:
                hub_datasets.fetch(source)
            for job in read(source, start):
                yield {"source": number, **job}
        except UserError as error:
            if not (skip_bad and "repo" in source and Path(file_of(source)).exists()):
                yield {"error": str(error)}
                return
            yield {
                "source": number,
                "records": [],
                "first": 0,
                "next": DAMAGED,
                "read": source["size"],
                "damage": str(error),
            }


def file_of(source):
    """Where a source's file lies here; messages name source["path"]."""
    return str(Path(source["folder"]) / source["file"]) if "repo" in source else source["path"]


def read(source, start):
    """Jobs of one source from record `start` on."""
    if source["type"] == "txt" and start == 0:
        yield {
            "records": [Path(source["path"]).read_bytes()],
            "first": 0,
            "next": 1,
            "read": source["size"],
        }
    elif source["type"] == "jsonl":
        yield from read_lines(source, start)
    elif source["type"] == "json":
        with open(file_of(source), "rb") as file:
            array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        yield from (read_array if array else read_lines)(source, start)
    elif source["type"] == "parquet":
        yield from read_rows(source, start)
    elif source["type"] in (
        "demo",
        "set",
    ):  # the records are numbers: of pages to write, of tokens to copy
        step = 256 if source["type"] == "demo" else BLOCK
        for first in range(start, source["size"], step):
            stop = min(source["size"], first + step)
            yield {"records": range(first, stop), "first": first, "next": stop, "read": stop}


def read_lines(source, start):
    path, number, parts = source["path"], 0, []
    with open(file_of(source), "rb") as file:
        try:
            for block in blocks(path, file):
                parts.append(block)
                if b"\n" in block:
                    *lines, tail = b"".join(parts).split(b"\n")
                    first, end, parts = max(number, start), number + len(lines), [tail]
                    if first < end:
                        yield {
                            "records": lines[first - number :],
                            "first": first,
                            "next": end,
                            "read": file.tell(),
                        }
                    number = end
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(
                f"{path}: damaged after line {number} ({error}); copy the file again"
            ) from None
    if b"".join(parts) and number >= start:  # a last line without its newline
        yield {
            "records": [b"".join(parts)],
            "first": number,
            "next": number + 1,
            "read": source["size"],
        }


def read_array(source, start):
    """Jobs of a file that is one JSON array; a record is an element's text. Memory holds a block and an element."""
    path, decoder, scan = (
        source["path"],
        codecs.getincrementaldecoder("utf-8")(),
        json.JSONDecoder().raw_decode,
    )
    with open(file_of(source), "rb") as file:
        text, at, number, lines, ended = "", 0, 0, [], False
        try:
            while not ended:
                block = file.read(BLOCK)
                text, at = text[at:] + decoder.decode(block, final=not block), 0
                while True:
                    while at < len(text) and text[at] in " \t\r\n,[\ufeff":
                        at += 1
                    if ended := text[at : at + 1] == "]":
                        break
                    try:
                        end = scan(text, at)[1]
                    except json.JSONDecodeError as error:
                        if not block or len(text) - at > 64 * BLOCK:
                            raise UserError(
                                f"{path}: damaged after record {number} ({error.msg}); copy the file again"
                            ) from None
                        break  # the rest of the element is still to be read
                    if number >= start:
                        lines.append(text[at:end].encode(errors="surrogatepass"))
                    number, at = number + 1, end
                if lines:
                    yield {
                        "records": lines,
                        "first": number - len(lines),
                        "next": number,
                        "read": file.tell(),
                    }
                    lines = []
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: damaged after record {number} ({error.reason}); copy the file again"
            ) from None


def blocks(path, file):
    """The uncompressed bytes of an open file, piece by piece. Raises EOFError where compressed data ends too early."""
    if path.endswith(".zst"):
        frame, ended = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), True
        while piece := file.read(BLOCK // 8):
            while piece:
                yield frame.decompress(piece)
                ended, piece = frame.eof, frame.unused_data if frame.eof else b""
                if ended:  # a file may hold several frames
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        if not ended:
            raise EOFError("the compressed data ends too early")
    else:
        stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        while piece := stream.read(BLOCK):
            yield piece


def open_parquet(source):
    try:
        return pyarrow.parquet.ParquetFile(file_of(source))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source['path']}: not a whole parquet file ({first_line(error)}); copy it again"
        ) from None


def read_rows(source, start):
    file, row, fields = open_parquet(source), 0, source["fields"]
    for field in fields:
        if field not in file.schema_arrow.names:
            raise UserError(
                f"{source['path']}: has no field {field!r}, {listed(file.schema_arrow.names)}"
            )
    try:
        for group in range(file.num_row_groups):
            table = file.metadata.row_group(group)
            if row + table.num_rows <= start:
                row += table.num_rows
                continue
            rows = max(1, min(8192, BLOCK * table.num_rows // max(1, table.total_byte_size)))
            for batch in file.iter_batches(
                rows, row_groups=[group], columns=fields, use_threads=False
            ):
                first, end = max(row, start), row + batch.num_rows
                if first < end:
                    columns = [
                        as_bytes(batch.column(field).slice(first - row)).to_pylist()
                        for field in fields
                    ]
                    yield {
                        "records": list(zip(*columns)),
                        "first": first,
                        "next": end,
                        "read": source["size"] * end // file.metadata.num_rows,
                    }
                row = end
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source['path']}: damaged after row {row} ({first_line(error)}); copy it again"
        ) from None


def as_bytes(column):
    """Strings as bytes: one that is not UTF-8 is then a bad record, not the end of the file."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def first_line(error):
    return str(error).strip().split("\n")[0]


def documents(source, job, skip_bad):
    """For each record of a job its texts by turns (formats.py), or None where it is broken and skip_bad.
    Blank ones are passed over. Raises UserError naming file and place of a broken one where not skip_bad."""
    unit = {"txt": "", "jsonl": " line {}", "json": " record {}", "parquet": " row {}"}[
        source["type"]
    ]
    for number, record in enumerate(job["records"], job["first"]):
        if isinstance(record, bytes):
            record = (
                record.removeprefix(b"\xef\xbb\xbf") if number == 0 else record
            )  # Windows' mark of UTF-8
            if not record.strip():
                continue
        try:
            texts = formats.document(source["form"], source["fields"], values_of(source, record))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                line = (
                    f" (line {record.count(10, 0, error.start) + 1})"
                    if source["type"] == "txt"
                    else ""
                )
                error = (
                    f"not UTF-8, byte {error.start + 1}{line} is 0x{error.object[error.start]:02x}"
                )
            elif isinstance(error, UnicodeEncodeError):
                error = "holds a lone surrogate, which is not text"
            if not skip_bad:
                raise UserError(
                    f"{source['path']}{unit.format(number + 1)}: {error}; mend it, or leave out what is "
                    f"broken with --skip-bad"
                ) from None
            yield None
        else:
            if any(map(str.strip, texts)):
                yield texts


def values_of(source, record):
    """The fields of one record. Raises ValueError where it is broken."""
    if source["type"] == "txt":
        return [record]
    if source["type"] == "parquet":
        return record
    try:
        record = json.loads(record.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON, {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, wanted a JSON object")
    for field in source["fields"]:
        if field not in record:
            raise ValueError(f"has no field {field!r}, {listed(record)}")
    return [record[field] for field in source["fields"]]


def sample(sources, skip_bad, n_bytes):
    """Texts from the start of each --source, an equal share of n_bytes from each."""
    entries = {source["entry"] for source in sources}
    rooms = dict.fromkeys(entries, n_bytes // len(entries))
    for source in sources:
        if rooms[source["entry"]] > 0:
            if "repo" in source:
                hub_datasets.fetch(source)
            for job in read(source, 0):
                for texts in filter(None, documents(source, job, skip_bad)):
                    if rooms[source["entry"]] > 0:
                        yield "".join(texts)
                        rooms[source["entry"]] -= len("".join(texts).encode())
                if rooms[source["entry"]] <= 0:
                    break
