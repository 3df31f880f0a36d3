"""Jobs of reading.py -> pieces of a token set: token ids, masks and labels of documents."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from hf.tokenizer import Tokenizer
from text import reading
from text.decontaminate import Decontaminator
from text.held_out import Side
from text.sources import open_set

UNLABELLED = "unlabelled"  # kind of the tokens of a source without labels
DTYPES = {"tokens": np.uint32, "loss_mask": np.uint8, "kind": np.uint8}
BROKEN, CONTAMINATED = "broken", "contaminated"  # in place of a document that is left out


class Document(NamedTuple):
    """A document's tokens, without BOS and EOS."""

    ids: np.ndarray  # (n,)
    n_bytes: int  # of its text
    mask: np.ndarray | None = None  # (n + 1,): which of the ids and EOS are to be learnt; None: all
    kind: np.ndarray | None = None  # (n + 1,): their kinds, numbered as in the source's labels


@dataclass
class Piece:
    """What a worker made of a job: the next stretch of every array, and what there is to count."""

    job: reading.Job  # without its records
    arrays: dict = field(default_factory=dict)  # {name: (n,)}
    documents: int = 0
    text_bytes: int = 0
    bad: int = 0
    contaminated: int = 0

    def cut(self, room, eos):
        """Keep the first `room` tokens. Returns whether that is all there is room for."""
        n = len(self.arrays["tokens"])
        if n < room:
            return False
        self.text_bytes = self.text_bytes * room // n
        self.arrays = {name: array[:room] for name, array in self.arrays.items()}
        ended = self.arrays["tokens"] == eos
        self.documents = int(np.count_nonzero(ended))
        if not ended[-1]:  # the rest of the last document is cut off
            self.documents += 1
        return True


@dataclass
class Preparation:
    """All that turns jobs into pieces of one token set; each worker process has its own.

    Where it is pickled the tokenizer stays behind, and is loaded from `folder`.
    """

    folder: Path  # of the token set
    tokenizer: Tokenizer | None
    sources: list
    arrays: list  # names: tokens, perhaps loss_mask and kind
    kinds: list  # names of the kinds of all sources together; [] where no source has labels
    mask_prompt: bool = False
    skip_bad: bool = False
    decontaminator: Decontaminator | None = None
    side: Side | None = None  # with --val-share

    @classmethod
    def of(cls, folder, sources, tokenizer, settings):
        """For a token set in `folder`, as the Settings of building.py say.

        Raises UserError where the tokenizers do not fit.
        """
        if tokenizer.eos_id is None:
            raise UserError(
                "tokenizer: it names no end-of-text token; "
                "wanted eos_token in its tokenizer_config.json"
            )
        sets = [open_set(source.path) for source in sources if source.kind == "set"]
        refuse_other_tokenizers(sets, tokenizer)
        kinds = all_kinds(sources)
        masked = (
            settings.mask_prompt
            or tokenizer.add_bos
            or any(source.form == "chat" for source in sources)
            or any(tokens.loss_mask is not None for tokens in sets)
        )
        arrays = ["tokens"]
        if masked:
            arrays.append("loss_mask")
        if kinds:
            arrays.append("kind")
        return cls(
            folder=folder,
            tokenizer=tokenizer,
            sources=sources,
            arrays=arrays,
            kinds=kinds,
            mask_prompt=settings.mask_prompt,
            skip_bad=settings.skip_bad,
            decontaminator=settings.decontaminator,
            side=settings.side,
        )

    def __getstate__(self):
        return {**self.__dict__, "tokenizer": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.tokenizer = Tokenizer.load(self.folder)

    def piece(self, job):
        """What becomes of a job. Raises UserError for a broken record or a damaged file."""
        if job.error:
            raise UserError(job.error)
        source = self.sources[job.source]
        try:
            return self.piece_of(job, source)
        except MemoryError:
            raise UserError(
                f"{source.path}: there is not enough memory for what follows record {job.first}; "
                f"lower --workers or --max-document-bytes"
            ) from None

    def piece_of(self, job, source):
        piece = Piece(replace(job, records=()))
        if source.kind == "set":
            self.copy_stretch(piece, source)
            return piece
        if job.damage:
            piece.bad = 1
        documents = self.generated if source.kind == "generated" else self.tokenised
        whole = []
        for document in documents(job, source):
            if document is BROKEN:
                piece.bad += 1
            elif document is CONTAMINATED:
                piece.contaminated += 1
            else:
                whole.append(document)
        self.join(piece, source, whole)
        return piece

    def tokenised(self, job, source):
        """A Document, BROKEN or CONTAMINATED for each record of a file."""
        masked = self.mask_prompt or source.form == "chat"
        for texts in reading.documents(source, job, self.skip_bad):
            if texts is None:
                yield BROKEN
                continue
            text = "".join(texts)
            if self.side and not self.side.takes(text):
                continue
            if self.decontaminator and self.decontaminator.problems_in(text):
                yield CONTAMINATED
                continue
            ids = self.tokenizer.encode(text)
            mask = None
            if masked and len(texts) > 1:
                mask = targets(texts, ids, self.tokenizer)
            yield Document(ids, len(text.encode()), mask)

    def generated(self, job, source):
        """A Document for each number of a job, made by the source's own function."""
        for number in job.records:
            yield source.document(number, self.tokenizer)

    def join(self, piece, source, documents):
        """Fill a piece with documents: BOS where the tokenizer adds it, the ids, EOS."""
        tokenizer = self.tokenizer
        front = np.array([tokenizer.bos_id] if tokenizer.add_bos else [], DTYPES["tokens"])
        end = np.array([tokenizer.eos_id], DTYPES["tokens"])
        parts = {name: [] for name in self.arrays}
        numbers = self.kind_numbers(source.labels)
        for document in documents:
            length = len(document.ids) + 1
            parts["tokens"] += front, document.ids, end
            if "loss_mask" in parts:
                mask = document.mask
                if mask is None:
                    mask = np.ones(length, np.uint8)
                parts["loss_mask"] += np.zeros(len(front), np.uint8), mask
            if "kind" in parts:
                kind = document.kind
                if kind is None:
                    kind = np.zeros(length, np.uint8)
                kind = numbers[kind]
                parts["kind"] += np.full(len(front), kind[0]), kind
        for name in self.arrays:
            joined = np.concatenate(parts[name] or [[]])
            piece.arrays[name] = joined.astype(DTYPES[name])
        piece.documents = len(documents)
        piece.text_bytes = sum(document.n_bytes for document in documents)

    def kind_numbers(self, labels):
        """Numbers in `kinds` of a source's labels, (len(labels),) uint8; of UNLABELLED without."""
        if not self.kinds:
            return None
        return np.array([self.kinds.index(name) for name in labels or [UNLABELLED]], np.uint8)

    def copy_stretch(self, piece, source):
        """Fill a piece with a stretch of a token set; what that lacks is filled in."""
        tokens = open_set(source.path)
        stretch = slice(piece.job.first, piece.job.next)
        length = stretch.stop - stretch.start
        arrays = {"tokens": tokens.tokens[stretch]}
        tokens.refuse_beyond(arrays["tokens"].max(), tokens.vocab_size, "an id")
        if "loss_mask" in self.arrays:
            mask = tokens.loss_mask
            arrays["loss_mask"] = np.ones(length, np.uint8) if mask is None else mask[stretch]
        if "kind" in self.arrays:
            labelled = tokens.kind is not None
            kind = tokens.kind[stretch] if labelled else np.zeros(length, np.uint8)
            if labelled:
                tokens.refuse_beyond(kind.max(), len(tokens.kinds or ()), "a label")
            arrays["kind"] = self.kind_numbers(tokens.kinds if labelled else None)[kind]
        piece.arrays = arrays
        piece.documents = int(np.count_nonzero(arrays["tokens"] == self.tokenizer.eos_id))
        # Its share of the set's bytes, rounded so that the shares of all stretches add up.
        size = tokens.meta.get("text_bytes", 0)
        before = size * stretch.start // tokens.count
        piece.text_bytes = size * stretch.stop // tokens.count - before


def targets(texts, ids, tokenizer):
    """Which of a document's ids and its EOS are to be learnt, (len(ids) + 1,) uint8.

    `texts`: its text, by turns not to be learnt and to be learnt. What belongs to the texts before
    a border is what is the same whatever comes after it: a token that reaches across a border,
    such as from a prompt into a response, belongs to what comes after.
    """
    mask = np.zeros(len(ids) + 1, np.uint8)
    start = 0
    before = ""
    for turn, text in enumerate(texts[:-1]):
        before += text
        # Encoded alone it may end in other tokens than here: those do not belong to it alone.
        alone = tokenizer.encode(before)
        length = min(len(alone), len(ids))
        differs = np.flatnonzero(alone[:length] != ids[:length])
        end = max(start, int(differs[0]) if len(differs) else length)
        mask[start:end] = turn % 2
        start = end
    mask[start:] = (len(texts) - 1) % 2
    return mask


def refuse_other_tokenizers(sets, tokenizer):
    for tokens in sets:
        if tokens.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"{tokens.folder}: got a token set of tokenizer {tokens.tokenizer_hash[:12]}, "
                f"wanted {tokenizer.hash[:12]} as in the rest; prepare its text again with that "
                f"--tokenizer"
            )
        ends = Tokenizer.load(tokens.folder).ends
        if ends != tokenizer.ends:
            raise UserError(
                f"{tokens.folder}: got a token set with (BOS, EOS, BOS in front) {ends}, wanted "
                f"{tokenizer.ends} as in the rest; prepare its text again with that --tokenizer"
            )


def all_kinds(sources):
    """Names of the kinds of all sources together; [] where no source has labels."""
    labels = [labels_of(source) for source in sources]
    kinds = list(dict.fromkeys(name for names in labels for name in names))
    if kinds and not all(labels) and UNLABELLED not in kinds:
        kinds.append(UNLABELLED)
    return kinds


def labels_of(source):
    """Names of the kinds of a source's tokens; [] without labels."""
    if source.kind == "set":
        tokens = open_set(source.path)
        return tokens.kinds if tokens.kind is not None else []
    return source.labels or []
