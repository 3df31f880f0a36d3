"""Parquet files for reading.py: rows cut into jobs, every damage with its file and row."""

from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from common.errors import UserError
from text import formats, parquet_pages

ROWS = 8192  # of a job, at most
BUFFER = 1 << 16  # bytes of a packed column that are read at a time


def open_file(source, **options):
    """The source's ParquetFile, which reads a column bit by bit.

    Raises UserError where it is not one, or was cut.
    """
    try:
        return pyarrow.parquet.ParquetFile(source.file, buffer_size=BUFFER, **options)
    # UnicodeDecodeError: a column's name is damaged.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source.path}: not a whole parquet file ({first_line(error)}); copy it again"
        ) from None


def first_record(source):
    """The first row as a dict; None where there is none. Of a known format its fields are read."""
    names = open_file(source).schema_arrow.names
    _, fields = formats.guess(names) or (None, [])
    record = dict.fromkeys(names)
    if not fields:
        return record
    for rows, *_ in read_rows(replace(source, fields=fields), 0, block=1):
        return record | dict(zip(fields, rows[0] or ()))
    return None


def read_rows(source, start, block):
    """Yields (records, number of the first, number of the next, bytes read, bytes of the records).

    From row `start` on. A record is a tuple of the fields' values, None where it is longer than
    source.longest; about `block` bytes are read at a time.
    """
    file = open_file(source)
    columns = file.schema_arrow.names
    for field in source.fields:
        if field not in columns:
            raise UserError(f"{source.path}: has no field {field!r}, {formats.listed(columns)}")
    records = []
    n_bytes = 0
    end = start
    damage = None
    n_rows = max(1, file.metadata.num_rows)
    try:
        for more, end, size, enough in stretches(source, file, start, block):
            records += more
            n_bytes += size
            if n_bytes >= block or len(records) >= enough:
                yield records, end - len(records), end, source.size * end // n_rows, n_bytes
                records = []
                n_bytes = 0
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        damage = first_line(error)
    if records:
        yield records, end - len(records), end, source.size * end // n_rows, n_bytes
    if damage:
        raise UserError(f"{source.path}: damaged after row {end} ({damage}); copy it again")


def stretches(source, file, start, block):
    """Yields (records, number of the next, bytes of the records, rows of a job), bit by bit."""
    row = 0
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if row + n_rows <= start:
            row += n_rows
            continue
        rows = rows_of_job(file, group, block)
        for batch in batches(source, file, group, rows):
            for part in parts(batch, block):
                end = row + part.num_rows
                first = max(row, start)
                if first < end:
                    yield rows_of(part.slice(first - row), source), end, part.nbytes, rows
                row = end


def rows_of_job(file, group, block):
    """How many rows of a row group make about `block` bytes."""
    about = file.metadata.row_group(group)
    return max(1, min(ROWS, block * about.num_rows // max(1, about.total_byte_size)))


def batches(source, file, group, rows):
    """The rows of a row group, `rows` at a time or fewer."""
    widest, dictionary = sizes_in(source, file, group)
    rows = max(1, min(rows, source.longest // max(1, widest)))
    fitting = source.longest // max(1, dictionary)
    # One long value of the dictionary may stand in every row. So few rows are read at a time; where
    # that were too few, the values are not repeated here.
    if fitting < rows <= 64 * fitting:
        rows = fitting
    elif fitting < rows:
        file = open_file(source, read_dictionary=source.fields)
    if nested(file, source.fields):
        rows = max(1, min(rows, source.longest // max(1, dictionary)))
    return file.iter_batches(rows, row_groups=[group], columns=source.fields, use_threads=False)


def sizes_in(source, file, group):
    """(bytes of a row in the page with the longest ones, bytes of the largest dictionary).

    Raises UserError for a page that memory has no room for. Where the pages cannot be looked at
    pyarrow will say why.
    """
    about = file.metadata.row_group(group)
    widest = dictionary = 0
    with open(source.file, "rb") as opened:
        for number in range(about.num_columns):
            column = about.column(number)
            if column.path_in_schema.split(".")[0] not in source.fields:
                continue
            try:
                for page in parquet_pages.pages(opened, column):
                    check_page(source, group, page)
                    if page.is_dictionary:
                        dictionary = max(dictionary, page.unpacked)
                    else:
                        rows = page.values * about.num_rows // max(1, column.num_values)
                        widest = max(widest, page.unpacked // max(1, rows))
            except parquet_pages.NotPages:
                continue
    return widest, dictionary


def check_page(source, group, page):
    """Raises UserError for a page that would fill the memory.

    Long documents make long pages, for pyarrow writes 1,024 at a time. But text is not packed
    a hundredfold.
    """
    bomb = page.unpacked > source.longest and page.unpacked > 100 * page.packed
    if bomb or page.unpacked > 8 * source.longest or page.values > source.longest:
        raise UserError(
            f"{source.path}: row group {group + 1} has a page of {page.unpacked:,} bytes and "
            f"{page.values:,} values, packed into {page.packed:,} bytes, too large for "
            f"--max-document-bytes {source.longest}; raise that, or write the file again with "
            f"smaller pages"
        )


def nested(file, fields):
    return any(pyarrow.types.is_nested(file.schema_arrow.field(field).type) for field in fields)


def parts(batch, block):
    """The batch, cut where its values, repeated as often as they stand in it, exceed `block`."""
    lengths = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            of_values = pyarrow.compute.binary_length(column.dictionary)
            column = of_values.take(column.indices)
            lengths += column.fill_null(0).to_numpy(zero_copy_only=False)
    if not lengths.any():
        yield batch
        return
    start = 0
    for end in np.flatnonzero(np.diff(np.cumsum(lengths) // block, append=-1)) + 1:
        yield batch.slice(start, end - start)
        start = end


def rows_of(batch, source):
    columns = [values_of(batch.column(field)) for field in source.fields]
    if batch.nbytes <= source.longest:
        return list(zip(*columns))
    records = []
    for row, record in enumerate(zip(*columns)):
        fits = batch.slice(row, 1).nbytes <= source.longest
        records.append(record if fits else None)
    return records


def values_of(column):
    """A column's values; those of a dictionary are not copied."""
    if not pyarrow.types.is_dictionary(column.type):
        return as_bytes(column).to_pylist()
    values = as_bytes(column.dictionary).to_pylist()
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


def as_bytes(column):
    """Strings as bytes: one that is not UTF-8 is then a bad record, not the end of the file."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def first_line(error):
    return str(error).strip().split("\n")[0]
