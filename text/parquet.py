"""Parquet files for reading.py: rows cut into jobs, every damage with its file and row."""

import pyarrow
import pyarrow.parquet

from common.errors import UserError
from text import formats

ROWS = 8192  # of a job, at most


def open_file(source):
    """The source's ParquetFile. Raises UserError where it is not one, or was cut."""
    try:
        return pyarrow.parquet.ParquetFile(source.file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source.path}: not a whole parquet file ({first_line(error)}); copy it again"
        ) from None


def first_record(source):
    """The first row as a dict; None where there is none, or it cannot be read."""
    try:
        for batch in open_file(source).iter_batches(1):
            return batch.to_pylist()[0]
    except pyarrow.ArrowException:
        pass
    return None


def read_rows(source, start, block):
    """Yields (records, number of the first, number of the next, bytes read) from row `start` on.

    A record is a tuple of the fields' values; about `block` bytes are read at a time.
    """
    file = open_file(source)
    columns = file.schema_arrow.names
    for field in source.fields:
        if field not in columns:
            raise UserError(f"{source.path}: has no field {field!r}, {formats.listed(columns)}")
    row = 0
    try:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if row + n_rows <= start:
                row += n_rows
                continue
            for batch in batches(file, group, source.fields, block):
                end = row + batch.num_rows
                first = max(row, start)
                if first < end:
                    records = rows_of(batch.slice(first - row), source.fields)
                    read = source.size * end // file.metadata.num_rows
                    yield records, first, end, read
                row = end
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source.path}: damaged after row {row} ({first_line(error)}); copy it again"
        ) from None


def batches(file, group, fields, block):
    """The rows of a row group, about `block` bytes at a time."""
    about = file.metadata.row_group(group)
    rows = block * about.num_rows // max(1, about.total_byte_size)
    rows = max(1, min(ROWS, rows))
    return file.iter_batches(rows, row_groups=[group], columns=fields, use_threads=False)


def rows_of(batch, fields):
    columns = [as_bytes(batch.column(field)).to_pylist() for field in fields]
    return list(zip(*columns))


def as_bytes(column):
    """Strings as bytes: one that is not UTF-8 is then a bad record, not the end of the file."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def first_line(error):
    return str(error).strip().split("\n")[0]
