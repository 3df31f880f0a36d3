"""A model's vocabulary in tiktoken's language: what a Tokenizer is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.json_files import shown

LARGEST_ID = 1 << 24  # many times the largest vocabulary's
LONGEST_TOKEN = 1024  # bytes, several times the longest in use


@dataclass
class Vocabulary:
    """What decides a text's ids, and what is needed to save the tokenizer again.

    tiktoken merges the neighbours whose joined bytes have the lowest rank. Ranks stay internal:
    `expand` turns them into the model's ids.
    """

    ranks: dict  # {bytes: rank}, in order of rank
    expand: list  # expand[rank]: the model's ids for it; () where the model has none
    pattern: str  # regex: what merges only within itself
    table: dict  # {id: bytes}
    added: list  # tokenizer.json's added_tokens
    cuts: tuple = ()  # regexes to cut the text at, before `pattern`
    nfc: bool = False  # is the text brought into NFC first?
    # When SentencePiece's leading space is added: "always", "never", or, unless one is there, for
    # "each" part between special tokens or the "first". None: byte-level, no such space.
    prefix: str | None = None
    keep_unreachable: bool = False  # take tokens that are whole words although no merge makes them
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False  # does the model expect BOS in front of a document?
    make_json: Callable | None = None  # Tokenizer -> the tokenizer.json to save where there is none
    files: list[Path] = field(default_factory=list)  # those to copy when the tokenizer is saved


def check(vocabulary, where):
    """Refuse what a damaged file says: ids out of range, empty tokens, one id or token twice."""
    added = vocabulary.added
    contents = [token["content"] for token in added]
    ids = [token["id"] for token in added]
    if not all(isinstance(content, str) and content for content in contents):
        broken(where, "an added token without a text")
    if len(set(contents)) < len(added) or len(set(ids)) < len(added):
        broken(where, "an added token, or the id of one, that stands twice")
    for i in (*ids, *vocabulary.table):
        if type(i) is not int or not 0 <= i < LARGEST_ID:
            broken(where, f"the id {shown(i)}, wanted 0 to {LARGEST_ID - 1}")
    if len(vocabulary.ranks) < len(vocabulary.expand):
        broken(where, "one token twice")
    longest = max(map(len, vocabulary.ranks))
    if longest > LONGEST_TOKEN:
        broken(where, f"a token of {longest:,} bytes, wanted at most {LONGEST_TOKEN}")


def broken(where, what):
    """Raise the UserError of a damaged file."""
    raise UserError(f"tokenizer: {where} has {what}; get it again")


def refuse(where, what):
    """Raise the UserError of a feature that the kit does not have."""
    raise UserError(
        f"tokenizer: {where}: {what} is not supported "
        "(supported: byte-level BPE, and SentencePiece BPE with byte fallback)"
    )
