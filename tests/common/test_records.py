"""The reader of JSON: what is right comes through, what is wrong is one line."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from common.errors import UserError
from common.records import (
    FINITE,
    as_record,
    at_least,
    between,
    matching,
    one_of,
    read_json,
    read_lines,
    read_record,
)


@dataclass
class Source:
    name: str
    tokens: Annotated[int, at_least(0)]


@dataclass
class Header:
    format: Annotated[int, one_of(1, 2)]
    count: Annotated[int, between(0, 10)]
    share: Annotated[float, FINITE]
    hash: Annotated[str, matching("[0-9a-f]+", "a hash")]
    whole: bool
    sources: list[Source]
    sizes: dict[str, int]
    plan: Any
    kinds: list[str] | None = None
    seed: Annotated[int, at_least(0)] | None = 7


GOOD = {
    "format": 2,
    "count": 3,
    "share": 0.5,
    "hash": "00ff",
    "whole": True,
    "sources": [{"name": "a", "tokens": 3}],
    "sizes": {"x": 1},
    "plan": [None],
}


def test_what_is_right_comes_through(tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps({**GOOD, "of a newer kit": 1}))
    assert read_record(path, Header, "header") == Header(**{**GOOD, "sources": [Source("a", 3)]})
    assert read_record(path, Header, "header").seed == 7
    assert as_record({**GOOD, "share": 1, "seed": None}, Header, "it").seed is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 3}, "format is 3, wanted 1 or 2"),
        ({"count": -1}, "count is -1, wanted 0 to 10"),
        ({"count": 3.0}, "count is 3.0, wanted a whole number"),
        ({"count": float("nan")}, "count is nan, wanted a whole number"),
        ({"count": 1e99}, "count is 1e+99, wanted a whole number"),
        ({"count": 10**400}, "wanted a whole number"),
        ({"count": True}, "count is True, wanted a whole number"),
        ({"count": None}, "count is None, wanted a whole number"),
        ({"share": 10**400}, "wanted a number"),
        ({"share": float("inf")}, "share is inf, wanted a finite number"),
        ({"share": "1"}, "share is '1', wanted a number"),
        ({"hash": "00fg"}, "hash is '00fg', wanted a hash"),
        ({"hash": "00ff\n"}, r"hash is '00ff\n', wanted a hash"),
        ({"whole": 1}, "whole is 1, wanted true or false"),
        ({"sources": {}}, "sources is {}, wanted a list"),
        ({"sources": [3]}, "sources[0] is 3, wanted an object"),
        ({"sources": [{"name": "a"}]}, "sources[0].tokens is missing"),
        ({"sources": [{"name": "a", "tokens": -2}]}, "sources[0].tokens is -2, wanted 0 or more"),
        ({"sizes": {"x": []}}, "sizes['x'] is [], wanted a whole number"),
        ({"kinds": "abc"}, "kinds is 'abc', wanted a list"),
        ({"kinds": ["a", 1]}, "kinds[1] is 1, wanted text"),
        ({"kinds": ["x" * 1000, {}]}, "kinds[1] is {}, wanted text"),
    ],
)
def test_what_is_wrong_is_named(change, words):
    with pytest.raises(UserError) as caught:
        as_record({**GOOD, **change}, Header, "header: h.json", "make it again")
    message = str(caught.value)
    assert message.startswith("header: h.json: ") and message.endswith("; make it again")
    assert words in message and len(message) < 200 and "\n" not in message


@pytest.mark.parametrize("missing", ["format", "count", "sources", "plan"])
def test_what_is_missing_is_named(missing):
    with pytest.raises(UserError, match=f"it: {missing} is missing"):
        as_record({key: value for key, value in GOOD.items() if key != missing}, Header, "it")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "holds [1], wanted an object"),
        (b"null", "holds None, wanted an object"),
        (b"\xef\xbb\xbf{}", "a byte order mark; save it as UTF-8 without one"),
        (b"\xff\xfe{\0}\0", "not valid JSON"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b'{"a": "\\ud800"}', "a lone surrogate"),
        (b'{"\\uDFFF": 1}', "a lone surrogate"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        (b'{"x": {"a\\n": 1, "a\\n": 3}}', r"the key 'a\n' stands twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"a":' + b"[" * 60 + b"]" * 60 + b"}", "over 50 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "over 50 levels"),
        (b"[" * 100_000, "over 50 levels"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "h.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, "header", "make it again")
    message = str(caught.value)
    assert message.startswith(f"header: {path} ") and message.endswith("; make it again")
    assert words in message and "\n" not in message and len(message) < 300


def test_a_whole_pair_of_surrogates_is_one_character(tmp_path):
    path = tmp_path / "h.json"
    path.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}')
    assert read_json(path, "header") == {"a": "\U0001f600", "b": "\\ud800"}


def test_what_is_no_file_is_one_line_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (
        (tmp_path, "is a folder, wanted a file"),
        (tmp_path / "fifo", "is a pipe or a device, wanted a file"),
        ("/dev/zero", "is a pipe or a device, wanted a file"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "loop", "cannot be read (Too many levels of symbolic links)"),
        (tmp_path / "a\0b", "cannot be read (embedded null byte)"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
    ):
        for read in (lambda p: read_json(p, "header"), lambda p: read_lines(p, Header, "header")):
            with pytest.raises(UserError) as caught:
                read(path)
            assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "h.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes, wanted at most 67,108,864"):
        read_json(path, "header")


def test_lines_up_to_a_last_one_that_is_not_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    line = json.dumps({"name": "a", "tokens": 3}) + "\n"
    path.write_text(2 * line + line[:10])
    assert read_lines(path, Source, "log") == 2 * [{"name": "a", "tokens": 3}]
    path.write_text(line + line[:10] + "\n" + line)
    with pytest.raises(UserError, match="log.jsonl, line 2 is not valid JSON"):
        read_lines(path, Source, "log")
    path.write_text(line + line.replace("3", "-3"))
    with pytest.raises(UserError, match="line 2: tokens is -3, wanted 0 or more"):
        read_lines(path, Source, "log")
