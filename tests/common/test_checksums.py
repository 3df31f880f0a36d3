"""Checksums of blocks: made in pieces, continued, and checked where they are read."""

import zlib

import numpy as np
import pytest

from common.checksums import BLOCK, SAMPLED, Checked, Checksums
from common.errors import UserError

N_BLOCKS = 2 * SAMPLED


@pytest.fixture(scope="module")
def content():
    size = N_BLOCKS * BLOCK - 1234
    return np.random.RandomState(0).randint(0, 256, size, np.uint8).tobytes()


def test_in_pieces_and_continued_they_are_zlib_s_of_each_block(content, tmp_path):
    content = content[: 5 * BLOCK - 77]
    (tmp_path / "file").write_bytes(content)
    wanted = [zlib.crc32(content[i : i + BLOCK]) for i in range(0, len(content), BLOCK)]
    for sizes in ([len(content)], [1, BLOCK, 3 * BLOCK + 5], [BLOCK, BLOCK]):
        checksums = Checksums()
        at = 0
        for size in [*sizes, len(content)]:
            checksums.add(content[at : at + size])
            at = min(len(content), at + size)
        assert checksums.all() == wanted
    for stopped in (0, 10, BLOCK, 2 * BLOCK + 3):
        first = Checksums()
        first.add(content[:stopped])
        again = Checksums(tmp_path / "file", stopped, first.all())
        again.add(content[stopped:])
        assert again.all() == wanted


def test_a_changed_byte_is_found_where_it_is_read(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    checksums = Checksums(path, len(content)).all()
    Checked(path, checksums, "mend it").check(0, len(content))
    left = Checked(path, checksums, "mend it").left
    block = sorted(left)[3]
    changed = bytearray(content)
    changed[block * BLOCK + 5] ^= 1
    path.write_bytes(changed)
    checked = Checked(path, checksums, "mend it")  # those that it looks at first are right
    checked.check(0, block * BLOCK)
    checked.check((block + 1) * BLOCK, len(content))
    with pytest.raises(UserError, match=f"block {block} .* mend it"):
        checked.check((block + 1) * BLOCK - 1, (block + 1) * BLOCK)


def test_permuted_zeroed_or_cut_is_found_when_it_is_opened(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    checksums = Checksums(path, len(content)).all()
    for wrong in (content[BLOCK:] + content[:BLOCK], bytes(len(content)), content[: 2 * BLOCK]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="mend it"):
            Checked(path, checksums, "mend it")
