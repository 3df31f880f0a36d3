"""The arrays between the stages: token sets, the one loader, stored losses.

A token set is a folder that prepare.py makes: tokens.bin (little-endian uint16 when the vocabulary
is below 65,536, else uint32) and meta.json; optionally loss_mask.bin (uint8, 1 = may be a target)
and kind.bin (uint8, the label of each token's span, in the demo).

Windows are fixed: window w feeds tokens[wT : wT+T] and predicts tokens[wT+1 : wT+T+1]. So every
token but the first is a target exactly once, always with the same context. That is what lets a
loss that was stored once (score.py) be used in any order of training (train_slm.py).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from common.checksums import Checked, file_hash
from common.errors import UserError, command
from common.json_files import SHOWN, regular_size
from common.mapped import forget, refuse_cut
from common.records import FINITE, at_least, between, one_of, read_record

FORMAT = 1
STORED_FORMAT = 2  # of the note beside stored losses
PLACES = 64  # in stored losses that are looked at when they are opened
PIECE = 1024  # values at each of them
BLOCK = 1 << 20  # values of a mask that are read at a time
REMAKE = "make it again: the same prepare.py command with --overwrite"


@dataclasses.dataclass
class Source:
    """What a token set holds of one --source."""

    name: str
    documents: Annotated[int, at_least(0)]
    tokens: Annotated[int, at_least(0)]


@dataclasses.dataclass
class Header:
    """A token set's meta.json."""

    format: Annotated[int, one_of(FORMAT)]
    count: Annotated[int, at_least(0)]
    dtype: Annotated[str, one_of("<u2", "<u4")]
    vocab_size: Annotated[int, between(1, 1 << 32)]
    sha256: str
    sample_sha256: str
    tokenizer: str  # its hash
    loss_mask_sha256: str | None = None  # of loss_mask.bin, where the set has one
    loss_mask_sample_sha256: str | None = None
    kinds: list[str] | None = None  # names of the labels in kind.bin
    sources: list[Source] = dataclasses.field(default_factory=list)
    text_bytes: Annotated[int, at_least(0)] = 0
    bad_records: Annotated[int, at_least(0)] = 0
    contaminated: Annotated[int, at_least(0)] = 0
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)


def header_of(folder):
    """The `Header` of the token set in `folder`. Raises UserError where there is none."""
    return read_record(Path(folder) / "meta.json", Header, "token set", REMAKE)


class TokenSet:
    """A token set on disk, memory-mapped: opening it reads the header and 64 sampled blocks.

    Attributes: `tokens` (count,), `loss_mask` and `kind` (count,) uint8 or None, `kinds` their
    names, `meta`, `hash` (sha256 of tokens.bin), `mask_hash` (of loss_mask.bin, "" without one).
    `verify` reads and hashes everything. Raises UserError where a file is missing, truncated or not
    the one that meta.json describes.
    """

    def __init__(self, folder, verify=False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            remedy = command(
                "prepare.py", "--source", "TEXT", "--tokenizer", "MODEL", "--out", folder
            )
            raise UserError(f"token set: {folder} is not a folder; make one with {remedy}")
        header = header_of(folder)
        self.meta = dataclasses.asdict(header)
        self.count = header.count
        self.vocab_size = header.vocab_size
        self.hash = header.sha256
        self.tokenizer_hash = header.tokenizer
        self.tokens = self._open("tokens.bin", np.dtype(header.dtype))
        self.loss_mask = self._open("loss_mask.bin", np.uint8, optional=True)
        self.kind = self._open("kind.bin", np.uint8, optional=True)
        self.kinds = header.kinds if self.kind is not None else None
        self._check("tokens.bin", header.sha256, header.sample_sha256, verify)
        if header.loss_mask_sha256:
            sample = header.loss_mask_sample_sha256
            self._check("loss_mask.bin", header.loss_mask_sha256, sample, verify)

    @functools.cached_property
    def mask_hash(self):
        if self.loss_mask is None:
            return ""
        # A set that was made before the hash was noted is read for it, where a run asks.
        return self.meta["loss_mask_sha256"] or file_hash(self.folder / "loss_mask.bin")

    def _check(self, name, sha256, sample_sha256, verify):
        """Raises UserError where a file is not the one that meta.json describes."""
        path = self.folder / name
        same = path.exists() and file_hash(path, sampled=True) == sample_sha256
        if same and verify:
            same = file_hash(path) == sha256
        if not same:
            raise UserError(
                f"token set: {path} is not the file that meta.json describes (its sha256 differs); "
                f"{REMAKE}"
            )

    def _open(self, name, dtype, optional=False):
        path = self.folder / name
        dtype = np.dtype(dtype)
        if optional and not path.exists():
            return None
        size = regular_size(path, "token set", REMAKE)
        wanted = self.count * dtype.itemsize
        if size != wanted:
            raise UserError(
                f"token set: {path} has {size} bytes, meta.json says {self.count} tokens = "
                f"{wanted} bytes; it was cut or replaced, {REMAKE}"
            )
        if size == 0:  # cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, "r")

    def n_windows(self, seq_len):
        """How many windows there are; the last one is padded.

        A set shorter than a window is one padded window.
        """
        if self.count < 2:
            raise UserError(
                f"token set: {self.folder} has {self.count} tokens and so no target; "
                f"prepare more text"
            )
        self.refuse_no_target()
        return -(-(self.count - 1) // seq_len)

    def refuse_no_target(self):
        """Raises UserError where no token may be a target: a loss over none is no number."""
        if self.loss_mask is None:
            return
        for start in range(1, self.count, BLOCK):
            if self.loss_mask[start : start + BLOCK].any():
                return
        raise UserError(
            f"token set: loss_mask.bin of {self.folder} lets no token be a target; prepare a set "
            f"whose documents have a response"
        )

    def batch(self, windows, seq_len):
        """x, y (B, T) int64 and valid (B, T) bool of the given windows.

        Padding and masked targets are not valid.
        """
        x = self.cut(self.tokens, windows, seq_len, fill=0, shift=0, dtype=np.int64)
        y = self.cut(self.tokens, windows, seq_len, fill=0, dtype=np.int64)
        self.refuse_beyond(max(x.max(), y.max()), self.vocab_size, "an id")
        return x, y, self.valid(windows, seq_len)

    def refuse_beyond(self, highest, limit, what):
        """Raises UserError where meta.json does not know of so high an id or label."""
        if highest >= limit:
            raise UserError(
                f"token set: {self.folder} holds {what} of {highest}, meta.json says that all are "
                f"below {limit}; {REMAKE}"
            )

    def valid(self, windows, seq_len):
        """Which targets of the windows count, (B, T) bool."""
        if self.loss_mask is not None:
            return self.cut(self.loss_mask, windows, seq_len, fill=0, dtype=bool)
        position = np.asarray(windows)[:, None] * seq_len + 1 + np.arange(seq_len)
        return position < self.count

    def n_read(self, windows, seq_len):
        """How many tokens of the windows are inputs, masked targets or not: all but the padding."""
        left = self.count - 1 - np.asarray(windows) * seq_len
        return int(left.clip(0, seq_len).sum())

    def labels(self, windows, seq_len):
        """The kind of each target, (B, T) int64, or None. For reporting only."""
        if self.kind is None:
            return None
        kind = self.cut(self.kind, windows, seq_len, fill=0, dtype=np.int64)
        self.refuse_beyond(kind.max(), len(self.kinds or ()), "a label")
        return kind

    def cut(self, array, windows, seq_len, fill, shift=1, dtype=None):
        """Rows array[wT + shift : wT + shift + T] of a per-token array, (B, T).

        Padded with `fill` at the end.
        """
        refuse_cut(array)
        out = np.full((len(windows), seq_len), fill, dtype or array.dtype)
        for row, window in zip(out, windows):
            start = int(window) * seq_len + shift
            piece = array[start : start + seq_len]
            row[: len(piece)] = piece
        forget(array)
        return out


class Loader:
    """Which windows each step sees: a function of (seed, step) alone, so resuming is one integer.

    Step s takes `batch_size` windows at positions s * batch_size onwards of an endless row of
    epochs, each an exact permutation of all windows.
    """

    def __init__(self, n_windows, batch_size, seed):
        self.n_windows = n_windows
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = None  # whose permutation is in _order
        self._order = None

    def windows(self, step):
        """Window numbers of a step over all ranks, (batch_size,) int64."""
        out = []
        position = step * self.batch_size
        end = position + self.batch_size
        while position < end:
            epoch, offset = divmod(position, self.n_windows)
            if epoch != self._epoch:
                # RandomState: its stream is frozen across numpy's versions.
                self._order = np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)
                self._epoch = epoch
            piece = self._order[offset : offset + end - position]
            out.append(piece)
            position += len(piece)
        return np.concatenate(out)

    def micro_batches(self, step, micro_batch_size):
        """The step's windows as a list of micro-batches, the same for any number of ranks."""
        windows = self.windows(step)
        starts = range(0, self.batch_size, micro_batch_size)
        return [windows[i : i + micro_batch_size] for i in starts]


def entropy_path(ref_loss):
    """Where score.py --entropy puts the entropies that belong to a file of losses."""
    path = Path(ref_loss)
    if "ref_loss" in path.name:
        return path.with_name(path.name.replace("ref_loss", "ref_entropy"))
    return path.with_name(path.stem + ".entropy" + path.suffix)


@dataclasses.dataclass
class Validation:
    """The reference's mean loss on a validation set, in the windows and precision of the rest."""

    data: str  # hashes of the set and of which tokens are targets (identity.hash_of_validation)
    loss: Annotated[float, FINITE]  # nats per target
    name: str = ""  # the folder that score.py --val named


@dataclasses.dataclass
class Entropies:
    """How far a pass of their own has come (`score.py --entropy` beside losses)."""

    n_scored: Annotated[int, at_least(0)]


@dataclasses.dataclass
class Note:
    """What score.py notes beside the stored losses."""

    format: Annotated[int, one_of(STORED_FORMAT)]
    data: str  # the token set's hash
    reference: str  # the model's hash
    seq_len: Annotated[int, at_least(1)]
    count: Annotated[int, at_least(0)]
    n_scored: Annotated[int, at_least(0)]
    checksums: dict[str, list[int]]  # of each file's blocks
    context: Annotated[int, at_least(1)] | None = None  # tokens; None: all of the window
    model: str | None = None  # the reference, as it was named
    revision: str | None = None
    entropy: bool = False  # are there entropies of all that was scored?
    entropies: Entropies | None = None
    validation: list[Validation] = dataclasses.field(default_factory=list)
    # What its rounding depends on (common/numerics.py):
    dtype: str | None = None
    document_mask: bool = False
    device: str | None = None
    compile: bool | None = None
    attention: str | None = None
    norms: str | None = None
    micro_batch: int | None = None
    torch: str | None = None


def score_command(ref_loss, token_set, seq_len, numerics, meta=None, val=None):
    """How the losses that a run needs are made, for a message. `meta`: of those that are there."""
    meta = meta or {}
    words = ["score.py", "--model", meta.get("model") or "REFERENCE"]
    if meta.get("revision"):
        words += ["--revision", meta["revision"]]
    words += ["--data", token_set.folder, "--seq-len", seq_len, "--out", ref_loss]
    if meta.get("context"):
        words += ["--context", meta["context"]]
    if "dtype" in numerics:
        words += ["--dtype", numerics["dtype"]]
    if numerics.get("document_mask"):
        words.append("--document-mask")
    if val:
        words += ["--val", val]
    return command(*words)


def beside(path):
    """A name for losses that are made again, where those of `path` may be of use to another run."""
    path = Path(path)
    number = 2
    while path.with_stem(f"{path.stem}-{number}").exists():
        number += 1
    return path.with_stem(f"{path.stem}-{number}")


class Stored:
    """A value per token that a model left behind: ref_loss.bin, ref_entropy.bin, base_loss.bin ...

    score.py makes it: a flat float16 array as long as tokens.bin, indexed by the TARGET token
    (bfloat16 would be too coarse: it makes ties); NaN = not scored. The JSON beside it names the
    token set, the reference, the window length, the precision. Raises UserError where one of them
    is not what the caller trains with.
    """

    def __init__(self, ref_loss, token_set, seq_len, entropy=False, numerics=None, wanted=None):
        """`ref_loss`: the file of losses; `entropy`: open the entropies stored with them.

        `numerics`: how the student computes (common/numerics.py), where that has to be the
        reference's way. `wanted`: {"model": ..., "context": ...} of what makes them, for messages.
        """
        self.path = entropy_path(ref_loss) if entropy else Path(ref_loss)
        self.seq_len = seq_len
        self.set = token_set
        numerics = numerics or {}

        def remake(place, meta, *flags):
            made = score_command(place, token_set, seq_len, numerics, meta)
            return " ".join([made, *(["--entropy"] if entropy else []), *flags])

        if Path(ref_loss).is_dir():
            raise UserError(f"stored losses: {ref_loss} is a folder, wanted a file of score.py")
        if not Path(ref_loss).exists():
            raise UserError(
                f"stored losses: {ref_loss} does not exist; make it with {remake(ref_loss, wanted)}"
            )
        path = Path(ref_loss).with_suffix(".json")
        if path.exists():
            mend = remake(ref_loss, wanted, "--overwrite")
        else:
            mend = remake(beside(ref_loss), wanted)  # losses without a note stay
        note = read_record(path, Note, "stored losses", f"score again: {mend}")
        self.meta = dataclasses.asdict(note)
        self._check(numerics, lambda: remake(beside(ref_loss), self.meta))
        if entropy and not (note.entropy and self.path.exists()):
            raise UserError(
                f"stored losses: {self.path} does not exist or is not whole; make it with "
                f"{remake(ref_loss, self.meta)}"
            )
        again = remake(ref_loss, self.meta, "--overwrite")
        size = regular_size(self.path, "stored losses")
        if size != 2 * token_set.count:
            raise UserError(
                f"stored losses: {self.path} has a size in bytes of {size}, this run has "
                f"{2 * token_set.count}; score again: {again}"
            )
        checksums = self.meta["checksums"].get(self.path.name, [])
        self.checked = Checked(self.path, checksums, f"score again: {again}")
        self.values = np.memmap(self.path, "<f2", "r")
        self._check_values(again)

    def _check(self, numerics, remake):
        """Raises UserError where the note is of other losses; `remake()` is how to get these."""
        meta = self.meta
        for what, got, wanted in (
            ("losses of token set", meta["data"], self.set.hash),
            ("a length of", meta["count"], self.set.count),
            ("windows of", meta["seq_len"], self.seq_len),
            ("the precision", meta["dtype"], numerics.get("dtype", meta["dtype"])),
            (
                "the document mask",
                meta["document_mask"],
                numerics.get("document_mask", meta["document_mask"]),
            ),
        ):
            if got != wanted:
                raise UserError(
                    f"stored losses: {self.path} has {what} {str(got)[:SHOWN]}, this run has "
                    f"{wanted}; make others with {remake()}"
                )
        n_windows = self.set.n_windows(self.seq_len)
        if meta["n_scored"] != n_windows:
            raise UserError(
                f"stored losses: {self.path} holds {meta['n_scored']} of {n_windows} windows, "
                f"scoring was interrupted; the same score.py command goes on"
            )

    def _check_values(self, command):
        """Raises UserError for values that no loss (or entropy) can have, in a sample of them."""
        starts = np.linspace(0, max(0, self.set.count - PIECE), PLACES, dtype=np.int64)
        pieces = [self.values[start : start + PIECE] for start in starts]
        sample = np.concatenate(pieces).astype(np.float32)
        forget(self.values)
        sample = sample[~np.isnan(sample)]
        if not len(sample):
            return
        low, high, mean = sample.min(), sample.max(), sample.mean()
        most = np.log(self.set.vocab_size) + 2
        if low < -0.01 or not np.isfinite(high) or mean > most:
            raise UserError(
                f"stored losses: {self.path} has values from {low:.3g} to {high:.3g}, mean "
                f"{mean:.3g}; wanted none below 0 and a mean up to {most:.3g} nats (ln of the "
                f"vocabulary, plus 2); score again: {command}"
            )

    def batch(self, windows, valid):
        """The windows' values (B, T) fp32; 0 at targets that are not valid.

        Raises UserError where a valid one is missing.
        """
        for window in windows:
            first = 2 * (int(window) * self.seq_len + 1)
            self.checked.check(first, min(2 * self.set.count, first + 2 * self.seq_len))
        out = self.set.cut(self.values, windows, self.seq_len, fill=0).astype(np.float32)
        missing = np.isnan(out) & valid
        if missing.any():
            row, column = np.argwhere(missing)[0]
            first = windows[row] * self.seq_len + 1 + column
            raise UserError(
                f"stored losses: {self.path} has no value for {missing.sum()} targets of this "
                f"batch, the first is token {first}; score again with --overwrite"
            )
        return np.where(valid, out, 0)
