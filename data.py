"""Token sets and the one loader.

A token set is a folder: tokens.bin (little-endian uint16 when the vocabulary is below 65,536, else uint32) and
meta.json, made by prepare.py; optionally loss_mask.bin (uint8, 1 = may be a target) and kind.bin (uint8, the label of
each token's span, in the demo). Windows are fixed: window w feeds tokens[wT : wT+T] and predicts
tokens[wT+1 : wT+T+1], so every token but the first is a target exactly once, always with the same context. That is
what lets a loss that was stored once (score.py) be used in any order of training (train_slm.py).
"""

import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json, write_atomic

FORMAT = 1
BLOCK = 1 << 20  # bytes read at a time when a whole file is hashed


def token_dtype(vocab_size):
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


def file_hash(path, sampled=False):
    """sha256 of a file's bytes; `sampled`: of 64 blocks of 4 KiB spread over it, for a check that costs nothing."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
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


def forget(array):
    """Take the pages of a memory map out of this process (they stay in the system's cache), so that its memory does not
    grow with what it has read. Does nothing with other arrays."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)


class TokenSet:
    """A token set on disk, memory-mapped: opening it reads the header and 64 sampled blocks.

    Attributes: `tokens` (count,), `loss_mask` and `kind` (count,) uint8 or None, `kinds` their names, `meta`, `hash`
    (sha256 of tokens.bin). Raises UserError where a file is missing, truncated or not the one that meta.json describes;
    `verify` reads and hashes everything.
    """

    def __init__(self, folder, verify=False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"token set: {folder} is not a folder; make one with prepare.py --out {folder}"
            )
        self.meta = read_json(self.folder / "meta.json", "token set")
        if self.meta.get("format") != FORMAT:
            raise UserError(
                f"token set: {folder}/meta.json has format {self.meta.get('format')!r}, "
                f"this kit reads {FORMAT}; make it again with prepare.py"
            )
        self.count, self.vocab_size = self.meta["count"], self.meta["vocab_size"]
        self.hash, self.tokenizer_hash = self.meta["sha256"], self.meta["tokenizer"]
        self.kinds = self.meta.get("kinds")
        self.tokens = self._open("tokens.bin", np.dtype(self.meta["dtype"]))
        self.loss_mask = self._open("loss_mask.bin", np.uint8, optional=True)
        self.kind = self._open("kind.bin", np.uint8, optional=True)
        path = self.folder / "tokens.bin"
        if (
            file_hash(path, sampled=True) != self.meta["sample_sha256"]
            or verify
            and file_hash(path) != self.hash
        ):
            raise UserError(
                f"token set: {path} is not the file that meta.json describes (its sha256 differs); "
                f"make it again with prepare.py"
            )

    def _open(self, name, dtype, optional=False):
        path, dtype = self.folder / name, np.dtype(dtype)
        if not path.exists():
            if optional:
                return None
            raise UserError(f"token set: {path} does not exist; make it again with prepare.py")
        size, wanted = path.stat().st_size, self.count * dtype.itemsize
        if size != wanted:
            raise UserError(
                f"token set: {path} has {size} bytes, meta.json says {self.count} tokens = {wanted} bytes; "
                f"it was cut or replaced, make it again with prepare.py"
            )
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)

    def n_windows(self, seq_len):
        """How many windows there are; the last one is padded. A set shorter than a window is one padded window."""
        if self.count < 2:
            raise UserError(
                f"token set: {self.folder} has {self.count} tokens and so no target; prepare more text"
            )
        return -(-(self.count - 1) // seq_len)

    def batch(self, windows, seq_len):
        """x, y (B, T) int64 and valid (B, T) bool of the given windows; padding and masked targets are not valid."""
        x = self.cut(self.tokens, windows, seq_len, fill=0, shift=0, dtype=np.int64)
        y = self.cut(self.tokens, windows, seq_len, fill=0, dtype=np.int64)
        return x, y, self.valid(windows, seq_len)

    def valid(self, windows, seq_len):
        """Which targets of the windows count, (B, T) bool."""
        if self.loss_mask is not None:
            return self.cut(self.loss_mask, windows, seq_len, fill=0, dtype=bool)
        position = np.asarray(windows)[:, None] * seq_len + 1 + np.arange(seq_len)
        return position < self.count

    def n_read(self, windows, seq_len):
        """How many tokens of the windows are inputs, masked targets or not: all but the padding."""
        return int((self.count - 1 - np.asarray(windows) * seq_len).clip(0, seq_len).sum())

    def labels(self, windows, seq_len):
        """The kind of each target, (B, T) int64, or None. For reporting only."""
        return (
            None
            if self.kind is None
            else self.cut(self.kind, windows, seq_len, fill=0, dtype=np.int64)
        )

    def cut(self, array, windows, seq_len, fill, shift=1, dtype=None):
        """Rows array[wT + shift : wT + shift + T] of a per-token array, (B, T), padded with `fill` at the end."""
        out = np.full((len(windows), seq_len), fill, dtype or array.dtype)
        for row, w in zip(out, windows):
            piece = array[int(w) * seq_len + shift : int(w) * seq_len + shift + seq_len]
            row[: len(piece)] = piece
        forget(array)
        return out


class Loader:
    """Which windows each step sees: a function of (seed, step) alone, so resuming is one integer.

    Step s takes `batch_size` windows at positions s * batch_size onwards of an endless row of epochs, each an exact
    permutation of all windows. Ranks take turns at the micro-batches: rank r of R has number r, r + R, ...
    """

    def __init__(self, n_windows, batch_size, seed):
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self._epoch, self._order = None, None

    def windows(self, step):
        """Window numbers of a step over all ranks, (batch_size,) int64."""
        out = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, offset = divmod(position, self.n_windows)
            if epoch != self._epoch:  # RandomState: its stream is frozen across numpy's versions
                self._order = np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)
                self._epoch = epoch
            piece = self._order[offset : offset + end - position]
            out.append(piece)
            position += len(piece)
        return np.concatenate(out)

    def micro_batches(self, step, micro_batch_size):
        """The step's windows as a list of micro-batches over all ranks, the same list for any number of ranks."""
        windows = self.windows(step)
        return [
            windows[i : i + micro_batch_size] for i in range(0, self.batch_size, micro_batch_size)
        ]


class TokenSetWriter:
    """Writes a token set piece by piece; after a kill it goes on where `mark` was called last.

    The arrays grow in NAME.partial files; `finish` hashes and renames them and writes meta.json last: a folder with
    meta.json is complete. `state` is what the last `mark` was given (None at the start).
    """

    NAMES = {"tokens": "tokens.bin", "loss_mask": "loss_mask.bin", "kind": "kind.bin"}

    def __init__(self, folder, vocab_size, arrays=("tokens",), plan=None):
        """`arrays`: which of tokens, loss_mask and kind are written. `plan`: what identifies this job (sources,
        settings); a partial result of another plan is started over."""
        self.folder, self.vocab_size, self.plan = Path(folder), vocab_size, plan
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtypes = {
            name: token_dtype(vocab_size) if name == "tokens" else np.dtype(np.uint8)
            for name in arrays
        }
        self.count, self.state = 0, None
        for name in arrays:  # killed inside `finish`, after the renaming began
            if (self.folder / self.NAMES[name]).exists() and not (
                self._partial(name).exists() or (self.folder / "meta.json").exists()
            ):
                os.replace(self.folder / self.NAMES[name], self._partial(name))
        progress = self.folder / "progress.json"
        if progress.exists():
            saved = read_json(progress, "progress of an unfinished token set")
            whole = all(
                path.exists() and path.stat().st_size >= saved["count"] * self.dtypes[name].itemsize
                for name in arrays
                for path in [self._partial(name)]
            )
            if whole and saved["plan"] == json.loads(json.dumps(plan)):
                self.count, self.state = saved["count"], saved["state"]
        self.files = {}
        for name, dtype in self.dtypes.items():
            path = self._partial(name)
            self.files[name] = open(path, "r+b" if path.exists() else "w+b")
            self.files[name].truncate(self.count * dtype.itemsize)
            self.files[name].seek(0, os.SEEK_END)

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
            file.flush()
            os.fsync(file.fileno())
        write_atomic(
            self.folder / "progress.json",
            json.dumps({"plan": self.plan, "count": self.count, "state": state}),
        )

    def finish(self, **meta):
        """Close the set. `meta`: tokenizer (hash), sources, seed, kinds ... Returns the TokenSet."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._partial(name), self.folder / self.NAMES[name])
        path = self.folder / "tokens.bin"
        write_atomic(
            self.folder / "meta.json",
            json.dumps(
                {
                    "format": FORMAT,
                    "count": self.count,
                    "dtype": self.dtypes["tokens"].str,
                    "vocab_size": self.vocab_size,
                    **meta,
                    "sha256": file_hash(path),
                    "sample_sha256": file_hash(path, sampled=True),
                },
                indent=1,
            ),
        )
        (self.folder / "progress.json").unlink(missing_ok=True)
        return TokenSet(self.folder)


def entropy_path(ref_loss):
    """Where score.py --entropy puts the entropies that belong to a file of losses."""
    path = Path(ref_loss)
    return path.with_name(
        path.name.replace("ref_loss", "ref_entropy")
        if "ref_loss" in path.name
        else path.stem + ".entropy" + path.suffix
    )


class Stored:
    """A value per token that the reference left behind, made by score.py: ref_loss.bin or ref_entropy.bin.

    A flat float16 array as long as tokens.bin, indexed by the TARGET token (bfloat16 would be too coarse: it makes
    ties); NaN = not scored. The JSON beside it names the token set, the reference, the window length, the precision.
    Raises UserError where token set, window length or precision is not what the caller trains with.
    """

    def __init__(self, ref_loss, token_set, seq_len, entropy=False, dtype=None):
        """`ref_loss`: the file of losses; with `entropy` the entropies that were stored with them are opened. `dtype`: the
        precision that the student computes in ("float32", "bfloat16"), where it has to be the reference's."""
        self.path, self.seq_len, self.set = (
            entropy_path(ref_loss) if entropy else Path(ref_loss),
            seq_len,
            token_set,
        )
        if not self.path.exists():
            raise UserError(
                f"reference losses: {self.path} does not exist; make it with score.py --out {ref_loss}"
                f"{' --entropy' * entropy}"
            )
        self.meta = meta = read_json(Path(ref_loss).with_suffix(".json"), "reference losses")
        again = f"score again: score.py --data {token_set.folder} --seq-len {seq_len} --out {ref_loss} --overwrite"
        for what, got, wanted in (
            ("losses of token set", meta.get("data"), token_set.hash),
            ("a length of", meta.get("count"), token_set.count),
            ("a size in bytes of", self.path.stat().st_size, 2 * token_set.count),
            ("windows of", meta.get("seq_len"), seq_len),
            ("the precision", meta.get("dtype"), dtype or meta.get("dtype")),
        ):
            if got != wanted:
                raise UserError(
                    f"reference losses: {self.path} has {what} {got}, this run has {wanted}; {again}"
                    + f" --dtype {wanted}" * (what == "the precision")
                )
        if meta["n_scored"] != token_set.n_windows(seq_len):
            raise UserError(
                f"reference losses: {self.path} holds {meta['n_scored']} of {token_set.n_windows(seq_len)} "
                f"windows, scoring was interrupted; the same score.py command goes on"
            )
        self.values = np.memmap(self.path, "<f2", "r")

    def batch(self, windows, valid):
        """The windows' values (B, T) fp32; 0 at targets that are not valid. Raises UserError on a missing one."""
        out = self.set.cut(self.values, windows, self.seq_len, fill=0).astype(np.float32)
        missing = np.isnan(out) & valid
        if missing.any():
            row, column = np.argwhere(missing)[0]
            raise UserError(
                f"reference losses: {self.path} has no value for {missing.sum()} targets of this batch, the "
                f"first is token {windows[row] * self.seq_len + 1 + column}; score again with --overwrite"
            )
        return np.where(valid, out, 0)
