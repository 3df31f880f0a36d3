"""A model's tokenizer files said in tiktoken's language: what tokenizer.py's Tokenizer is made of.

tiktoken merges the neighbours whose joined bytes have the lowest rank. A byte-level merge list is such a rank list as
it stands. A SentencePiece vocabulary becomes one when every character is put together from its UTF-8 bytes (the lowest
ranks) before the pieces of several characters follow by score. Whatever does not fit is refused by name.
"""

import json
import re
import struct

import regex  # tiktoken's own dependency: \p{N} and friends

from common.errors import UserError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "\u2581"  # SentencePiece's visible space


def read_json(file):
    """The object in a JSON file; {} where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(
            f"tokenizer: {file} is not valid JSON ({error}); get the file again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"tokenizer: {file} holds {type(value).__name__}, wanted a JSON object")
    return value


def _refuse(where, what):
    raise UserError(
        f"tokenizer: {where}: {what} is not supported "
        "(supported: byte-level BPE, and SentencePiece BPE with byte fallback)"
    )


def from_json(spec, where):
    """Tokenizer's arguments from a tokenizer.json (as an object) of either family."""
    model, added = spec["model"], spec.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        _refuse(where, f"model type {model.get('type')!r}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(where, f"{key} {model[key]!r}")
    for token in added:
        if token.get("single_word"):
            _refuse(where, f"added token {token['content']!r} with single_word")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not model.get("byte_fallback"):
        return _byte_level(spec, model, merges, added, where)
    special = {a["content"] for a in added}
    byte_ids = {
        int(p[3:5], 16): i for p, i in model["vocab"].items() if re.fullmatch("<0x[0-9A-F]{2}>", p)
    }
    pieces = {
        p: i for p, i in model["vocab"].items() if p not in special and i not in byte_ids.values()
    }
    order = list(dict.fromkeys(a + b for a, b in merges))
    return _sentencepiece(pieces, order, byte_ids, added, _prefix_rule(spec, where), where)


def _byte_level(spec, model, merges, added, where):
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if [s["type"] for s in steps] not in ([], ["NFC"]):
        _refuse(where, f"normalizer {json.dumps(normalizer)[:200]}")
    pre = spec.get("pre_tokenizer") or {}
    rules, seen_bytes = [], False
    for step in pre.get("pretokenizers", [pre]):
        kind = step.get("type")
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            rules.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif kind == "Digits":
            rules.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space", True):
            seen_bytes = True
            rules += [GPT2] if step.get("use_regex", True) else []
        else:
            _refuse(where, f"pre-tokenizer {json.dumps(step)[:200]}")
    if not seen_bytes:
        _refuse(where, "a BPE model with neither a ByteLevel pre-tokenizer nor byte_fallback")
    *cuts, main = rules or [r"[\s\S]+"]
    for cut in cuts:  # one class of characters: what it matches cannot depend on the neighbours
        if not regex.fullmatch(r"(\\[pP]\{\w+\}|\\[dD]|\[[^\^\]\\]+\])(\+|\{\d+(,\d*)?\})?", cut):
            _refuse(where, f"a first split by {cut!r}")
    unknown = model["vocab"].get(model.get("unk_token"))
    raw = {c: b for b, c in enumerate(byte_names())}
    vocab = model["vocab"]
    ranks = {bytes([b]): b for b in range(256)}
    expand = [(vocab[c],) if c in vocab else () if unknown is None else (unknown,) for c in raw]
    for a, b in merges:
        key = bytes(raw[c] for c in a + b)
        if key not in ranks:
            ranks[key] = len(ranks)
            expand.append((vocab[a + b],))
    names = {a["content"] for a in added}
    table = {
        i: bytes(raw[c] for c in token)
        for token, i in vocab.items()
        if token not in names and raw.keys() >= set(token)
    }
    if model.get("ignore_merges") and (lone := set(table.values()) - ranks.keys()):
        _refuse(where, f"ignore_merges with {len(lone)} tokens that no merge makes")
    main = f"{main}|(?:(?!{main})[\\s\\S])+"  # Isolated keeps what no rule matches; tiktoken would drop it
    return dict(
        ranks=ranks,
        expand=expand,
        pattern=main,
        table=table,
        added=added,
        cuts=cuts,
        nfc=bool(steps),
        keep_unreachable=bool(model.get("ignore_merges")),
    )


def byte_names():
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _prefix_rule(spec, where):
    """When SentencePiece's leading space is added, read from a tokenizer.json's normalizer and pre-tokenizer."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return "always"
    if pre is None and steps == [replace]:
        return "never"
    if (
        pre
        and pre["type"] == "Metaspace"
        and pre["replacement"] == SPACE
        and not pre.get("split", True)
        and steps in ([], [replace])
    ):
        return {"always": "each", "first": "first", "never": "never"}[pre["prepend_scheme"]]
    _refuse(
        where,
        f"normalizer {json.dumps(normalizer)[:200]} with pre-tokenizer {json.dumps(pre)[:200]}",
    )


def _sentencepiece(pieces, order, byte_ids, added, prefix, where):
    """pieces: {piece: id}; order: those of several characters, the first to merge first; byte_ids: {byte: id}."""
    if len(byte_ids) < 256:
        _refuse(where, "SentencePiece without byte fallback")
    # A plain space stands for the visible one from here on: one byte instead of three, and most text stays as it is.
    pieces, order = (
        {p.replace(SPACE, " "): i for p, i in pieces.items()},
        [p.replace(SPACE, " ") for p in order],
    )
    ranks = {bytes([b]): b for b in range(256)}
    expand = [(pieces.get(chr(b), byte_ids[b]) if b < 128 else byte_ids[b],) for b in range(256)]
    if " " not in pieces:
        expand[0x20] = tuple(byte_ids[b] for b in SPACE.encode())
    for char in sorted(
        {c for piece in pieces for c in piece}
    ):  # each prefix, so that whole characters come first
        raw = char.encode()
        for n in range(2, len(raw) + 1):
            if raw[:n] not in ranks:
                ranks[raw[:n]] = len(ranks)
                expand.append(tuple(byte_ids[b] for b in raw[:n]))
        if len(raw) > 1 and char in pieces:
            expand[ranks[raw]] = (pieces[char],)
    for piece in order:
        ranks[piece.encode()] = len(ranks)
        expand.append((pieces[piece],))
    table = {i: piece.encode() for piece, i in pieces.items()} | {
        i: bytes([b]) for b, i in byte_ids.items()
    }
    inside = any(
        " " in piece.lstrip(" ") for piece in order
    )  # does a piece cross a border between words?
    pattern = r"[\s\S]+" if inside else " *[^ ]+| +"
    return dict(
        ranks=ranks, expand=expand, pattern=pattern, table=table, added=added, prefix=prefix
    )


def from_sentencepiece(file, added):
    """Tokenizer's arguments from a tokenizer.model, a protobuf of pieces (1), trainer_spec (2), normalizer_spec (3)."""
    try:
        data = file.read_bytes()
        pieces, trainer, normalizer = [], {}, {}
        for field, value in _protobuf(data):
            if field == 1:
                piece = dict(_protobuf(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append((piece[1].decode(), score, piece.get(3, 1)))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_protobuf(value))
    except (IndexError, KeyError, ValueError, TypeError, struct.error):
        raise UserError(
            f"tokenizer: {file} is not a SentencePiece model or is cut short; get it again"
        ) from None
    if not pieces:
        raise UserError(f"tokenizer: {file} is not a SentencePiece model: it has no pieces")
    if trainer.get(3, 1) != 2:
        _refuse(
            file,
            f"SentencePiece model type {({1: 'Unigram', 3: 'word', 4: 'char'}).get(trainer.get(3, 1), '?')}",
        )
    for field, default, wanted, name in (
        (2, b"", b"", "a normaliser's character map"),
        (5, 1, 1, "unescaped spaces"),
        (4, 1, 0, "removal of extra spaces"),
    ):
        if normalizer.get(field, default) != wanted:
            _refuse(file, name)
    if trainer.get(24, 0):
        _refuse(file, "space as a suffix")
    if any(kind in (4, 5) for _, _, kind in pieces):
        _refuse(file, "a user-defined or unused piece")
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == 1}
    # By score, not by id: runs of spaces stand last, and among equal ones the longer first.
    order = sorted(
        (p for p in ids if len(p) > 1),
        key=lambda p: (-pieces[ids[p]][1], -len(p) if not p.strip(SPACE) else 0, ids[p]),
    )
    byte_ids = {int(piece[3:5], 16): i for i, (piece, _, kind) in enumerate(pieces) if kind == 6}
    control = [
        {"content": p, "id": i, "special": True}
        for i, (p, _, kind) in enumerate(pieces)
        if kind in (2, 3)
    ]
    named = {a["content"] for a in control}
    control += [a for a in added if a["content"] not in named]
    prefix = "always" if normalizer.get(3, 1) else "never"
    bos, eos = trainer.get(41, 1), trainer.get(42, 2)
    bos, eos = (
        i if i < len(pieces) else None for i in (bos, eos)
    )  # -1 (none) reads as a huge number
    return dict(
        _sentencepiece(ids, order, byte_ids, control, prefix, file),
        bos_id=bos,
        eos_id=eos,
        make_json=lambda tokenizer: _sentencepiece_json(tokenizer, pieces, order, control),
    )


def _protobuf(data):
    """(field number, value) of a protobuf message: ints for varints, bytes for the rest."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[key & 7]
        size = varint() if size is None else size
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def added_beside(folder, config):
    """Added tokens of a folder with tokenizer.model only."""
    if "added_tokens_decoder" in config:
        return [{**token, "id": int(i)} for i, token in config["added_tokens_decoder"].items()]
    return [
        {"content": c, "id": i, "special": True}
        for c, i in read_json(folder / "added_tokens.json").items()
    ]


def _sentencepiece_json(tokenizer, pieces, order, added):
    """The tokenizer.json of a tokenizer.model: each piece's splits into two pieces, in the order of merging."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [
        [p[:n], p[n:]] for p in order for n in range(1, len(p)) if p[:n] in vocab and p[n:] in vocab
    ]
    names = {i: content for content, i in tokenizer.added.items()}
    bos = names.get(tokenizer.bos_id) if tokenizer.add_bos else None
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    first, second = ([{"Sequence": {"id": which, "type_id": n}}] for n, which in enumerate("AB"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    always = tokenizer.prefix == "always"
    flags = {key: False for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            flags | {k: v for k, v in a.items() if k in (*flags, "id", "content")} for a in added
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": ([{"type": "Prepend", "prepend": SPACE}] if always else []) + [replace],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start + first,
            "pair": start + first + start + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
            if bos
            else {},
        },
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
