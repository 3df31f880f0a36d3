"""prepare.py and reading.py against `tokenizers` (an outside tokenizer), against plain Python, and against kill -9."""

import gzip
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

import data
import prepare
from common.errors import UserError, cli
from data import TokenSet
from demo import corpus
from text import building, reading

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


def write(path, texts):
    """The texts as one file in the format that the path's ending says."""
    rows = [
        json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
    ]
    lines = "".join(row + "\n" for row in rows).encode()
    path = Path(path)
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(texts) // 3))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":  # two frames, as `cat a.zst b.zst` or a parallel compressor makes
        path.write_bytes(
            b"".join(zstandard.compress(part) for part in (lines[:1000], lines[1000:]))
        )
    else:
        path.write_bytes(lines)
    return str(path)


def prepared(out, *argv):
    prepare.main(["--out", str(out), "--workers", "1", *map(str, argv)])
    return TokenSet(out, verify=True)


def same_files(a, b):
    names = sorted(p.name for p in Path(a).iterdir())
    assert names == sorted(p.name for p in Path(b).iterdir())
    return all((Path(a) / name).read_bytes() == (Path(b) / name).read_bytes() for name in names)


def run_forked(argv, log, before=lambda: None):
    """prepare.py's own entry in another process of its own process group; stderr goes to `log`."""

    def child():
        os.setsid()
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        before()
        cli(lambda: prepare.main([str(a) for a in argv]))

    process = FORK.Process(target=child)
    process.start()
    return process


def group_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    words = [
        "the",
        "sum",
        "a",
        "12345",
        "3.14",
        "naïve",
        "数学",
        "🙂",
        "x^2",
        "don't",
        "\n",
        "\n\n",
        "\r\n",
        "  ",
        "\t",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(1, 120))) + "." for _ in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """data.jsonl and the token set made of it with a vocabulary of 400."""
    folder = tmp_path_factory.mktemp("prepare")
    write(folder / "data.jsonl", texts)
    prepared(folder / "set", "--source", folder / "data.jsonl", "--train-vocab", 400)
    return folder


def documents(tokens):
    """The documents of a set without their EOS; there must be an EOS at the very end."""
    eos = tokens.vocab_size - 1
    ends = np.flatnonzero(tokens.tokens == eos)
    assert ends[-1] == tokens.count - 1
    return [
        part[part != eos].tolist() for part in np.split(np.asarray(tokens.tokens), ends + 1)[:-1]
    ]


# --- formats, EOS, workers


def test_tokens_are_those_of_tokenizers_with_eos_after_each_document(folder, texts):
    outside = tokenizers.Tokenizer.from_file(str(folder / "set" / "tokenizer.json"))
    tokens = TokenSet(folder / "set")
    wanted = [outside.encode(text).ids for text in texts]
    assert documents(tokens) == wanted
    assert outside.token_to_id("<|endoftext|>") == tokens.tokens[-1]
    assert tokens.count == sum(map(len, wanted)) + len(texts)
    own = prepare.Tokenizer.load(folder / "set")
    assert own.hash == tokens.tokenizer_hash
    assert [own.decode(ids) for ids in documents(tokens)] == texts
    assert tokens.meta["text_bytes"] == sum(len(t.encode()) for t in texts)
    assert tokens.meta["sources"][0]["documents"] == len(texts)
    assert tokens.loss_mask is None and tokens.kind is None


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("block", [300, reading.BLOCK])
def test_every_format_gives_the_same_tokens(folder, texts, tmp_path, monkeypatch, ending, block):
    monkeypatch.setattr(
        reading, "BLOCK", block
    )  # small: lines and frames lie across the blocks' borders
    path = write(tmp_path / f"data{ending}", texts)
    tokens = prepared(tmp_path / "out", "--source", path, "--tokenizer", folder / "set")
    assert tokens.hash == TokenSet(folder / "set").hash


def test_txt_is_one_document_to_the_byte(folder, texts, tmp_path):
    for i, text in enumerate(texts[:20]):
        (tmp_path / f"{i:02}.txt").write_bytes(b"\xef\xbb\xbf" * (i == 3) + text.encode())
    tokens = prepared(
        tmp_path / "out", "--source", *sorted(tmp_path.glob("*.txt")), "--tokenizer", folder / "set"
    )
    assert documents(tokens) == documents(TokenSet(folder / "set"))[:20]


def test_no_newline_at_the_end_blank_lines_and_crlf(folder, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a a"}\r\n\n   \n{"text": ""}\n{"text": " \\n"}\n{"text": "the sum"}'
    )
    tokens = prepared(tmp_path / "out", "--source", path, "--tokenizer", folder / "set")
    tokenizer = prepare.Tokenizer.load(folder / "set")
    assert [tokenizer.decode(d) for d in documents(tokens)] == ["a a", "the sum"]


def test_any_number_of_workers_gives_the_same_bytes(folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 2000)
    paths = [
        write(tmp_path / "a.parquet", texts),
        folder / "data.jsonl",
        write(tmp_path / "b.jsonl.zst", texts),
    ]
    for workers in (1, 3):
        prepared(
            tmp_path / str(workers), "--source", *paths, "--train-vocab", 300, "--workers", workers
        )
    assert same_files(tmp_path / "1", tmp_path / "3")
    assert TokenSet(tmp_path / "3").count > 3000


def test_max_tokens_is_exact(folder, tmp_path):
    whole = TokenSet(folder / "set")
    for n in (2, 777, whole.count - 1, whole.count, whole.count + 1):
        tokens = prepared(
            tmp_path / str(n),
            "--source",
            folder / "data.jsonl",
            "--tokenizer",
            folder / "set",
            "--max-tokens",
            n,
        )
        assert np.array_equal(tokens.tokens, whole.tokens[:n])
        eos = np.asarray(tokens.tokens) == tokens.vocab_size - 1
        assert tokens.meta["sources"][0]["documents"] == eos.sum() + (not eos[-1])


# --- masks, BOS, kinds, mixing


def test_prompts_are_masked_up_to_the_response(folder, tmp_path):
    rows = [{"q": f"the sum of {i}", "a": f"a {i} don't"} for i in range(30)] + [
        {"q": "a", "a": "\n\nthe"}
    ]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--source",
        path,
        "--prompt-field",
        "q",
        "--response-field",
        "a",
        "--tokenizer",
        folder / "set",
    ]
    tokens = prepared(tmp_path / "masked", *flags, "--mask-prompt")
    tokenizer, start = prepare.Tokenizer.load(folder / "set"), 0
    for row, ids in zip(rows, documents(tokens)):
        assert tokenizer.decode(ids) == row["q"] + "\n" + row["a"]
        mask = tokens.loss_mask[start : start + len(ids) + 1]
        n_prompt = int(np.argmax(mask))  # zeros, then ones to the EOS
        assert mask[n_prompt:].all() and not mask[:n_prompt].any()
        length = sum(len(tokenizer.token_bytes(i)) for i in ids[:n_prompt])
        if row is not rows[-1]:
            assert length == len(row["q"]) + 1
        else:  # "\n" + "\n\n" may be one token, which is then a target
            assert len(row["q"]) <= length <= len(row["q"]) + 1
        start += len(ids) + 1
    plain = prepared(tmp_path / "plain", *flags)
    assert plain.loss_mask is None and plain.hash == tokens.hash


def test_bos_stands_in_front_and_is_never_a_target(folder, tmp_path):
    with_bos = tmp_path / "tokenizer"
    prepare.Tokenizer.load(folder / "set").save(with_bos)
    config = json.loads((with_bos / "tokenizer_config.json").read_text())
    config.update(bos_token="<|endoftext|>", add_bos_token=True)
    (with_bos / "tokenizer_config.json").write_text(json.dumps(config))
    plain = TokenSet(folder / "set")
    for workers in (1, 2):
        tokens = prepared(
            tmp_path / f"out{workers}",
            "--source",
            folder / "data.jsonl",
            "--tokenizer",
            with_bos,
            "--workers",
            workers,
        )
        eos, wanted, mask = plain.vocab_size - 1, [], []
        for ids in documents(plain):
            wanted += [eos, *ids, eos]
            mask += [0] + [1] * (len(ids) + 1)
        assert tokens.tokens.tolist() == wanted and tokens.loss_mask.tolist() == mask


def test_token_sets_are_joined_in_order_with_masks_and_kinds_filled_in(folder, demo, tmp_path):
    vocabulary = demo / "base"
    sft = tmp_path / "sft.jsonl"
    sft.write_text('{"q": "what?", "a": "that"}\n')
    masked = prepared(
        tmp_path / "sft",
        "--source",
        sft,
        "--prompt-field",
        "q",
        "--response-field",
        "a",
        "--mask-prompt",
        "--tokenizer",
        vocabulary,
    )
    curated = TokenSet(demo / "curated")
    joined = prepared(
        tmp_path / "out",
        "--source",
        demo / "curated",
        tmp_path / "sft",
        demo / "curated",
        folder / "data.jsonl",
    )
    plain = prepared(
        tmp_path / "plain", "--source", folder / "data.jsonl", "--tokenizer", vocabulary
    )
    parts, n = [curated, masked, curated, plain], curated.count
    assert np.array_equal(joined.tokens, np.concatenate([p.tokens for p in parts]))
    assert np.array_equal(
        joined.loss_mask, np.r_[np.ones(n), masked.loss_mask, np.ones(n), np.ones(plain.count)]
    )
    assert joined.kinds == corpus.KINDS + ["unlabelled"]
    unlabelled = len(corpus.KINDS)
    assert np.array_equal(
        joined.kind,
        np.r_[
            curated.kind,
            np.full(masked.count, unlabelled),
            curated.kind,
            np.full(plain.count, unlabelled),
        ],
    )
    assert [s["documents"] for s in joined.meta["sources"]] == [40, 1, 40, 400]
    assert joined.meta["text_bytes"] == sum(p.meta["text_bytes"] for p in parts)
    again = prepared(
        tmp_path / "again", "--source", tmp_path / "out", demo / "base"
    )  # kinds are matched by name
    assert (
        np.array_equal(again.kind, np.r_[joined.kind, TokenSet(demo / "base").kind])
        and again.kinds == joined.kinds
    )


# --- restarting


def test_kill_9_at_any_moment_then_the_same_command_gives_the_same_bytes(
    folder, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "BLOCK", 20_000)
    paths = [
        write(tmp_path / "a.parquet", texts * 16),
        write(tmp_path / "b.jsonl.gz", texts * 16),
        write(tmp_path / "c.jsonl", texts * 48),
    ]  # long enough to be killed in on a busy machine
    prepared(tmp_path / "whole", "--source", *paths, "--train-vocab", 300)
    monkeypatch.setattr(building, "MARK_SECONDS", 0)
    rng, out, marks, groups = random.Random(2), tmp_path / "out", [], []
    command = ["--source", *paths, "--train-vocab", 300, "--out", out, "--workers", 2]

    def marked():
        return (out / "progress.json").exists() and json.loads(
            (out / "progress.json").read_text()
        ).get("count", 0)

    for attempt in range(
        6
    ):  # while the vocabulary is trained, at moments further and further on, by Ctrl-C
        process = run_forked(command, tmp_path / "log")
        groups.append(process.pid)
        while attempt > 1 and process.is_alive() and marked() <= max(marks):
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.1))
        assert process.exitcode is None, (
            "finished before the kill: " + (tmp_path / "log").read_text()
        )
        os.kill(process.pid, signal.SIGINT if attempt == 5 else signal.SIGKILL)
        process.join()
        assert process.exitcode == (130 if attempt == 5 else -signal.SIGKILL)
        marks.append(marked())
    process = run_forked(command, tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert 0 < marks[2] < marks[-1] < TokenSet(out).count and marks == sorted(marks)
    assert same_files(tmp_path / "whole", out)
    for _ in range(100):  # the killed processes' workers have ended themselves
        alive = [group for group in groups if group_alive(group)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive, "workers outlive the process that was killed"


@pytest.mark.parametrize("call", range(4))
def test_kill_while_the_set_is_closed(folder, tmp_path, monkeypatch, call):
    """`finish` renames, hashes and writes the header; a kill before each of these steps costs no token."""
    flags = ["--source", folder / "set", folder / "data.jsonl", "--out", tmp_path / "out"]

    def die_in_finish():
        calls = []

        def counted(function):
            def inner(*args, **more):
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(1)
                return function(*args, **more)

            return inner

        finish = data.TokenSetWriter.finish

        def closing(self, **meta):
            os.replace, data.file_hash = counted(os.replace), counted(data.file_hash)
            return finish(self, **meta)

        data.TokenSetWriter.finish = closing
        building.MARK_SECONDS = 0

    process = run_forked([*flags, "--workers", 1], tmp_path / "log", die_in_finish)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out" / "meta.json").exists()
    monkeypatch.setattr(building, "in_order", lambda *args: pytest.fail("it was tokenised again"))

    prepared(*flags[-1:], *flags[:-2])
    monkeypatch.undo()
    prepared(tmp_path / "whole", *flags[:-2])
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_finished_sets_are_used_again_refused_or_replaced(folder, texts, tmp_path, capsys):
    path, out = write(tmp_path / "x.jsonl", texts[:5]), tmp_path / "out"
    first = prepared(out, "--source", path, "--tokenizer", folder / "set")
    stamp = (out / "tokens.bin").stat().st_mtime_ns
    capsys.readouterr()
    prepared(out, "--source", path, "--tokenizer", folder / "set")
    assert (
        "used again" in capsys.readouterr().out and (out / "tokens.bin").stat().st_mtime_ns == stamp
    )
    with pytest.raises(UserError, match="max_tokens was null, is now 9"):
        prepared(out, "--source", path, "--tokenizer", folder / "set", "--max-tokens", 9)
    write(path, texts[5:10])
    with pytest.raises(UserError, match="sources was .*x.jsonl sha256 .* is now .*x.jsonl sha256"):
        prepared(out, "--source", path, "--tokenizer", folder / "set")
    assert TokenSet(out, verify=True).hash == first.hash
    assert (
        prepared(out, "--source", path, "--tokenizer", folder / "set", "--overwrite").hash
        != first.hash
    )
    with pytest.raises(UserError, match="also read from"):
        prepared(out, "--source", out, folder / "set", "--overwrite")
    model = tmp_path / "model"
    prepare.Tokenizer.load(folder / "set").save(model)
    with pytest.raises(UserError, match="holds tokenizer.json, but is not a token set"):
        prepared(model, "--source", path, "--tokenizer", folder / "set", "--overwrite")
    assert (model / "tokenizer.json").exists()


# --- what users do wrong

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
        (["--workers", 0, "--train-vocab", 300], "--workers: got 0"),
        (["--max-tokens", 0, "--train-vocab", 300], "--max-tokens: got 0"),
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
    for names, message in (
        (["nowhere.jsonl"], "nowhere.jsonl: does not exist"),
        (["demo", folder / "data.jsonl"], "demo: goes alone"),
        ([tmp_path], "without meta.json"),
        ([demo / "val", folder / "set"], "got a token set of tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(
                tmp_path / "out",
                "--source",
                *names,
                *(["--train-vocab", 300] if len(names) == 1 else []),
            )


def test_the_command_line_gives_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--source", "nowhere.txt", "--out", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --source nowhere.txt: does not exist\n"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    folder, texts, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(reading, "BLOCK", 2000)
    monkeypatch.setattr(building, "MARK_SECONDS", 0)
    path = write(tmp_path / "x.jsonl", texts)
    command = [
        "--source",
        path,
        "--tokenizer",
        folder / "set",
        "--out",
        tmp_path / "out",
        "--workers",
        workers,
    ]
    size = (folder / "set" / "tokens.bin").stat().st_size
    process = run_forked(
        command,
        tmp_path / "log",
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )
    process.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert (
        process.exitcode == 2
        and "File too large" in lines[-1]
        and "Traceback" not in "".join(lines)
    )
    assert prepared(*command[-3:-2], *command[:-4]).hash == TokenSet(folder / "set").hash


# --- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo with fewer pages."""
    root, pages = tmp_path_factory.mktemp("demo"), corpus.PAGES
    corpus.PAGES = {"base": 300, "corpus": 300, "curated": 40, "val": 300}
    try:
        for name, workers, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
            prepare.main(
                ["--out", str(root / name), "--workers", str(workers), "--seed", str(seed)]
            )
    finally:
        corpus.PAGES = pages
    return root / "a"


def test_demo_is_the_same_every_time_and_another_with_another_seed(demo):
    for name in ("base", "corpus", "curated", "val"):
        assert same_files(demo / name, demo.parent / "b" / name)
        assert TokenSet(demo / name, verify=True).vocab_size == 512
        assert (
            TokenSet(demo / name).tokenizer_hash
            == TokenSet(demo / "base").tokenizer_hash
            == prepare.Tokenizer.load(demo / name).hash
        )
    other = TokenSet(demo.parent / "c" / "corpus")
    assert TokenSet(demo / "corpus").hash not in (TokenSet(demo / "base").hash, other.hash)
    assert (demo / "test.jsonl").read_bytes() == (demo.parent / "b" / "test.jsonl").read_bytes()


def test_demo_kinds_label_the_span_of_each_tokens_first_byte(demo):
    tokenizer = prepare.Tokenizer.load(demo / "base")
    for name in ("base", "corpus", "curated", "val"):
        tokens, at = TokenSet(demo / name), 0
        assert tokens.kinds == corpus.KINDS
        for i, ids in enumerate(documents(tokens)):
            spans = corpus.page(name, 0, i)
            assert tokenizer.decode(ids) == "".join(text for text, _ in spans)
            labels = [kind for text, kind in spans for _ in text.encode()]
            first = 0
            for token in ids:
                assert tokens.kind[at] == labels[first]
                first, at = first + len(tokenizer.token_bytes(token)), at + 1
            assert first == len(labels) and tokens.kinds[tokens.kind[at]] == "end_of_text"
            at += 1
        assert i == tokens.meta["sources"][0]["documents"] - 1


def test_demo_problems_of_val_and_test_stand_in_no_training_page(demo):
    """The problems are read back from the text: template by its words, numbers by their places."""
    patterns = []
    for template, *_ in corpus.TEMPLATES:
        pattern = re.sub(r"\\{([nmo])\\}", r"\\w+", re.escape(template))
        patterns.append(re.compile("Q: " + re.sub(r"\\{([abc])\\}", r"(?P<\1>\\d+)", pattern)))

    def problems(texts):
        return {
            (t, m["a"], m["b"], m["c"])
            for text in texts
            for t, p in enumerate(patterns)
            if (m := p.search(text))
        }

    tokenizer, found = prepare.Tokenizer.load(demo / "base"), {}
    for name in ("base", "corpus", "curated", "val"):
        found[name] = problems(map(tokenizer.decode, documents(TokenSet(demo / name))))
    tests = [json.loads(line) for line in (demo / "test.jsonl").read_text().splitlines()]
    found["test"] = problems(p["question"] for p in tests)
    assert len(found["test"]) == len(tests) == 1000 and len(found["val"]) == 300
    assert len(found["base"]) > 100 and len(found["corpus"]) > 100 and len(found["curated"]) > 30
    train = found["base"] | found["corpus"] | found["curated"]
    assert (
        not train & found["val"] and not train & found["test"] and not found["val"] & found["test"]
    )
    assert {t for t, *_ in found["curated"]} <= set(corpus.COVERED)


# --- memory


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_memory_does_not_grow_with_the_corpus(folder, texts, tmp_path, ending):
    peaks = []
    for megabytes in (6, 50):
        path = tmp_path / f"{megabytes}{ending}"
        n = megabytes * 10**6 // sum(len(t.encode()) for t in texts)
        if ending == ".parquet":
            with pyarrow.parquet.ParquetWriter(
                path, pyarrow.schema([("text", pyarrow.string())])
            ) as writer:
                for _ in range(n):
                    writer.write_table(pyarrow.table({"text": texts}))
        else:
            block = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
            with gzip.open(path, "wb", 1) if ending == ".jsonl.gz" else open(path, "wb") as file:
                for _ in range(n):
                    file.write(block)
        flags = [
            "--source",
            path,
            "--out",
            tmp_path / f"{megabytes}",
            "--tokenizer",
            folder / "set",
            "--workers",
            2,
        ]
        code = (
            f"import prepare, resource; prepare.main({[str(flag) for flag in flags]!r});"
            "print(*(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(
            [int(x) / 1024 for x in done.stdout.split()[-2:]]
        )  # MiB of the reader, of a worker
    assert (
        max(big - small for small, big in zip(*peaks)) < 18
    )  # of 44 MB more; parquet lists its row groups
