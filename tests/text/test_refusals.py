"""What users do wrong is one line that names the file and the place, or the flag."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import (  # noqa: F401 (fixtures)
    demo_fixture,
    documents,
    folder_fixture,
    prepared,
    texts_fixture,
    write,
)

from common.errors import UserError
from conftest import ROOT
from data import TokenSet

GOOD = b'{"text": "the sum"}\n'
BAD_FILES = [  # name, bytes, what the message says
    ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
    ("blank.jsonl", b"\n\n", "blank.jsonl: has no documents"),
    (
        "json.jsonl",
        GOOD + b'{"text": }\n' + GOOD,
        "json.jsonl line 2: broken JSON, .* at column 10",
    ),
    ("cut.jsonl", GOOD * 2 + b'{"text": "the', "cut.jsonl line 3: broken JSON"),
    ("list.jsonl", b"[1]\n", "list.jsonl line 1: got list, wanted a JSON object"),
    ("deep.jsonl", b"[" * 100000 + b"\n", "deep.jsonl line 1: "),
    (
        "field.jsonl",
        GOOD + b'{"body": "x", "url": "y"}\n',
        "field.jsonl line 2: has no field 'text', .* 'body', 'url'",
    ),
    (
        "null.jsonl",
        b'{"text": null}\n',
        "null.jsonl line 1: field 'text' is NoneType, wanted a string",
    ),
    (
        "latin.jsonl",
        GOOD + b'{"text": "na\xefve"}\n',
        "latin.jsonl line 2: not UTF-8, byte 13 is 0xef",
    ),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "surrogate.jsonl line 1: .*surrogate"),
    ("latin.txt", b"one\ntwo\nna\xefve", r"latin.txt: not UTF-8, byte 11 \(line 3\) is 0xef"),
    ("empty.txt", b"", "empty.txt: the file is empty"),
    ("page.html", b"<p>", "page.html: got the ending '.html', wanted one of .txt, .jsonl"),
    ("cut.jsonl.gz", gzip.compress(GOOD * 500)[:-20], "cut.jsonl.gz: damaged after line"),
    ("not.jsonl.gz", GOOD, "not.jsonl.gz: damaged after line 0"),
    (
        "flip.jsonl.gz",
        gzip.compress(GOOD)[:12] + b"\xff\xff\xff" + gzip.compress(GOOD)[15:],
        "flip.jsonl.gz: damaged",
    ),
    (
        "cut.jsonl.zst",
        zstandard.compress(os.urandom(5000).hex().encode())[:-300],
        "cut.jsonl.zst: damaged after",
    ),
    ("not.jsonl.zst", GOOD, "not.jsonl.zst: damaged after line 0"),
    ("not.parquet", GOOD, "not.parquet: not a whole parquet file"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES, ids=[name for name, *_ in BAD_FILES])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_is_one_clear_line(folder, tmp_path, name, content, message, workers):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepared(
            tmp_path / "out",
            "--source",
            tmp_path / name,
            "--tokenizer",
            folder / "set",
            "--workers",
            workers,
        )
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "meta.json").exists()


def test_bad_parquet_is_named_with_its_row(folder, texts, tmp_path):
    path = tmp_path / "x.parquet"
    flags = ["--source", path, "--tokenizer", folder / "set"]
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(UserError, match="has no field 'text', its fields are 'body', 'n'"):
        prepared(tmp_path / "out", *flags)
    with pytest.raises(UserError, match="row 1: field 'n' is int, wanted a string"):
        prepared(tmp_path / "out", *flags, "--text-field", "n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match="row 2: field 'text' is NoneType"):
        prepared(tmp_path / "out", *flags)
    write(path, texts)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="not a whole parquet file"):
        prepared(tmp_path / "out", *flags)
    path.write_bytes(whole)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    at = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(whole[:at] + b"\xff" * 60 + whole[at + 60 :])
    with pytest.raises(UserError, match="damaged after row 133"):
        prepared(tmp_path / "out", *flags)


def test_skip_bad_counts_and_goes_on_from_where_it_broke_off(folder, texts, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts[:6]]
    path.write_bytes(
        b"".join([lines[0], b"{\n", *lines[1:3], b'{"body": 1}\n', b'"\xff"\n', *lines[3:]])
    )
    flags = ["--source", path, "--tokenizer", folder / "set"]
    with pytest.raises(UserError, match="line 2.*--skip-bad"):
        prepared(tmp_path / "out", *flags)
    capsys.readouterr()
    tokens = prepared(tmp_path / "out", *flags, "--skip-bad")
    assert "3 broken records left out" in capsys.readouterr().out
    assert (
        documents(tokens) == documents(TokenSet(folder / "set"))[:6]
        and tokens.meta["bad_records"] == 3
    )
    with pytest.raises(UserError, match="3 broken records were left out"):
        prepared(tmp_path / "out", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train-vocab", 256], "--train-vocab: got 256, wanted at least 257"),
        (["--train-vocab", 10**23], "--train-vocab: got 10+, wanted"),
        (["--workers", 0, "--train-vocab", 300], "--workers: got 0"),
        (["--max-tokens", 0, "--train-vocab", 300], "--max-tokens: got 0"),
        (["--seed", 3, "--train-vocab", 300], "--seed: got 3 with .*, of which nothing is drawn"),
        ([], "wanted --tokenizer NAME or --train-vocab N"),
        (["--tokenizer", "x", "--train-vocab", 300], "got both, wanted one"),
        (["--prompt-field", "q", "--train-vocab", 300], "got one, wanted both"),
        (["--mask-prompt", "--train-vocab", 300], "--mask-prompt: needs --prompt-field"),
        (
            ["--text-field", "t", "--prompt-field", "q", "--response-field", "a"],
            "got both, wanted one",
        ),
    ],
)
def test_wrong_flags_are_refused_before_any_work(folder, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "out", "--source", folder / "data.jsonl", *flags)
    assert not (tmp_path / "out").exists()


def test_wrong_sources_are_refused(folder, demo, tmp_path):
    (tmp_path / "empty").mkdir()
    for names, message in (
        (["nowhere.jsonl"], "nowhere.jsonl: does not exist"),
        (["demo", folder / "data.jsonl"], "demo: goes alone"),
        ([tmp_path / "empty"], "without meta.json"),
        ([demo / "val", folder / "set"], "got a token set of tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(
                tmp_path / "out",
                "--source",
                *names,
                *(["--train-vocab", 300] if len(names) == 1 else []),
            )


def test_a_token_set_is_not_searched_for_problems(folder, tmp_path):
    problems = tmp_path / "mine.jsonl"
    problems.write_text(json.dumps({"question": "the sum " * 40, "answer": "1"}) + "\n")
    with pytest.raises(UserError, match="--decontaminate: got a token set as --source"):
        prepared(tmp_path / "out", "--source", folder / "set", "--decontaminate", problems)


def test_a_broken_first_record_does_not_hide_how_the_others_are_read(folder, tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "sum"}]
    }
    path = tmp_path / "chat.jsonl"
    path.write_text("{broken\n" + (json.dumps(chat) + "\n") * 3)
    tokens = prepared(
        tmp_path / "out", "--source", path, "--tokenizer", folder / "set", "--skip-bad"
    )
    assert (len(documents(tokens)), tokens.meta["bad_records"]) == (3, 1)


def test_the_command_line_gives_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--source", "nowhere.txt", "--out", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --source nowhere.txt: does not exist\n"
