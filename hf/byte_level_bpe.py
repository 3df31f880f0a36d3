"""Byte-level BPE (GPT-2, Llama-3, SmolLM2, Qwen2/3, DeepSeek-V3): tokenizer.json read, or trained.

Its list of merges is a list of ranks for tiktoken as it stands: the first merge has the lowest.
"""

import json
import re
import unicodedata

import regex  # tiktoken's own dependency: \p{N} and friends

from common.errors import UserError
from common.json_files import shown
from hf.vocabulary import Vocabulary, refuse

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Runs of one class of characters. Where they begin and end cannot depend on their neighbours, so
# the text can be cut at them before tiktoken sees it.
ONE_CLASS = r"(\\[pP]\{\w+\}|\\[dD]|\[[^\^\]\\]+\])(\+|\{\d+(,\d*)?\})?"


def byte_names():
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


# ---- tokenizer.json


def from_json(spec, merges, where):
    """The `Vocabulary` of a tokenizer.json (as an object); `merges`: pairs. Raises UserError."""
    model, vocab = spec["model"], spec["model"]["vocab"]
    added = spec.get("added_tokens") or []
    nfc = is_nfc(spec.get("normalizer") or {}, where)
    cuts, pattern = splits(spec.get("pre_tokenizer") or {}, where)
    byte_of = {name: byte for byte, name in enumerate(byte_names())}

    ranks = {bytes([byte]): byte for byte in range(256)}
    unknown = vocab.get(model.get("unk_token"))
    if unknown is not None and model.get("fuse_unk") and not byte_of.keys() <= vocab.keys():
        refuse(where, "fuse_unk in a vocabulary without all bytes")
    # a byte without a token, and no unk_token: refused when a text has it, not before
    without = () if unknown is None else (unknown,)
    expand = [(vocab[name],) if name in vocab else without for name in byte_of]
    for left, right in merges:
        key = bytes(byte_of[char] for char in left + right)
        if key not in ranks:
            ranks[key] = len(ranks)
            expand.append((vocab[left + right],))

    special = {token["content"] for token in added}
    table = {}
    for token, i in vocab.items():
        if token not in special and byte_of.keys() >= set(token):
            table[i] = bytes(byte_of[char] for char in token)

    whole_words = bool(model.get("ignore_merges"))
    if whole_words and (lone := set(table.values()) - ranks.keys()):
        refuse(where, f"ignore_merges with {len(lone)} tokens that no merge makes")
    return Vocabulary(
        ranks=ranks,
        expand=expand,
        pattern=pattern,
        table=table,
        added=added,
        cuts=tuple(cuts),
        nfc=nfc,
        keep_unreachable=whole_words,
    )


def is_nfc(normalizer, where):
    """Does tokenizer.json's normalizer bring the text into NFC? Any other one is refused."""
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if kinds not in ([], ["NFC"]):
        refuse(where, f"normalizer {json.dumps(normalizer)[:200]}")
    return kinds == ["NFC"]


def to_nfc(text):
    """The text in NFC as tokenizer.json means it: by the tables of `tokenizers`.

    They are older than Python's, which know the order of 98 combining marks more. What is in NFC
    by Python's is so by the older ones too, and that is nearly all text; to ask costs nothing.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str(text)


def splits(pre_tokenizer, where):
    """tokenizer.json's pre-tokenizer as regexes: those to cut at first, and the main pattern."""
    rules = []
    seen_bytes = False
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        kind = step.get("type")
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            rules.append(split_pattern(step["pattern"], where))
        elif kind == "Digits":
            rules.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space", True):
            seen_bytes = True
            if step.get("use_regex", True):
                rules.append(GPT2)
        else:
            refuse(where, f"pre-tokenizer {json.dumps(step)[:200]}")
    if not seen_bytes:
        refuse(where, "a BPE model with neither a ByteLevel pre-tokenizer nor byte_fallback")
    *cuts, main = rules or [r"[\s\S]+"]
    for cut in cuts:
        if not regex.fullmatch(ONE_CLASS, cut):
            refuse(where, f"a first split by {cut!r}")
    # "Isolated" keeps what no rule matches; tiktoken would drop it
    return cuts, f"{main}|(?:(?!{main})[\\s\\S])+"


def split_pattern(pattern, where):
    """The regex of a "Split". Refused where it is none, or would split at every character."""
    rule = pattern.get("Regex") or re.escape(pattern["String"])
    try:
        empty = regex.compile(rule).fullmatch("")
    except (regex.error, TypeError, OverflowError, RecursionError) as error:
        refuse(where, f"the split by {shown(rule)} ({error})")
    if empty:
        refuse(where, f"the split by {shown(rule)}, which matches nothing,")
    return rule


# ---- training


def train(texts, n_vocab, digits):
    """The tokenizer.json (as an object) of a vocabulary trained on `texts`; see train_bpe."""
    import tokenizers  # slow to import, and needed here alone
    from tokenizers import models, pre_tokenizers, trainers

    if n_vocab < 257:
        raise UserError(
            f"tokenizer: got a vocabulary of {n_vocab}, "
            "wanted at least 257 (256 bytes and one token more)"
        )
    pattern = GPT2
    if digits:
        pattern = GPT2.replace(r" ?\p{N}+", r"\p{N}")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,  # <|endoftext|> is the last
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(texts, trainer)

    spec = json.loads(trained.to_str())
    merged = [left + right for left, right in spec["model"]["merges"]]
    # tokenizers orders the bytes by their names; here byte b gets id b
    names = [*byte_names(), *dict.fromkeys(merged)]
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names)}
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
    return spec
