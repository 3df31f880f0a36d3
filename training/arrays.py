"""Arrays of one's own with a value for each token of a token set (`--stored NAME=FILE`).

    from slm_kit.data import TokenSet
    from slm_kit.training import arrays

    data = TokenSet("data/corpus")
    arrays.save("quality.bin", values, data)        # values[i] belongs to token i, len(data.tokens)
    arrays.save_by_document("quality.bin", values, data)    # values[i] belongs to document i

A flat file, and beside it a note that names the token set and the file's checksums.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np

from common.checksums import Checked, Checksums
from common.errors import UserError
from common.files import write_atomic
from common.json_files import regular_size
from common.records import at_least, one_of, read_record
from data import Stored, entropy_path
from training.documents import Documents

DTYPES = ("<f2", "<f4", "|u1", "<i4", "<i8")
FORMAT = 1


@dataclasses.dataclass
class Note:
    """NAME.json beside NAME.bin."""

    format: Annotated[int, one_of(FORMAT)]
    data: str  # the token set's hash
    count: Annotated[int, at_least(0)]
    dtype: Annotated[str, one_of(*DTYPES)]
    checksums: list[int]


def save(path, values, token_set):
    """Write one value for each token of a token set: NAME.bin, and NAME.json beside it.

    Raises UserError for what cannot be read, and in the place of another kind of file.
    """
    path = Path(path)
    if path.suffix != ".bin" or is_score_py_s(path):
        raise UserError(
            f"{path}: got a name of something else, wanted one that ends in .bin, beside which no "
            f"stored losses lie"
        )
    values = np.ascontiguousarray(values)
    if values.dtype == np.float64:
        values = values.astype("<f4")
    if values.shape != (token_set.count,) or values.dtype.str not in DTYPES:
        raise UserError(
            f"{path}: got an array of shape {values.shape} and type {values.dtype}, wanted "
            f"({token_set.count},) and one of {', '.join(DTYPES)}"
        )
    content = values.tobytes()
    checksums = Checksums()
    checksums.add(content)
    write_atomic(path, content)
    note = Note(FORMAT, token_set.hash, token_set.count, values.dtype.str, checksums.all())
    write_atomic(path.with_suffix(".json"), json.dumps(dataclasses.asdict(note), indent=1))


def save_by_document(path, values, token_set):
    """The same with one value for each document, in their order; `save` for what they become.

    Raises UserError where there are not as many values as documents.
    """
    documents = Documents(token_set)
    values = np.asarray(values)
    if values.shape != (documents.count,):
        raise UserError(
            f"{path}: got an array of shape {values.shape}, wanted ({documents.count},), a value "
            f"for each document of {token_set.folder}; blank records and those that were left out "
            f"or held out are none of them"
        )
    save(path, documents.spread(values), token_set)


class Array:
    """A file that `save` wrote, checked as stored losses are. Raises UserError."""

    def __init__(self, name, path, token_set, seq_len):
        self.path = Path(path)
        self.set = token_set
        self.seq_len = seq_len
        self.what = f"--stored {name}"
        again = "write it again with arrays.save of training/arrays.py"
        size = regular_size(self.path, self.what, again)
        note = read_record(self.path.with_suffix(".json"), Note, self.what, again)
        wanted = token_set.count * np.dtype(note.dtype).itemsize
        for thing, got, right in (
            ("values of token set", note.data, token_set.hash),
            ("a size in bytes of", size, wanted),
        ):
            if got != right:
                raise UserError(
                    f"{self.what}: {path} has {thing} {got}, this run has {right}; {again}"
                )
        self.checked = Checked(self.path, note.checksums, again)
        self.values = np.memmap(self.path, note.dtype, "r")
        said = json.dumps([note.dtype, note.checksums])
        self.hash = hashlib.sha256(said.encode()).hexdigest()

    def batch(self, windows, valid):
        """The windows' values (B, T): fp32, or int64 of whole numbers; 0 where not valid."""
        size = self.values.dtype.itemsize
        for window in windows:
            first = size * (int(window) * self.seq_len + 1)
            self.checked.check(first, min(self.values.nbytes, first + size * self.seq_len))
        out = self.set.cut(self.values, windows, self.seq_len, fill=0)
        out = np.where(valid, out, 0)
        if not np.isfinite(out).all():
            raise UserError(f"{self.what}: {self.path} has values that are not finite in use")
        whole = out.dtype.kind in "iu"
        return out.astype(np.int64 if whole else np.float32)


def made_with(meta):
    """What a run's identity says of stored losses: their model, and its context if it was short."""
    context = meta["context"]
    return f"{meta['reference']}, context {context}" if context else meta["reference"]


def is_score_py_s(path):
    """Does the note beside `path` tell of losses that score.py stored?"""
    if Path(path).is_dir():
        return False
    note = Path(path).with_suffix(".json")
    return note.exists() and '"reference"' in note.read_text(errors="replace")[:100_000]


def is_array(path):
    """Does the note beside `path` tell of an array that `save` wrote?"""
    note = Path(path).with_suffix(".json")
    if Path(path).is_dir() or not note.is_file() or is_score_py_s(path):
        return False
    return '"checksums"' in note.read_text(errors="replace")[:100_000]


def losses_of(path):
    """The file of losses that a file of entropies lies beside; None where it is none of these."""
    path = Path(path)
    names = path.name.replace("ref_entropy", "ref_loss"), path.name.replace(".entropy.", ".")
    for name in names:
        losses = path.with_name(name)
        if entropy_path(losses).name == path.name and is_score_py_s(losses):
            return losses
    return None


def opened(name, path, token_set, seq_len, now):
    """A file of `save` or of score.py, its entropies too: (what has `batch`, its hash).

    `now`: how the student computes (common/numerics.py), which has to be the way of stored losses.
    """
    if is_score_py_s(path):
        stored = Stored(path, token_set, seq_len, numerics=now)
        return stored, made_with(stored.meta)
    if losses := losses_of(path):
        stored = Stored(losses, token_set, seq_len, entropy=True, numerics=now)
        return stored, f"entropies of {made_with(stored.meta)}"
    array = Array(name, path, token_set, seq_len)
    return array, array.hash
