"""Reading sources for prepare.py: records cut into jobs for its workers, and the texts of a record.

Jobs are cut the same way on every run, and only one is in memory. Every error names the file and
the line, row, record or byte.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from text import formats

BLOCK = 1 << 20  # bytes of text per job, about
LONGEST = 64 * BLOCK  # characters of one element of a JSON array
GENERATED = 256  # records of a "generated" source per job
DAMAGED = 1 << 60  # the record to go on from, behind a shard that could not be read to its end
BOM = b"\xef\xbb\xbf"  # Windows' mark of UTF-8
BETWEEN = re.compile(r"[ \t\r\n,\[\ufeff]*")  # the elements of an array
SCANNER = json.JSONDecoder()
UNITS = {"txt": "", "jsonl": " line {}", "json": " record {}", "parquet": " row {}"}


@dataclass
class Job:
    """A stretch of a source's records, for a worker.

    `records`: bytes of a .txt, .jsonl or .json; tuples of a parquet file's values; numbers of a
    "generated" source's documents or of a token set's tokens.
    """

    records: Sequence
    first: int  # number of the first record in its source
    next: int  # the record that a restart goes on from
    read: int  # how much of the source's size lies behind it
    source: int = 0  # its number
    damage: str = ""  # with --skip-bad: why the rest of its source is left out
    error: str = ""  # damage that ends the work, met after everything that was read well


def jobs(sources, source, record, stop, skip_bad):
    """The jobs from `record` of source number `source` on, up to the source number `stop`.

    Damage to a file is a job, too: it is met after all that was read well. With skip_bad the rest
    of a damaged shard of the hub is left out instead.
    """
    for number in range(source, stop):
        here = sources[number]
        start = record if number == source else 0
        if start == DAMAGED:
            continue
        try:
            here.fetch()
            for job in read(here, start):
                job.source = number
                yield job
        except UserError as error:
            arrived = here.shard and os.path.exists(here.file)
            if not (skip_bad and arrived):
                yield Job([], 0, 0, 0, source=number, error=str(error))
                return
            yield Job([], 0, DAMAGED, here.size, source=number, damage=str(error))


def read(source, start):
    """Jobs of one source from record `start` on. Raises UserError where the file is damaged."""
    if source.kind == "txt":
        return read_whole(source, start)
    if source.kind == "jsonl":
        return read_lines(source, start)
    if source.kind == "json":
        return read_array(source, start) if holds_array(source) else read_lines(source, start)
    if source.kind == "parquet":
        return read_rows(source, start)
    step = GENERATED if source.kind == "generated" else BLOCK
    return read_numbers(source, start, step)


def read_whole(source, start):
    """A .txt file is one document."""
    if start == 0:
        yield Job([Path(source.file).read_bytes()], 0, 1, source.size)


def read_rows(source, start):
    from text import parquet  # slow to load

    for stretch in parquet.read_rows(source, start, BLOCK):
        yield Job(*stretch)


def read_numbers(source, start, step):
    for first in range(start, source.size, step):
        stop = min(source.size, first + step)
        yield Job(range(first, stop), first, stop, stop)


# --------------------------------------------------------------------------------------------------
# lines, compressed or not


class Damaged(Exception):
    """Compressed data that cannot be read any further."""


def read_lines(source, start):
    """Jobs of a file of lines; a record is a line without its end."""
    number = 0  # lines behind us
    parts = []  # of the line that is not at its end yet
    with open(source.file, "rb") as file:
        try:
            for block in blocks(source.path, file):
                parts.append(block)
                if b"\n" not in block:
                    continue
                *lines, tail = b"".join(parts).split(b"\n")
                parts = [tail]
                end = number + len(lines)
                first = max(number, start)
                if first < end:
                    yield Job(lines[first - number :], first, end, file.tell())
                number = end
        except Damaged as error:
            raise UserError(
                f"{source.path}: damaged after line {number} ({error}); copy the file again"
            ) from None
    last = b"".join(parts)  # a last line without its newline
    if last and number >= start:
        yield Job([last], number, number + 1, source.size)


def blocks(path, file):
    """The uncompressed bytes of an open file, piece by piece. Raises Damaged."""
    if path.endswith(".zst"):
        yield from zstd_blocks(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
    try:
        while piece := stream.read(BLOCK):
            yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(str(error)) from None


def zstd_blocks(file):
    """As `blocks`, of Zstandard, which may hold several frames."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    between_frames = True
    try:
        while piece := file.read(BLOCK // 8):
            while piece:
                yield frame.decompress(piece)
                between_frames = frame.eof
                piece = b""
                if between_frames:
                    piece = frame.unused_data
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from None
    if not between_frames:
        raise Damaged("the compressed data ends too early")


# --------------------------------------------------------------------------------------------------
# JSON arrays


def holds_array(source):
    with open(source.file, "rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1] == b"["


def read_array(source, start):
    """Jobs of a file that is one JSON array; a record is an element's text.

    Elements are only delimited here, the workers read them. Memory holds a block and an element.
    """
    number = 0  # elements behind us
    text = ""  # what was read and is not cut yet
    to_text = codecs.getincrementaldecoder("utf-8")()
    with open(source.file, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                text += to_text.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise damaged_array(source, number, error.reason) from None
            elements, text, unfinished = cut_elements(text)
            behind = number
            number += len(elements)
            # An element goes on in the next block, unless there is none.
            if unfinished and (not block or len(text) > LONGEST):
                raise damaged_array(source, number, unfinished)
            first = max(behind, start)
            if first < number:
                yield Job(elements[first - behind :], first, number, file.tell())
            if not unfinished:
                return


def cut_elements(text):
    """(the whole elements at the start of `text`, what is left, why the next one is not whole).

    Where the array ends the last is None.
    """
    elements = []
    at = 0
    while True:
        at = BETWEEN.match(text, at).end()
        if text.startswith("]", at):
            return elements, "", None
        try:
            _, end = SCANNER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return elements, text[at:], error.msg
        elements.append(text[at:end].encode(errors="surrogatepass"))
        at = end


def damaged_array(source, number, why):
    return UserError(f"{source.path}: damaged after record {number} ({why}); copy the file again")


# --------------------------------------------------------------------------------------------------
# the texts of a record


def documents(source, job, skip_bad):
    """For each record of a job its texts by turns (formats.py); None where it is broken.

    Blank ones are passed over. Raises UserError naming file and place of a broken one where not
    skip_bad.
    """
    for number, record in enumerate(job.records, job.first):
        if isinstance(record, bytes):
            if number == 0:
                record = record.removeprefix(BOM)
            if not record.strip():
                continue
        try:
            texts = formats.document(source.form, source.fields, values_of(source, record))
        except (ValueError, RecursionError) as error:
            if not skip_bad:
                place = source.path + UNITS[source.kind].format(number + 1)
                why = what_is_wrong(error, source)
                raise UserError(
                    f"{place}: {why}; mend it, or leave out what is broken with --skip-bad"
                ) from None
            yield None
        else:
            if any(map(str.strip, texts)):
                yield texts


def values_of(source, record):
    """The fields of one record. Raises ValueError where it is broken."""
    if source.kind == "txt":
        return [record]
    if source.kind == "parquet":
        return record
    try:
        record = json.loads(record.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON, {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, wanted a JSON object")
    for field in source.fields:
        if field not in record:
            raise ValueError(f"has no field {field!r}, {formats.listed(record)}")
    return [record[field] for field in source.fields]


def what_is_wrong(error, source):
    """An error of a record, in the user's terms."""
    if isinstance(error, UnicodeEncodeError):
        return "holds a lone surrogate, which is not text"
    if isinstance(error, UnicodeDecodeError):
        byte = f"0x{error.object[error.start]:02x}"
        line = ""
        if source.kind == "txt":
            line = f" (line {error.object.count(10, 0, error.start) + 1})"
        return f"not UTF-8, byte {error.start + 1}{line} is {byte}"
    return error


def sample(sources, skip_bad, n_bytes):
    """Texts from the start of each --source, an equal share of n_bytes from each."""
    entries = {source.entry for source in sources}
    room = dict.fromkeys(entries, n_bytes // len(entries))
    for source in sources:
        if room[source.entry] <= 0:
            continue
        source.fetch()
        for text in texts_of(source, skip_bad):
            yield text
            room[source.entry] -= len(text.encode())
            if room[source.entry] <= 0:
                break


def texts_of(source, skip_bad):
    """The text of every document of a source that is whole."""
    for job in read(source, 0):
        for texts in documents(source, job, skip_bad):
            if texts is not None:
                yield "".join(texts)
