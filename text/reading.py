"""Reading sources for prepare.py: records cut into jobs for its workers, and the texts of a record.

Jobs are cut the same way on every run, and only one is in memory. Every error names the file and
the line, row, record or byte.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from text import formats
from text.blocks import Damaged, blocks
from text.cutting import Array, Lines

BLOCK = 1 << 20  # bytes of text per job, about
GENERATED = 256  # records of a "generated" source per job
DAMAGED = 1 << 60  # the record to go on from, behind a shard that could not be read to its end
BOM = b"\xef\xbb\xbf"  # Windows' mark of UTF-8
UNITS = {"txt": "", "jsonl": " line {}", "json": " record {}", "parquet": " row {}"}


@dataclass
class Job:
    """A stretch of a source's records, for a worker.

    `records`: bytes of a .txt, .jsonl or .json; tuples of a parquet file's values; None in place of
    one that is too long; numbers of a "generated" source's documents or of a token set's tokens.
    """

    records: Sequence
    first: int  # number of the first record in its source
    next: int  # the record that a restart goes on from
    read: int  # how much of the source's size lies behind it
    n_bytes: int = 0  # of its records
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
            here.begin()
            for job in read_well(here, start):
                job.source = number
                yield job
            here.end()
        except UserError as error:
            arrived = here.shard and os.path.exists(here.file)
            if not (skip_bad and arrived):
                yield Job([], 0, 0, 0, source=number, error=str(error))
                return
            yield Job([], 0, DAMAGED, here.size, source=number, damage=str(error))


def read_well(source, start):
    """As `read`; also what the system says, and a lack of memory, are UserErrors."""
    try:
        yield from read(source, start)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{source.path}: cannot be read ({reason})") from None
    except MemoryError:
        raise UserError(
            f"{source.path}: there is not enough memory to read it; lower --workers or "
            f"--max-document-bytes"
        ) from None


def read(source, start):
    """Jobs of one source from record `start` on. Raises UserError where the file is damaged."""
    if source.kind == "txt":
        return read_whole(source, start)
    if source.kind == "jsonl":
        return read_cut(source, start, Lines(source.longest))
    if source.kind == "json":
        kind = Array if holds_array(source) else Lines
        return read_cut(source, start, kind(source.longest))
    if source.kind == "parquet":
        return read_rows(source, start)
    step = GENERATED if source.kind == "generated" else BLOCK
    return read_numbers(source, start, step)


def read_whole(source, start):
    """A .txt file is one document. None stands for one that is too long."""
    if start > 0:
        return
    record = None
    if source.size <= source.longest:
        with source.open() as file:
            record = file.read(source.longest + 1)
    yield Job([record], 0, 1, source.size, len(record or b""))


def read_rows(source, start):
    from text import parquet  # slow to load

    for stretch in parquet.read_rows(source, start, BLOCK):
        yield Job(*stretch)


def read_numbers(source, start, step):
    for first in range(start, source.size, step):
        stop = min(source.size, first + step)
        yield Job(range(first, stop), first, stop, stop)


# --------------------------------------------------------------------------------------------------
# lines and arrays, compressed or not


def read_cut(source, start, cutting):
    """Jobs of a file that `cutting` (Lines or an Array) cuts into records."""
    number = 0  # records behind us
    try:
        with source.open() as file:
            for block in blocks(source.path, file, BLOCK, source.longest):
                records = cutting.cut(block)
                yield from job_of(records, number, start, file.tell())
                number += len(records)
                if cutting.damage:
                    break
            else:
                yield from job_of(cutting.last(), number, start, source.size)
        if cutting.damage:
            raise Damaged(cutting.damage)
    except Damaged as error:
        unit = UNITS[source.kind].split()[0]
        raise UserError(
            f"{source.path}: damaged after {unit} {number} ({error}); {error.mend}"
        ) from None


def job_of(records, number, start, read):
    """The job of the records from `number` on, without those before `start`; none without any."""
    first = max(number, start)
    end = number + len(records)
    if first < end:
        records = records[first - number :]
        yield Job(records, first, end, read, sum(len(record or b"") for record in records))


def holds_array(source):
    with open(source.file, "rb") as file:
        try:
            start = next(blocks(source.path, file, 4096, source.longest), b"")
        except Damaged:
            return False  # said where its lines are read
    return start.removeprefix(BOM).lstrip()[:1] == b"["


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
            if record is None:
                raise ValueError(too_long(source))
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


def too_long(source):
    return (
        f"is longer than {source.longest:,} bytes; if this is one document, raise "
        f"--max-document-bytes"
    )


def what_is_wrong(error, source):
    """An error of a record, in the user's terms."""
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    if "integer string conversion" in str(error):
        return "holds a whole number of thousands of digits"
    if isinstance(error, UnicodeEncodeError):
        return "holds a lone surrogate, which is not text"
    if isinstance(error, UnicodeDecodeError):
        byte = f"0x{error.object[error.start]:02x}"
        line = ""
        if source.kind == "txt":
            line = f" (line {error.object.count(10, 0, error.start) + 1})"
        return f"not UTF-8, byte {error.start + 1}{line} is {byte}"
    return error


def sample(sources, skip_bad, n_bytes, wanted):
    """Texts from the start of each --source, an equal share of n_bytes from each.

    Those of which `wanted(text)` is true. With skip_bad the rest of a damaged shard of the hub is
    left out.
    """
    entries = {source.entry for source in sources}
    room = dict.fromkeys(entries, n_bytes // len(entries))
    for source in sources:
        if room[source.entry] <= 0:
            continue
        source.fetch()
        texts = texts_of(source, skip_bad)
        try:
            for text in filter(wanted, texts):
                yield text
                room[source.entry] -= len(text.encode())
                if room[source.entry] <= 0:
                    break
        except UserError:
            if not (skip_bad and source.shard):
                raise


def texts_of(source, skip_bad):
    """The text of every document of a source that is whole."""
    for job in read(source, 0):
        for texts in documents(source, job, skip_bad):
            if texts is not None:
                yield "".join(texts)
