"""SentencePiece BPE with byte fallback (Llama-2, TinyLlama, Rho-1, Mistral): both of its files.

tokenizer.model holds pieces with scores, tokenizer.json the same pieces with merges. Either becomes
a list of ranks for tiktoken once every character is put together from its UTF-8 bytes (the lowest
ranks) before the pieces of several characters follow.

The reader of protobuf is ours: sentencepiece's own module for it needs the protobuf package in a
version that sentencepiece does not name, and is no shorter to use (numbers in LOG.md).
"""

import json
import re
import struct
from enum import IntEnum
from functools import partial

from common.errors import UserError
from common.json_files import regular_size
from hf.vocabulary import Vocabulary, refuse

SPACE = "\u2581"  # SentencePiece's visible space
SPACES_SHOWN = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
LARGEST_MODEL = 64_000_000  # bytes, over ten times the largest in use: no file keeps us for minutes


class Kind(IntEnum):
    """The types of pieces in a tokenizer.model."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# ---- pieces to ranks


def vocabulary(pieces, order, byte_ids, added, prefix, where):
    """The `Vocabulary` of either file.

    pieces: {piece: id}; order: those of several characters, the first to merge first;
    byte_ids: {byte: id}.
    """
    if len(byte_ids) < 256:
        refuse(where, "SentencePiece without byte fallback")
    # A plain space stands for the visible one from here on: one byte instead of three, and most
    # text stays as it is.
    pieces = {piece.replace(SPACE, " "): i for piece, i in pieces.items()}
    order = [piece.replace(SPACE, " ") for piece in order]
    ranks, expand = character_ranks(pieces, byte_ids)
    for piece in order:
        ranks[piece.encode()] = len(ranks)
        expand.append((pieces[piece],))
    table = {i: piece.encode() for piece, i in pieces.items()}
    table.update((i, bytes([byte])) for byte, i in byte_ids.items())
    across_words = any(" " in piece.lstrip(" ") for piece in order)
    return Vocabulary(
        ranks=ranks,
        expand=expand,
        pattern=r"[\s\S]+" if across_words else " *[^ ]+| +",
        table=table,
        added=added,
        prefix=prefix,
    )


def character_ranks(pieces, byte_ids):
    """(ranks, expand) of the 256 bytes and of whole characters, each after all its prefixes."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    expand = [(byte_ids[byte],) for byte in range(256)]
    for byte in range(128):
        expand[byte] = (pieces.get(chr(byte), byte_ids[byte]),)
    if " " not in pieces:  # then the bytes of the visible space
        expand[0x20] = tuple(byte_ids[byte] for byte in SPACE.encode())
    for char in sorted(set("".join(pieces))):
        raw = char.encode()
        for n in range(2, len(raw) + 1):
            if raw[:n] not in ranks:
                ranks[raw[:n]] = len(ranks)
                expand.append(tuple(byte_ids[byte] for byte in raw[:n]))
        if len(raw) > 1 and char in pieces:
            expand[ranks[raw]] = (pieces[char],)
    return ranks, expand


# ---- tokenizer.json in


def from_json(spec, merges, where):
    """The `Vocabulary` of a tokenizer.json (as an object); `merges`: pairs. Raises UserError."""
    added = spec.get("added_tokens") or []
    special = {token["content"] for token in added}
    vocab = spec["model"]["vocab"]
    byte_ids = bytes_among(vocab.items())
    taken = set(byte_ids.values())
    pieces = {p: i for p, i in vocab.items() if p not in special and i not in taken}
    order = list(dict.fromkeys(left + right for left, right in merges))
    return vocabulary(pieces, order, byte_ids, added, prefix_rule(spec, where), where)


def bytes_among(pieces):
    """{byte: id} of the pieces <0x00> to <0xFF> among (piece, id) pairs."""
    byte_ids = {}
    for piece, i in pieces:
        if match := BYTE_PIECE.fullmatch(piece):
            byte_ids[int(match[1], 16)] = i
    return byte_ids


def prefix_rule(spec, where):
    """When the leading space is added, from a tokenizer.json's normalizer and pre-tokenizer."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = []
    if normalizer:
        steps = normalizer.get("normalizers", [normalizer])
    if pre is None:
        if steps == [{"type": "Prepend", "prepend": SPACE}, SPACES_SHOWN]:
            return "always"
        if steps == [SPACES_SHOWN]:
            return "never"
    elif (
        pre["type"] == "Metaspace"
        and pre["replacement"] == SPACE
        and not pre.get("split", True)
        and steps in ([], [SPACES_SHOWN])
    ):
        return {"always": "each", "first": "first", "never": "never"}[pre["prepend_scheme"]]
    shown, shown_pre = (json.dumps(value)[:200] for value in (normalizer, pre))
    refuse(where, f"normalizer {shown} with pre-tokenizer {shown_pre}")


# ---- tokenizer.model in


def from_model(file, added):
    """The `Vocabulary` of a tokenizer.model; `added`: tokens beside it. Raises UserError."""
    pieces, trainer, normalizer = read_model(file)
    check_model(file, pieces, trainer, normalizer)
    ids = {}
    byte_pieces = []
    specials = []
    for i, (piece, _, kind) in enumerate(pieces):
        if kind == Kind.NORMAL:
            ids[piece] = i
        elif kind == Kind.BYTE:
            byte_pieces.append((piece, i))
        else:
            specials.append({"content": piece, "id": i, "special": True})
    known = {token["content"] for token in specials}
    specials += [token for token in added if token["content"] not in known]
    order = merge_order(ids, pieces)
    prefix = "always" if normalizer.get("add_dummy_prefix", 1) else "never"
    result = vocabulary(ids, order, bytes_among(byte_pieces), specials, prefix, file)
    # -1 (none) reads as a huge number
    bos_id = trainer.get("bos_id", 1)
    eos_id = trainer.get("eos_id", 2)
    result.bos_id = bos_id if bos_id < len(pieces) else None
    result.eos_id = eos_id if eos_id < len(pieces) else None
    result.make_json = partial(to_json, pieces=pieces, order=order, added=specials)
    return result


def merge_order(ids, pieces):
    """The pieces of several characters, the first to merge first: by score, not by id.

    Runs of spaces stand last; among those of one score the longer merge first.
    """

    def key(piece):
        i = ids[piece]
        only_spaces = not piece.strip(SPACE)
        length = -len(piece) if only_spaces else 0
        return -pieces[i][1], length, i

    return sorted((piece for piece in ids if len(piece) > 1), key=key)


def check_model(file, pieces, trainer, normalizer):
    """Refuse a tokenizer.model that would give other ids here than in sentencepiece."""
    if not pieces:
        raise UserError(f"tokenizer: {file} is not a SentencePiece model: it has no pieces")
    model_type = trainer.get("model_type", 1)
    if model_type != 2:
        name = {1: "Unigram", 3: "word", 4: "char"}.get(model_type, "?")
        refuse(file, f"SentencePiece model type {name}")
    if normalizer.get("precompiled_charsmap"):
        refuse(file, "a normaliser's character map")
    if normalizer.get("escape_whitespaces", 1) != 1:
        refuse(file, "unescaped spaces")
    if normalizer.get("remove_extra_whitespaces", 1) != 0:
        refuse(file, "removal of extra spaces")
    if trainer.get("treat_whitespace_as_suffix", 0):
        refuse(file, "space as a suffix")
    if any(kind in (Kind.USER_DEFINED, Kind.UNUSED) for _, _, kind in pieces):
        refuse(file, "a user-defined or unused piece")


# The numbers of sentencepiece_model.proto, of those fields that are read here.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_FIELDS = {1: "piece", 2: "score", 3: "type"}
TRAINER_FIELDS = {3: "model_type", 24: "treat_whitespace_as_suffix", 41: "bos_id", 42: "eos_id"}
NORMALIZER_FIELDS = {
    2: "precompiled_charsmap",
    3: "add_dummy_prefix",
    4: "remove_extra_whitespaces",
    5: "escape_whitespaces",
}


def read_model(file):
    """[(piece, score, kind)], trainer spec and normaliser spec of a tokenizer.model."""
    size = regular_size(file, "tokenizer")
    if size > LARGEST_MODEL:
        raise UserError(f"tokenizer: {file} is not a SentencePiece model: it has {size:,} bytes")
    pieces = []
    trainer = {}
    normalizer = {}
    try:
        for number, value in protobuf(file.read_bytes()):
            if number == PIECES:
                piece = message(value, PIECE_FIELDS)
                score = struct.unpack("<f", piece.get("score", bytes(4)))[0]
                pieces.append((piece["piece"].decode(), score, piece.get("type", Kind.NORMAL)))
            elif number == TRAINER:
                trainer.update(message(value, TRAINER_FIELDS))
            elif number == NORMALIZER:
                normalizer.update(message(value, NORMALIZER_FIELDS))
    except (LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise UserError(
            f"tokenizer: {file} is not a SentencePiece model or is cut short; get it again"
        ) from None
    return pieces, trainer, normalizer


def message(data, names):
    """{name: value} of a protobuf message's fields that `names` ({number: name}) has."""
    return {names[number]: value for number, value in protobuf(data) if number in names}


def protobuf(data):
    """(field number, value) of each field of a protobuf message: ints for varints, else bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = varint(data, at)
        else:
            if wire_type == 2:
                size, at = varint(data, at)
            else:
                size = {1: 8, 5: 4}[wire_type]
            value = data[at : at + size]
            if len(value) < size:
                raise ValueError("cut short")
            at += size
        yield number, value


def varint(data, at):
    """(value, where the next one begins). At most ten bytes, or a hostile file takes hours."""
    value = data[at] & 127
    shift = 0
    while data[at] > 127:
        at += 1
        shift += 7
        value |= (data[at] & 127) << shift
        if shift > 63:
            raise ValueError("a number too long")
    return value, at + 1


# ---- tokenizer.json out


def to_json(tokenizer, pieces, order, added):
    """The tokenizer.json of a tokenizer.model; its merges: each piece of `order` split in two."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece in order:
        for n in range(1, len(piece)):
            if piece[:n] in vocab and piece[n:] in vocab:
                merges.append([piece[:n], piece[n:]])
    always = tokenizer.prefix == "always"
    prepend = [{"type": "Prepend", "prepend": SPACE}] if always else []
    names = {i: content for content, i in tokenizer.added.items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    kept = (*flags, "id", "content")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [flags | {k: v for k, v in a.items() if k in kept} for a in added],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, SPACES_SHOWN]},
        "pre_tokenizer": None,
        "post_processor": post_processor(tokenizer, names),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": int(always), "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names.get(0),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def post_processor(tokenizer, names):
    """tokenizer.json's post_processor: BOS in front of a text where the model expects it."""
    first, second = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
    start, special_tokens = [], {}
    bos = names.get(tokenizer.bos_id)
    if tokenizer.add_bos and bos:
        start = [{"SpecialToken": {"id": bos, "type_id": 0}}]
        special_tokens = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, *start, second],
        "special_tokens": special_tokens,
    }
