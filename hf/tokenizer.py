"""Text <-> ids for every model the kit loads, all of it through tiktoken and equal to the model's own tokenizer.

Two families are read, from the files that lie beside a Hugging Face checkpoint:
  SentencePiece BPE with byte fallback (Llama-2, TinyLlama, Rho-1, Mistral-v0.1): tokenizer.model or tokenizer.json
  byte-level BPE (GPT-2, Llama-3, SmolLM2, Qwen2/3, DeepSeek):                    tokenizer.json
and a byte-level vocabulary can be trained (train_bpe). Anything else is refused by name.

vocabulary.py says a model's files in tiktoken's language; tiktoken's ids ("ranks" below) stay internal, and one numpy
look-up turns them into the model's.
"""

import codecs
import hashlib
import json
import re
import shutil
import unicodedata
from functools import cached_property
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency: \p{N} and friends
import tiktoken

from common.errors import UserError
from common.files import write_atomic
from hf.tokenizer_files import (
    GPT2,
    SPACE,
    added_beside,
    byte_names,
    from_json,
    from_sentencepiece,
    read_json,
)

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CUT = "\0\uffff"  # stands between parts that no token may join; begins in ASCII because tiktoken steps by one byte
HOLE = 0xFFFFFFFF  # a rank that is not exactly one id of the model


class Tokenizer:
    """One vocabulary. Made by `Tokenizer.load` or `train_bpe`.

    n_vocab: largest id + 1 (a model's padded vocab_size may be larger); bos_id, eos_id: int or None; add_bos: whether
    the model expects BOS in front of a document; hash: sha256 of what decides the ids, not of the files.
    """

    def __init__(
        self,
        ranks,
        expand,
        pattern,
        table,
        added,
        cuts=(),
        nfc=False,
        prefix=None,
        keep_unreachable=False,
        bos_id=None,
        eos_id=None,
        make_json=None,
    ):
        """ranks: {bytes: rank}; expand[rank]: the model's ids for it; pattern: what may merge; table: {id: bytes};
        added: tokenizer.json's added_tokens; cuts: regexes to cut at before `pattern`; prefix: None for byte-level,
        else when SentencePiece's leading space is added: "always", "never", or, unless one is there, "each", "first";
        make_json(tokenizer): the tokenizer.json to save where there is none to copy.
        """
        self.cuts, self.nfc, self.prefix, self.pattern = (
            [regex.compile(f"({c})") for c in cuts],
            nfc,
            prefix,
            pattern,
        )
        self._cut_id, self._allowed = len(expand), frozenset([CUT] if cuts else [])
        self._core = _core(ranks, pattern, self._cut_id)
        lost = () if keep_unreachable else _unreachable(self._core, ranks)
        if lost:  # tiktoken would take such a token when it is a whole word; the model's tokenizer never does
            ranks = {key: rank for key, rank in ranks.items() if key not in lost}
            self._core = _core(ranks, pattern, self._cut_id)
        self._order = [key for key in ranks if len(key) > 1]
        self._expand = expand
        self._ids = np.array(
            [ids[0] if len(ids) == 1 else HOLE for ids in expand] + [HOLE], np.uint32
        )
        self.added = {a["content"]: a["id"] for a in added}
        self._bytes = [b""] * (1 + max([*table, *self.added.values()]))
        for i, raw in table.items():
            self._bytes[i] = raw
        for content, i in self.added.items():
            self._bytes[i] = content.encode()
        self.n_vocab = len(self._bytes)
        self.special_ids = frozenset(self.added.values())
        self._find_all = _finder(added)
        self._find_plain = _finder(
            [a for a in added if not a.get("special")]
        )  # as in `tokenizers`: always parsed
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, False
        self._make_json, self._files = make_json, []  # the files that save() copies

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """From a folder with tokenizer.json and/or tokenizer.model, or from one such file (tokenizer_config.json and
        config.json are then looked for beside it). Where a SentencePiece model has both, tokenizer.model decides.
        Raises UserError naming whatever is missing, broken or not supported."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        beside = [file for file in (folder / name for name in FILES) if file.exists()]
        if path.is_dir():
            as_json, as_model, files = folder / "tokenizer.json", folder / "tokenizer.model", beside
        else:
            as_json, as_model = (path, None) if path.suffix == ".json" else (None, path)
            files = [path] + [
                file for file in beside if file.name not in ("tokenizer.json", "tokenizer.model")
            ]
        as_json, as_model = (
            file if file and file.exists() else None for file in (as_json, as_model)
        )
        if not as_json and not as_model:
            raise UserError(
                f"tokenizer: {path} "
                + (
                    "has neither tokenizer.json nor tokenizer.model"
                    if path.is_dir()
                    else "does not exist; give a folder with tokenizer.json or tokenizer.model"
                )
            )
        spec = read_json(as_json) if as_json else {}
        config = read_json(folder / "special_tokens_map.json") | {
            key: value
            for key, value in read_json(folder / "tokenizer_config.json").items()
            if value is not None
        }
        try:
            if as_json and not (as_model and spec["model"].get("byte_fallback")):
                tokenizer = cls(**from_json(spec, as_json))
            else:
                added = spec["added_tokens"] if spec else added_beside(folder, config)
                tokenizer = cls(**from_sentencepiece(as_model, added))
            tokenizer._read_ends(spec, config, read_json(folder / "config.json"))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"tokenizer: {as_json or path} or a file beside it is not complete ({error!r})"
            ) from None
        tokenizer._files = files
        return tokenizer

    def _read_ends(self, spec, config, model_config):
        """bos_id, eos_id, add_bos: from tokenizer_config.json, else config.json, else the vocabulary's own file."""
        post = spec.get("post_processor") or {}
        templates = [
            p["single"]
            for p in post.get("processors", [post])
            if p.get("type") == "TemplateProcessing"
        ]
        first = (
            templates[0][0].get("SpecialToken", {}).get("id")
            if templates and templates[0]
            else None
        )
        if first is not None:
            self.bos_id = self.added[first]
        for end in ("bos_id", "eos_id"):
            token, i = config.get(end[:3] + "_token"), model_config.get(end[:3] + "_token_id")
            token = token["content"] if isinstance(token, dict) else token
            i = i[0] if isinstance(i, list) else i
            if token is not None:
                i = self.added.get(token)
                if i is None and token.encode() not in self._bytes:
                    raise UserError(
                        f"tokenizer: the {end[:3]}_token that tokenizer_config.json or "
                        f"special_tokens_map.json names, {token!r}, is not in the vocabulary"
                    )
                i = self._bytes.index(token.encode()) if i is None else i
            if i is not None:
                setattr(self, end, i)
        add = config.get("add_bos_token")
        if add is None:  # LlamaTokenizer's own default is to add it
            add = (
                first is not None
                or not spec
                or "LlamaTokenizer" in config.get("tokenizer_class", "")
            )
        self.add_bos = bool(add) and self.bos_id is not None

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of id -> bytes, the merge order, the special tokens and the rules of splitting: equal where the
        same vocabulary was read from tokenizer.model and from tokenizer.json."""
        rules = [
            self.pattern,
            [c.pattern for c in self.cuts],
            self.nfc,
            self.prefix,
            sorted(self.added.items()),
        ]
        order = self._order
        if (
            self.prefix is not None
        ):  # the two files order runs of spaces differently to one effect: compare the effect
            order = [key if key.strip(b" ") else b" " for key in order]
            rules.append(
                [self._core.encode_single_piece(b" " * n + b"\xff")[:-1] for n in range(2, 130)]
            )
            rules[-1] = [self._ids[run].tolist() for run in rules[-1]]
        digest = hashlib.sha256(json.dumps(rules).encode())
        for part in (self._bytes, order):
            digest.update(np.array([len(b) for b in part], "<u4").tobytes() + b"".join(part))
        return digest.hexdigest()

    # ---- encoding

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """uint32 ids (n,), without BOS or EOS. specials=True parses special tokens written in the text; otherwise
        "</s>" is four characters like any others. Raises UserError for text with lone surrogates."""
        find = self._find_all if specials else self._find_plain
        if find is None or (match := find.search(text)) is None:
            return self._encode_part(text, True)
        parts, at = [], 0
        while match:
            if match.start() > at:
                parts.append(self._encode_part(text[at : match.start()], at == 0))
            token = (
                match[0]
                if match[0] in self.added
                else max((c for c in self.added if c in match[0]), key=len)
            )
            parts.append(np.array([self.added[token]], np.uint32))
            at = match.end()
            match = find.search(text, at)
        parts.append(self._encode_part(text[at:], False))
        return np.concatenate(parts)

    def _encode_part(self, text, first):
        """Text without special tokens; first: it begins the document."""
        if not text:
            return np.zeros(0, np.uint32)
        if self.nfc and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if self.prefix is not None:
            text = text.replace(SPACE, " ")
            if (
                self.prefix == "always"
                or (self.prefix == "each" or self.prefix == "first" and first)
                and not text.startswith(" ")
            ):
                text = " " + text
        try:
            marked = text
            for cut in self.cuts:
                marked = cut.sub(rf"{CUT}\1{CUT}", marked)
            if self.cuts and CUT in text:
                ranks = self._slow_ranks(text)
            else:
                ranks = np.frombuffer(
                    self._core.encode_to_tiktoken_buffer(marked, self._allowed), np.uint32
                )
        except UnicodeEncodeError as error:
            raise UserError(
                f"tokenizer: the text has a lone surrogate ({error.object[error.start]!r} at character "
                f"{error.start}), which is not Unicode text; drop or repair the document"
            ) from None
        except (
            ValueError
        ):  # half a million spaces in a row overflow the stack of tiktoken's regex engine
            ranks = self._slow_ranks(text)
        return self._to_ids(ranks[ranks != self._cut_id] if self.cuts else ranks)

    def _slow_ranks(self, text):
        """The same ranks, split by Python's regex module."""
        pieces = [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in cut.split(piece) if part]
        words = (
            match[0].encode() for piece in pieces for match in regex.finditer(self.pattern, piece)
        )
        return np.array(
            [rank for word in words for rank in self._core.encode_single_piece(word)], np.uint32
        )

    def _to_ids(self, ranks):
        ids = self._ids.take(ranks)  # several times faster than self._ids[ranks]
        if ids.max() != HOLE:
            return ids
        holes = np.flatnonzero(ids == HOLE)
        more = [self._expand[r] for r in ranks[holes].tolist()]
        if not all(more):
            bad = next(int(r) for r, m in zip(ranks[holes], more) if not m)
            raise UserError(
                f"tokenizer: the vocabulary has no token for byte 0x{bad:02X} of the text and no unk_token"
            )
        counts = np.ones(len(ids), np.int64)
        counts[holes] = [len(m) for m in more]
        ids = np.repeat(ids, counts)
        ids[ids == HOLE] = [i for m in more for i in m]
        return ids

    def encode_batch(self, texts) -> list[np.ndarray]:
        """encode() of each text."""
        return [self.encode(text) for text in texts]

    # ---- decoding

    def token_bytes(self, i: int) -> bytes:
        """The bytes that id i stands for (SentencePiece's visible space as a space; a special token as its name; b""
        for an id that no token has). In byte-level text, sums of their lengths are each token's offset in bytes; in
        SentencePiece text the first byte is the leading space that the encoder added."""
        if i < 0:
            raise UserError(f"tokenizer: got id {i}, wanted 0 or more")
        return self._bytes[i] if i < self.n_vocab else b""

    def decode(self, ids) -> str:
        """Text of the ids: bytes joined, broken UTF-8 replaced by U+FFFD, special tokens by their names. SentencePiece:
        without the leading space that encode() added."""
        ids = np.asarray(ids).tolist()
        parts = [self.token_bytes(i) for i in ids]
        if self.prefix not in (None, "never"):
            at = next(
                (at for at, i in enumerate(ids) if i not in self.special_ids and parts[at]), None
            )
            if at is not None:
                parts[at] = parts[at].removeprefix(b" ")
        return b"".join(parts).decode("utf-8", "replace")

    def stream(self) -> "Stream":
        """For text that arrives token by token: .push(id) -> str as soon as whole characters are there, .flush()."""
        return Stream(self)

    def save(self, folder):
        """Write the tokenizer files: the originals byte for byte, and a tokenizer.json where there was none, so that
        transformers' AutoTokenizer opens the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {}
        for file in self._files:
            other = (
                "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
            )  # tokenizer.model.v1, say
            names[file.name if file.name in FILES else other] = file
        for name, file in names.items():
            if not (folder / name).exists() or not file.samefile(folder / name):
                shutil.copyfile(file, folder / name)
        ends = {
            f"{end}_token": self._bytes[i].decode()
            for end, i in (("bos", self.bos_id), ("eos", self.eos_id))
            if i is not None and i < self.n_vocab
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.add_bos,
            **ends,
        }
        for name, make in (
            ("tokenizer.json", self._make_json),
            ("tokenizer_config.json", lambda _: config),
            ("special_tokens_map.json", lambda _: ends),
        ):
            if make and name not in names:
                write_atomic(folder / name, json.dumps(make(self), ensure_ascii=False, indent=1))


class Stream:
    """Decodes token by token; see Tokenizer.stream."""

    def __init__(self, tokenizer):
        self._tokenizer, self._strip = tokenizer, tokenizer.prefix not in (None, "never")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        raw = self._tokenizer.token_bytes(i)
        if self._strip and raw and i not in self._tokenizer.special_ids:
            raw, self._strip = raw.removeprefix(b" "), False
        return self._decoder.decode(raw)

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


# ---- tiktoken's part


def _core(ranks, pattern, cut_id):
    """tiktoken's encoder. CUT is registered even where unused: with no special token at all it runs at half speed."""
    return tiktoken.Encoding(
        "kit", pat_str=pattern, mergeable_ranks=ranks, special_tokens={CUT: cut_id}
    )._core_bpe


def _unreachable(core, ranks):
    """Tokens that merging never makes out of their own bytes. A byte that no token joins follows each, so that tiktoken
    has to merge instead of looking the whole token up."""
    used = set(b"".join(key for key in ranks if len(key) > 1))
    stop = next((bytes([b]) for b in (0xFF, 0xFE, 0xC0, 0xC1, *range(256)) if b not in used), None)
    if stop is None:
        raise UserError("tokenizer: tokens that contain each of the 256 bytes are not supported")
    return {key for key, rank in ranks.items() if core.encode_single_piece(key + stop)[0] != rank}


def _finder(added):
    """A compiled search for added tokens, the longest first, with the spaces that some of them swallow. Bare literals
    (no groups), because `re` then jumps to their common first character."""
    if not added:
        return None
    longest = sorted(added, key=lambda a: -len(a["content"]))
    return re.compile(
        "|".join(
            (r"\s*" if a.get("lstrip") else "")
            + re.escape(a["content"])
            + (r"\s*" if a.get("rstrip") else "")
            for a in longest
        )
    )


def train_bpe(texts, n_vocab: int, digits: bool = True) -> Tokenizer:
    """Train a byte-level BPE of n_vocab tokens (fewer where the text has no more pairs) on an iterable of strings.

    Ids are simple: byte b is b, then the merges in order, and last "<|endoftext|>" (EOS). digits: every digit is a
    token of its own, so that numbers of one length look alike to the model. Same texts, same vocabulary."""
    import tokenizers  # slow to import, and needed here alone
    from tokenizers import models, pre_tokenizers, trainers

    if n_vocab < 257:
        raise UserError(
            f"tokenizer: got a vocabulary of {n_vocab}, wanted at least 257 (256 bytes and one token more)"
        )
    split = GPT2.replace(r" ?\p{N}+", r"\p{N}") if digits else GPT2
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=n_vocab - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    spec = json.loads(trained.to_str())
    merges = spec["model"]["merges"]
    names = [*byte_names(), *dict.fromkeys(a + b for a, b in merges)]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(names)}
    spec["added_tokens"] = [
        {
            "id": len(names),
            "content": "<|endoftext|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    spec["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return Tokenizer(
        **from_json(spec, "the trained vocabulary"), eos_id=len(names), make_json=lambda _: spec
    )
