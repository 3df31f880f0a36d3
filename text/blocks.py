"""The bytes of a source's file, unpacked: blocks of one size, whatever the file claims to hold.

Memory holds a block or two and what the compression needs to look back on (zstd's window).
"""

import gzip
import zlib

READ = 1 << 16  # bytes of a compressed file that are read at a time
# Of these so many are unpacked at a time. Zstandard's smallest block has 4 bytes and unpacks to
# 128 KiB, so a piece never unpacks to more than 16 MiB.
PIECE = 1 << 9
WINDOW = 1 << 27  # bytes that Zstandard may look back on: 128 MiB, what `zstd --long` asks for


class Damaged(Exception):
    """A file that cannot be read any further. `mend`: what its user can do."""

    def __init__(self, reason, mend="copy the file again"):
        super().__init__(reason)
        self.mend = mend


def blocks(name, file, size, longest):
    """The unpacked bytes of an open file, `size` of them at a time. Raises Damaged.

    `name`: its ending says how it is packed. `longest`: bytes of the longest record that is
    wanted; so much may be looked back on, if it is more than WINDOW.
    """
    if name.endswith(".zst"):
        yield from of_one_size(zstd_pieces(file, max(WINDOW, longest)), size)
    elif name.endswith(".gz"):
        yield from of_one_size(gzip_pieces(file), size)
    else:
        while block := file.read(size):
            yield block


def of_one_size(pieces, size):
    """The same bytes, cut anew: `size` at a time. What comes before damage is not lost."""
    waiting = []
    n_waiting = 0
    damage = None
    try:
        for piece in pieces:
            waiting.append(piece)
            n_waiting += len(piece)
            if n_waiting < size:
                continue
            joined = memoryview(b"".join(waiting))
            whole = n_waiting - n_waiting % size
            for start in range(0, whole, size):
                yield bytes(joined[start : start + size])
            waiting = [bytes(joined[whole:])]
            n_waiting -= whole
    except Damaged as error:
        damage = error
    if n_waiting:
        yield b"".join(waiting)
    if damage:
        raise damage


def small_pieces(file):
    while read := file.read(READ):
        for start in range(0, len(read), PIECE):
            yield read[start : start + PIECE]


def gzip_pieces(file):
    """The unpacked bytes of gzip, of one member or several. Raises Damaged."""
    stream = gzip.GzipFile(fileobj=file)
    try:
        while piece := stream.read1(READ):
            yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(str(error)) from None


def zstd_pieces(file, window):
    """The unpacked bytes of Zstandard, which may hold several frames. Raises Damaged."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    frame = decompressor.decompressobj()
    between_frames = True
    try:
        for piece in small_pieces(file):
            while piece:
                yield frame.decompress(piece)
                between_frames = frame.eof
                piece = b""
                if between_frames:
                    piece = frame.unused_data
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise unreadable(error, window) from None
    if not between_frames:
        raise Damaged("the compressed data ends too early")


def unreadable(error, window):
    """What Zstandard's error means."""
    if "too much memory" in str(error):
        return Damaged(
            f"its compression looks back on more than {window:,} bytes",
            "pack it again without --long, or raise --max-document-bytes to its window",
        )
    if "Dictionary mismatch" in str(error):
        return Damaged(
            "it was packed with a dictionary that is not in it", "pack it again without one"
        )
    return Damaged(str(error))
