"""Writing a token set (data.py), so that a kill costs little."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from common import changes, files
from common.checksums import file_hash
from common.files import write_atomic
from common.records import at_least, read_record
from data import FORMAT, TokenSet

AGAIN = "start over with --overwrite"


@dataclass
class Marked:
    """progress.json: what is safe on the disk, and what says where to go on."""

    plan: dict[str, Any] | None
    count: Annotated[int, at_least(0)]
    state: dict[str, Any] | None


def marked(folder):
    """What the last `mark` wrote, None where there is nothing. Raises UserError."""
    path = Path(folder) / "progress.json"
    if not path.exists():
        return None
    return read_record(path, Marked, "progress of an unfinished token set", AGAIN)


def token_dtype(vocab_size):
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


class TokenSetWriter:
    """Writes a token set piece by piece; after a kill it goes on where `mark` was called last.

    The arrays grow in NAME.partial files; `finish` hashes and renames them and writes meta.json
    last: a folder with meta.json is complete. `state` is what the last `mark` was given (None at
    the start).
    """

    NAMES = {"tokens": "tokens.bin", "loss_mask": "loss_mask.bin", "kind": "kind.bin"}

    def __init__(self, folder, vocab_size, arrays=("tokens",), plan=None):
        """`arrays`: which of tokens, loss_mask and kind are written.

        `plan` (JSON): what identifies this job, sources and settings. What another plan left
        unfinished is started over.
        """
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.plan = plan
        changes.make_folder(self.folder)
        self.dtypes = {name: np.dtype(np.uint8) for name in arrays}
        self.dtypes["tokens"] = token_dtype(vocab_size)
        self.count = 0
        self.state = None
        self._undo_renames()
        self._go_on()
        self.files = {}
        for name, dtype in self.dtypes.items():
            self.files[name] = files.Growing(self._partial(name), self.count * dtype.itemsize)

    def _undo_renames(self):
        """After a kill inside `finish`: arrays that were renamed already are partial again."""
        if (self.folder / "meta.json").exists():
            return
        for name in self.dtypes:
            path = self.folder / self.NAMES[name]
            if path.exists() and not self._partial(name).exists():
                files.rename(path, self._partial(name))

    def _go_on(self):
        """Take up `count` and `state` of the last mark, if it was this plan's and all is there."""
        saved = marked(self.folder)
        if saved is None or saved.plan != json.loads(json.dumps(self.plan)):
            return
        for name, dtype in self.dtypes.items():
            path = self._partial(name)
            if not path.exists() or path.stat().st_size < saved.count * dtype.itemsize:
                return
        self.count = saved.count
        self.state = saved.state

    def _partial(self, name):
        return self.folder / (self.NAMES[name] + ".partial")

    def append(self, **arrays):
        """Append one piece: an array of equal length for each name."""
        lengths = {len(a) for a in arrays.values()}
        assert set(arrays) == set(self.dtypes) and len(lengths) == 1, (set(arrays), lengths)
        for name, array in arrays.items():
            self.files[name].write(np.ascontiguousarray(array, self.dtypes[name]).tobytes())
        self.count += lengths.pop()

    def mark(self, state):
        """What was appended so far survives a kill; `state` (JSON) says where to go on."""
        for file in self.files.values():
            file.to_disk()
        progress = Marked(self.plan, self.count, state)
        write_atomic(self.folder / "progress.json", json.dumps(asdict(progress)))

    def finish(self, **meta):
        """Close the set. `meta`: tokenizer (hash), sources, seed, kinds ... Returns the set."""
        for name, file in self.files.items():
            file.to_disk()
            file.close()
            files.rename(self._partial(name), self.folder / self.NAMES[name])
        path = self.folder / "tokens.bin"
        header = {
            "format": FORMAT,
            "count": self.count,
            "dtype": self.dtypes["tokens"].str,
            "vocab_size": self.vocab_size,
            **meta,
            "sha256": file_hash(path),
            "sample_sha256": file_hash(path, sampled=True),
        }
        if "loss_mask" in self.dtypes:
            path = self.folder / self.NAMES["loss_mask"]
            header["loss_mask_sha256"] = file_hash(path)
            header["loss_mask_sample_sha256"] = file_hash(path, sampled=True)
        write_atomic(self.folder / "meta.json", json.dumps(header, indent=1))
        files.remove(self.folder / "progress.json")
        return TokenSet(self.folder)
