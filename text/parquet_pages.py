"""How large are the pages of a parquet file? pyarrow unpacks each one whole and does not say.

Page headers are structs of Thrift's compact protocol
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from typing import NamedTuple

TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
TYPE, UNPACKED, PACKED, DATA, DICTIONARY, DATA_V2 = 1, 2, 3, 5, 7, 8  # fields of a page header
DICTIONARY_PAGE = 2  # a TYPE


class NotPages(Exception):
    """Where pages should be, something else is."""


class Page(NamedTuple):
    unpacked: int  # bytes
    packed: int
    values: int
    is_dictionary: bool


def pages(file, column):
    """The pages of a column chunk (pyarrow's ColumnChunkMetaData) in an open file.

    Raises NotPages where the file does not hold what its end says.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        file.seek(at)
        header = read_struct(file)
        if not all(isinstance(header.get(field), int) for field in (TYPE, UNPACKED, PACKED)):
            raise NotPages("a page has no header")
        about = header.get(DATA) or header.get(DATA_V2) or header.get(DICTIONARY) or {}
        packed = header[PACKED]
        if packed < 0 or header[UNPACKED] < 0:
            raise NotPages("a page has a size below 0")
        values = about.get(1, 0)
        yield Page(header[UNPACKED], packed, values, header[TYPE] == DICTIONARY_PAGE)
        at = file.tell() + packed


def read_struct(file, depth=0):
    """{number of a field: its value}; what is no number or struct is stepped over."""
    fields = {}
    number = 0
    while head := read_byte(file):
        delta, kind = head >> 4, head & 15
        number = number + delta if delta else zigzag(read_varint(file))
        fields[number] = read_value(file, kind, depth)
    return fields


def read_value(file, kind, depth):
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind in (INT16, INT32, INT64):
        return zigzag(read_varint(file))
    if kind == STRUCT and depth < 4:
        return read_struct(file, depth + 1)
    if kind == BINARY:
        file.seek(read_varint(file), 1)
        return None
    if kind in (BYTE, DOUBLE):
        file.seek(1 if kind == BYTE else 8, 1)
        return None
    raise NotPages(f"a page header has a field of type {kind}")


def read_byte(file):
    byte = file.read(1)
    if not byte:
        raise NotPages("a page header is cut off")
    return byte[0]


def read_varint(file):
    value = 0
    for shift in range(0, 70, 7):
        byte = read_byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise NotPages("a page header holds a number of more than 64 bits")


def zigzag(value):
    """Signed, of the unsigned number that stands for it."""
    return (value >> 1) ^ -(value & 1)
