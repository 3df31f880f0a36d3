"""Arrays that are mapped into memory from a file."""

import mmap
import os

import numpy as np

from common.errors import UserError


def forget(array):
    """Take the pages of a memory map out of this process, so that it does not grow with reading.

    They stay in the system's cache. Does nothing with other arrays.
    """
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)


def refuse_cut(array):
    """Raises UserError where a mapped file has become shorter: to read on would be a bus error."""
    if isinstance(array, np.memmap) and os.stat(array.filename).st_size < array.nbytes:
        raise UserError(
            f"{array.filename}: was cut while it was in use; bring the whole file back, then the "
            f"same command goes on"
        )
