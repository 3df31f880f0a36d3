"""Text <-> ids for every model the kit loads, through tiktoken, equal to the model's own tokenizer.

Two families are read, from the files that lie beside a Hugging Face checkpoint:
  SentencePiece BPE with byte fallback (Llama-2, TinyLlama, Rho-1, Mistral-v0.1):
      tokenizer.model or tokenizer.json
  byte-level BPE (GPT-2, Llama-3, SmolLM2, Qwen2/3, DeepSeek-V3):
      tokenizer.json
and a byte-level vocabulary can be trained (train_bpe). Anything else is refused by name.

tokenizer_files.py turns a model's files into a `Vocabulary` of tiktoken's ranks. Ranks stay
internal, and one numpy look-up turns them into the model's ids.
"""

import codecs
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency: \p{N} and friends
import tiktoken

from common.errors import UserError
from common.files import write_atomic
from common.json_files import shown
from hf import byte_level_bpe
from hf.sentencepiece_bpe import SPACE
from hf.tokenizer_files import FILES, from_json, read_vocabulary
from hf.vocabulary import Vocabulary

# Stands between parts that no token may join. Begins in ASCII: tiktoken steps by one byte.
CUT = "\0\uffff"
PATIENCE = 60  # seconds for a document's pattern; half a million spaces take one
HOLE = 0xFFFFFFFF  # a rank that is not exactly one id of the model


class Tokenizer:
    """One vocabulary. Made by `Tokenizer.load` or `train_bpe`.

    n_vocab: largest id + 1 (a model's padded vocab_size may be larger)
    bos_id, eos_id: int or None
    add_bos: does the model expect BOS in front of a document?
    hash: sha256 of what decides the ids, not of the files
    """

    def __init__(self, vocabulary: Vocabulary):
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.add_bos = vocabulary.add_bos
        self.nfc = vocabulary.nfc
        self.prefix = vocabulary.prefix
        self.pattern = vocabulary.pattern
        self.cuts = [regex.compile(f"({cut})") for cut in vocabulary.cuts]

        # from text to ranks
        self._cut_id = len(vocabulary.expand)
        self._allowed = frozenset([CUT] if self.cuts else [])
        ranks = vocabulary.ranks
        self._core = _core(ranks, self.pattern, self._cut_id)
        # tiktoken would take a token that no merge makes where it is a whole word; the model's own
        # tokenizer never does
        if not vocabulary.keep_unreachable and (lost := _unreachable(self._core, ranks)):
            ranks = {key: rank for key, rank in ranks.items() if key not in lost}
            self._core = _core(ranks, self.pattern, self._cut_id)
        self._order = [key for key in ranks if len(key) > 1]

        # from ranks to ids
        self._expand = vocabulary.expand
        single = [ids[0] if len(ids) == 1 else HOLE for ids in self._expand]
        self._ids = np.array([*single, HOLE], np.uint32)

        # added tokens, and from ids to bytes
        self.added = {token["content"]: token["id"] for token in vocabulary.added}
        self.special_ids = frozenset(self.added.values())
        self._find_all = _finder(vocabulary.added)
        # as in `tokenizers`: those that are not special are always parsed
        self._find_plain = _finder([a for a in vocabulary.added if not a.get("special")])
        self.n_vocab = 1 + max([*vocabulary.table, *self.special_ids])
        self._bytes = [b""] * self.n_vocab
        for i, raw in vocabulary.table.items():
            self._bytes[i] = raw
        for content, i in self.added.items():
            self._bytes[i] = content.encode()

        # for saving
        self._files = vocabulary.files
        self._make_json = vocabulary.make_json

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """From a folder with tokenizer.json and/or tokenizer.model, or from one such file.

        tokenizer_config.json and config.json are looked for beside it. Raises UserError.
        """
        vocabulary = read_vocabulary(path)
        try:
            return cls(vocabulary)
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(
                f"tokenizer: {path} is not complete ({shown(error)}); get it again"
            ) from None

    @property
    def ends(self):
        """[BOS, EOS, is BOS put in front?]: how documents are joined. `hash` does not hold it."""
        return [self.bos_id, self.eos_id, self.add_bos]

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of id -> bytes, the merge order, the special tokens and the splitting rules.

        Equal where the same vocabulary was read from tokenizer.model and from tokenizer.json.
        """
        cuts = [cut.pattern for cut in self.cuts]
        rules = [self.pattern, cuts, self.nfc, self.prefix, sorted(self.added.items())]
        order = self._order
        if self.prefix is not None:
            # the two files order runs of spaces differently, to one effect: compare the effect
            order = [key if key.strip(b" ") else b" " for key in order]
            runs = []
            for n in range(2, 130):
                ranks = self._core.encode_single_piece(b" " * n + b"\xff")[:-1]
                runs.append(self._ids[ranks].tolist())
            rules.append(runs)
        digest = hashlib.sha256(json.dumps(rules).encode())
        for part in (self._bytes, order):
            lengths = np.array([len(raw) for raw in part], "<u4")
            digest.update(lengths.tobytes() + b"".join(part))
        return digest.hexdigest()

    # ---- encoding

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """uint32 ids (n,), without BOS or EOS. Raises UserError for text with lone surrogates.

        specials=True parses special tokens written in the text; otherwise "</s>" is four characters
        like any others.
        """
        find = self._find_all if specials else self._find_plain
        if find is None or (match := find.search(text)) is None:
            return self._encode_part(text, True)
        parts = []
        at = 0
        while match:
            if match.start() > at:
                parts.append(self._encode_part(text[at : match.start()], at == 0))
            token = match[0]
            if token not in self.added:  # with the spaces that it swallows
                token = max((c for c in self.added if c in token), key=len)
            parts.append(np.array([self.added[token]], np.uint32))
            at = match.end()
            match = find.search(text, at)
        parts.append(self._encode_part(text[at:], False))
        return np.concatenate(parts)

    def _encode_part(self, text, first):
        """Ids of text without special tokens; first: it begins the document."""
        if not text:
            return np.zeros(0, np.uint32)
        if self.prefix is not None:
            text = text.replace(SPACE, " ")
            if self._wants_space(text, first):
                text = " " + text
        try:
            if self.nfc and not text.isascii():
                text = byte_level_bpe.to_nfc(text)
            ranks = self._ranks(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"tokenizer: the text has a lone surrogate ({error.object[error.start]!r} at "
                f"character {error.start}), which is not Unicode text; drop or repair the document"
            ) from None
        return self._to_ids(ranks)

    def _wants_space(self, text, first):
        """Does SentencePiece put a space in front of this part of the text?"""
        if self.prefix == "always":
            return True
        here = self.prefix == "each" or (self.prefix == "first" and first)
        return here and not text.startswith(" ")

    def _ranks(self, text):
        """tiktoken's ranks of the text (n,), uint32."""
        if self.cuts and CUT in text:
            return self._slow_ranks(text)
        marked = text
        for cut in self.cuts:
            marked = cut.sub(rf"{CUT}\1{CUT}", marked)
        try:
            buffer = self._core.encode_to_tiktoken_buffer(marked, self._allowed)
        except UnicodeEncodeError:
            raise
        except ValueError:
            # half a million spaces in a row overflow the stack of tiktoken's regex engine
            return self._slow_ranks(text)
        ranks = np.frombuffer(buffer, np.uint32)
        return ranks[ranks != self._cut_id] if self.cuts else ranks

    def _slow_ranks(self, text):
        """The same ranks, split by Python's regex module."""
        pieces = [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in cut.split(piece) if part]
        ranks = []
        for piece in pieces:
            try:
                for match in regex.finditer(self.pattern, piece, timeout=PATIENCE):
                    ranks += self._core.encode_single_piece(match[0].encode())
            except TimeoutError:
                raise UserError(
                    f"tokenizer: its pattern takes over {PATIENCE} s to split a document of "
                    f"{len(text):,} characters; drop or shorten the document"
                ) from None
        return np.array(ranks, np.uint32)

    def _to_ids(self, ranks):
        """The model's ids of ranks: mostly one each, else what `expand` says."""
        ids = self._ids.take(ranks)  # several times faster than self._ids[ranks]
        if ids.max() != HOLE:
            return ids
        holes = np.flatnonzero(ids == HOLE)
        filling = [self._expand[rank] for rank in ranks[holes].tolist()]
        if not all(filling):
            bad = next(int(rank) for rank, fill in zip(ranks[holes], filling) if not fill)
            raise UserError(
                f"tokenizer: the vocabulary has no token for byte 0x{bad:02X} of the text "
                "and no unk_token"
            )
        counts = np.ones(len(ids), np.int64)
        counts[holes] = [len(fill) for fill in filling]
        ids = np.repeat(ids, counts)
        ids[ids == HOLE] = [i for fill in filling for i in fill]
        return ids

    def encode_batch(self, texts) -> list[np.ndarray]:
        """encode() of each text."""
        return [self.encode(text) for text in texts]

    # ---- decoding

    def token_bytes(self, i: int) -> bytes:
        """The bytes that id i stands for.

        SentencePiece's visible space is a space, a special token its name, an id without a token
        b"". In byte-level text the sums of their lengths are each token's offset in bytes; in
        SentencePiece text the first byte is the leading space that the encoder added.
        """
        if i < 0:
            raise UserError(f"tokenizer: got id {i}, wanted 0 or more")
        return self._bytes[i] if i < self.n_vocab else b""

    def decode(self, ids) -> str:
        """Text of the ids; broken UTF-8 becomes U+FFFD, special tokens their names.

        SentencePiece: without the leading space that encode() added.
        """
        ids = np.asarray(ids).tolist()
        parts = [self.token_bytes(i) for i in ids]
        if self._adds_space:
            for at, i in enumerate(ids):
                if parts[at] and i not in self.special_ids:
                    parts[at] = parts[at].removeprefix(b" ")
                    break
        return b"".join(parts).decode("utf-8", "replace")

    @property
    def _adds_space(self):
        return self.prefix not in (None, "never")

    def stream(self) -> "Stream":
        """For text that arrives token by token: .push(id) -> str, .flush() -> str."""
        return Stream(self)

    # ---- saving

    def save(self, folder):
        """Write the tokenizer files, so that transformers' AutoTokenizer opens the folder.

        The originals byte for byte, and a tokenizer.json where there was none.
        """
        folder = Path(folder)
        originals = {saved_name(file): file for file in self._files}
        for name, file in originals.items():
            if not (folder / name).exists() or not file.samefile(folder / name):
                write_atomic(folder / name, file.read_bytes())
        made = {}
        if self._make_json and "tokenizer.json" not in originals:
            made["tokenizer.json"] = self._make_json(self)
        ends = {}
        for key, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if i is not None and i < self.n_vocab:
                ends[key] = self._bytes[i].decode()
        made["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.add_bos,
            **ends,
        }
        made["special_tokens_map.json"] = ends
        for name, content in made.items():
            if name not in originals:
                write_atomic(folder / name, json.dumps(content, ensure_ascii=False, indent=1))


def saved_name(file):
    """The name that a tokenizer's file is saved under: tokenizer.model for tokenizer.model.v1."""
    if file.name in FILES:
        return file.name
    return "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"


class Stream:
    """Decodes token by token: text comes out as soon as whole characters are there."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._strip = tokenizer._adds_space  # until the first text has come
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that id i completes."""
        raw = self._tokenizer.token_bytes(i)
        if self._strip and raw and i not in self._tokenizer.special_ids:
            raw = raw.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was not completed."""
        return self._decoder.decode(b"", True)


# ---- tiktoken's part


def _core(ranks, pattern, cut_id):
    """tiktoken's encoder. Without any special token it runs at half speed, so CUT is always one."""
    encoding = tiktoken.Encoding(
        "kit", pat_str=pattern, mergeable_ranks=ranks, special_tokens={CUT: cut_id}
    )
    return encoding._core_bpe


def _unreachable(core, ranks):
    """Tokens that merging never makes out of their own bytes.

    A byte that no token joins follows each, so that tiktoken has to merge instead of looking the
    whole token up.
    """
    used = set(b"".join(key for key in ranks if len(key) > 1))
    free = [byte for byte in (0xFF, 0xFE, 0xC0, 0xC1, *range(256)) if byte not in used]
    if not free:
        raise UserError("tokenizer: tokens that contain each of the 256 bytes are not supported")
    stop = bytes(free[:1])
    return {key for key, rank in ranks.items() if core.encode_single_piece(key + stop)[0] != rank}


def _finder(added):
    """A compiled search for added tokens, the longest first, with the spaces that some swallow.

    Bare literals (no groups), because `re` then jumps to their common first character.
    """
    if not added:
        return None
    literals = []
    for token in sorted(added, key=lambda token: -len(token["content"])):
        before = r"\s*" if token.get("lstrip") else ""
        after = r"\s*" if token.get("rstrip") else ""
        literals.append(before + re.escape(token["content"]) + after)
    return re.compile("|".join(literals))


def train_bpe(texts, n_vocab: int, digits: bool = True) -> Tokenizer:
    """Train a byte-level BPE of n_vocab tokens on an iterable of strings.

    It has fewer tokens where the text has no more pairs. Ids are simple: byte b is b, then the
    merges in order, and last "<|endoftext|>" (EOS). digits: every digit is a token of its own, so
    that numbers of one length look alike to the model. Same texts, same vocabulary.
    """
    spec = byte_level_bpe.train(texts, n_vocab, digits)
    vocabulary = from_json(spec, "the trained vocabulary")
    vocabulary.eos_id = spec["added_tokens"][0]["id"]
    vocabulary.make_json = lambda _: spec
    return Tokenizer(vocabulary)
