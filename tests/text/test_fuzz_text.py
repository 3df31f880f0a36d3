"""Files of every text format, made by rule and then broken: a token set, or one line.

Memory is bounded, too: nothing that is read is longer than the limit that is given.
"""

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import folder_fixture, texts_fixture  # noqa: F401 (fixtures)

import prepare
from common.errors import UserError
from data import TokenSet
from hf.tokenizer import Tokenizer
from text import reading

LIMIT = 400  # --max-document-bytes
FORMS = (
    "text",
    "content",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "query",
    "question",
)
FORMS += ("response", "instruction", "input", "output", "answer", "role", "from", "value")

texts = st.text(max_size=40) | st.sampled_from(
    ["the sum", "```output\n5\n```\n", "\ud800", "\0", "\r\n", " ", "x" * 500, "\ufeff", "</s>"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FORMS) | texts, inner, max_size=3)
    ),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "gpt", "human", "tool"]) | values
turns = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts})
    | st.fixed_dictionaries({"from": roles, "value": values})
    | values,
    max_size=4,
)
records = (
    st.fixed_dictionaries({"text": texts})
    | st.fixed_dictionaries({"question": texts, "answer": values})
    | st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts})
    | st.fixed_dictionaries({"messages": turns})
    | st.fixed_dictionaries({"conversations": turns})
    | st.fixed_dictionaries({"prompt": texts, "completion": texts})
    | values
)
ends = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "", ",\n"])
odd_lines = st.sampled_from(
    ['{"text": }', "[", '"', "\\", '{"text": "a', "NaN", "1" * 4400, "[" * 999]
)
endings = st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".txt"])


@st.composite
def lines(draw):
    parts = []
    for record in draw(st.lists(records, max_size=5)):
        odd = draw(st.integers(0, 9)) == 0
        parts.append(
            draw(odd_lines) if odd else json.dumps(record, ensure_ascii=draw(st.booleans()))
        )
        parts.append(draw(ends))
    return "".join(parts).encode(errors="surrogatepass")


@st.composite
def arrays(draw):
    elements = [json.dumps(record) for record in draw(st.lists(records, max_size=5))]
    between = draw(st.sampled_from([",", ",\n", " , ", ",,", " "]))
    behind = draw(st.sampled_from(["", "", "", "\n", "x", "[1]", "," * 9]))
    return ("[" + between.join(elements) + "]" + behind).encode(errors="surrogatepass")


@st.composite
def tables(draw):
    """A parquet file: columns of one type each, which pyarrow guesses."""
    n = draw(st.integers(0, 4))
    column = (
        st.lists(st.text(max_size=30) | st.none(), min_size=n, max_size=n)
        | st.lists(st.binary(max_size=30), min_size=n, max_size=n)
        | st.lists(st.integers(0, 9), min_size=n, max_size=n)
        | st.lists(st.lists(st.text(max_size=9), max_size=2), min_size=n, max_size=n)
        | st.lists(
            st.lists(
                st.fixed_dictionaries(
                    {"role": st.just("assistant"), "content": st.text(max_size=9)}
                ),
                max_size=2,
            ),
            min_size=n,
            max_size=n,
        )
    )
    table = pyarrow.table(draw(st.dictionaries(st.sampled_from(FORMS), column, max_size=3)))
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        out,
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        use_dictionary=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
        row_group_size=draw(st.integers(1, 4)),
    )
    return out.getvalue()


def packed(content, ending, cut):
    """As the ending says; in two members or frames."""
    if ending.endswith(".gz"):
        return gzip.compress(content[:cut]) + gzip.compress(content[cut:])
    if ending.endswith(".zst"):
        return zstandard.compress(content[:cut]) + zstandard.compress(content[cut:])
    return content


def broken(draw, content):
    """The bytes, mostly whole; else with some overwritten, cut off, put in or twice."""
    how = draw(st.sampled_from(["whole"] * 4 + ["flip", "cut", "insert", "twice", "zeros"]))
    at = draw(st.integers(0, len(content)))
    some = draw(st.binary(min_size=1, max_size=4))
    return {
        "whole": content,
        "flip": content[:at] + some + content[at + len(some) :],
        "cut": content[:at],
        "insert": content[:at] + some + content[at:],
        "twice": content + content[at:],
        "zeros": content[:at] + b"\0" * len(content[at:]),
    }[how]


@st.composite
def files(draw):
    """(ending, bytes)"""
    ending = draw(endings)
    if ending == ".parquet":
        content = draw(tables())
    elif ending == ".json" and draw(st.booleans()):
        content = draw(arrays())
    elif ending == ".txt":
        content = draw(st.text(max_size=60) | st.just("x" * 500)).encode()
    else:
        content = draw(lines())
    if draw(st.integers(0, 9)) == 0:
        content = b"\xef\xbb\xbf" + content
    return ending, broken(draw, packed(content, ending, draw(st.integers(0, len(content)))))


flag_lists = st.lists(
    st.sampled_from([["--skip-bad"], ["--text-field", "text"], ["--max-tokens", "9"]]),
    max_size=2,
)


def try_one(folder, ending, content, flags):
    """prepare.py on such a file, and once more: a set, or one line; the second time the same."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"x{ending}"
        path.write_bytes(content)
        argv = ["--source", str(path), "--tokenizer", str(folder / "set"), "--workers", "1"]
        argv += ["--out", f"{place}/out", "--max-document-bytes", str(LIMIT)]
        argv += [word for flag in flags for word in flag]
        ended = [outcome(argv), outcome(argv)]
        assert ended[0] == ended[1]
        if ended[0] is None:
            tokens = TokenSet(f"{place}/out", verify=True)
            assert tokens.count > 0
            longest = 2 * LIMIT  # a chat's marks come on top
            assert tokens.meta["text_bytes"] <= longest * tokens.meta["sources"][0]["documents"]


def outcome(argv):
    """None where there is a set now, else the one line."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            prepare.main(argv)
        except UserError as error:
            line = str(error)
            assert "\n" not in line.strip() and len(line) < 2000
            line.encode()  # can be printed
            return line
    return None


def quickly(folder, monkeypatch):
    """Small blocks; one tokenizer for all; what is written need not reach the disk."""
    tokenizer = Tokenizer.load(folder / "set")
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(prepare, "tokenizer_for", lambda *_: tokenizer)


def fuzz(folder, monkeypatch, n):
    quickly(folder, monkeypatch)

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files(), flag_lists)
    def run(file, flags):
        try_one(folder, *file, flags)

    run()


def test_75_files(folder, monkeypatch):
    fuzz(folder, monkeypatch, 75)


@pytest.mark.slow
def test_5000_files(folder, monkeypatch):
    fuzz(folder, monkeypatch, 5000)
