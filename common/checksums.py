"""Checksums of large files: of the whole, and one for each block.

Those of blocks are made as a file grows, and checked where it is read.
"""

import hashlib
import os
import re
import zlib

from common.errors import UserError

BLOCK = 1 << 19  # bytes of a block
SAMPLED = 16  # blocks that are checked when a file is opened


def file_hash(path, sampled=False):
    """sha256 of a file's bytes.

    `sampled`: of 64 blocks of 4 KiB spread over it, for a check that costs nothing.
    """
    digest = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        if sampled:
            digest.update(str(size).encode())
            for i in range(64):
                file.seek(max(0, size - 4096) * i // 63)
                digest.update(file.read(4096))
        else:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def short(text):
    """A text with the beginnings of the hashes in it."""
    return re.sub(r"[0-9a-f]{13,}", lambda found: found[0][:12], text)


def blocks_of(size):
    return -(-size // BLOCK)


class Checksums:
    """The CRC-32 of each block of a file that grows at its end."""

    def __init__(self, path=None, size=0, known=()):
        """Of the first `size` bytes of a file; those of its first blocks may be `known`."""
        self.finished = list(known[: size // BLOCK])
        self.size = len(self.finished) * BLOCK
        self.open = 0  # of the last block, which is not full
        if size > self.size:
            with open(path, "rb") as file:
                file.seek(self.size)
                while self.size < size:
                    self.add(file.read(min(BLOCK, size - self.size)))

    def add(self, content):
        """Bytes that were appended."""
        content = memoryview(content)
        while content:
            room = BLOCK - self.size % BLOCK
            piece, content = content[:room], content[room:]
            self.open = zlib.crc32(piece, self.open)
            self.size += len(piece)
            if self.size % BLOCK == 0:
                self.finished.append(self.open)
                self.open = 0

    def all(self):
        """One number for each block."""
        return self.finished + ([self.open] if self.size % BLOCK else [])


class Checked:
    """A file whose blocks are checked once, each when it is first read."""

    def __init__(self, path, checksums, mend):
        """`checksums`: a number for each block. `mend`: what the user can do, for the message.

        Some blocks, spread over the file, are checked at once. Raises UserError.
        """
        self.path = path
        self.checksums = checksums
        self.mend = mend
        self.size = os.path.getsize(path)
        n = blocks_of(self.size)
        if n != len(checksums):
            raise UserError(f"{path}: has {n} blocks, its note tells of {len(checksums)}; {mend}")
        self.left = set(range(n))
        with open(path, "rb") as file:
            for i in range(min(n, SAMPLED)):
                self._check(file, (n - 1) * i // max(1, min(n, SAMPLED) - 1))

    def check(self, start, end):
        """Bytes start..end are about to be read. Raises UserError where a block was changed."""
        if not self.left:
            return
        blocks = self.left.intersection(range(start // BLOCK, blocks_of(end)))
        if blocks:
            with open(self.path, "rb") as file:
                for block in sorted(blocks):
                    self._check(file, block)

    def _check(self, file, block):
        file.seek(block * BLOCK)
        if zlib.crc32(file.read(BLOCK)) != self.checksums[block]:
            raise UserError(
                f"{self.path}: block {block} (bytes from {block * BLOCK:,}) is not what was "
                f"written, its checksum differs; {self.mend}"
            )
        self.left.discard(block)
