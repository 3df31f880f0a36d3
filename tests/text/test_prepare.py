"""prepare.py against `tokenizers` (an outside tokenizer) and against plain Python."""

import gzip
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from prepared import (  # noqa: F401 (fixtures)
    demo_fixture,
    documents,
    folder_fixture,
    prepared,
    same_files,
    texts_fixture,
    write,
)

from conftest import ROOT
from data import TokenSet
from demo import corpus
from hf.tokenizer import Tokenizer
from text import reading
from text.building import Settings
from text.pieces import Preparation
from text.sources import sources_of

# --- formats, EOS, workers


def test_tokens_are_those_of_tokenizers_with_eos_after_each_document(folder, texts):
    outside = tokenizers.Tokenizer.from_file(str(folder / "set" / "tokenizer.json"))
    tokens = TokenSet(folder / "set")
    wanted = [outside.encode(text).ids for text in texts]
    assert documents(tokens) == wanted
    assert outside.token_to_id("<|endoftext|>") == tokens.tokens[-1]
    assert tokens.count == sum(map(len, wanted)) + len(texts)
    own = Tokenizer.load(folder / "set")
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
        mark = b"\xef\xbb\xbf" if i == 3 else b""  # Windows' mark of UTF-8
        (tmp_path / f"{i:02}.txt").write_bytes(mark + text.encode())
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
    tokenizer = Tokenizer.load(folder / "set")
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
    tokenizer, start = Tokenizer.load(folder / "set"), 0
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
    Tokenizer.load(folder / "set").save(with_bos)
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


# --- memory, and what is loaded


DEMO = """
import sys, prepare
from demo import corpus
corpus.PAGES = dict.fromkeys(corpus.PAGES, 20)
prepare.main(["--out", "demo", "--workers", "1"])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_demo_loads_neither_torch_nor_what_only_files_need(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DEMO]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "pyarrow", "zstandard", "huggingface_hub", "tools", "evaluation"}


FILES = """
import sys, prepare
prepare.main(sys.argv[1:])
assert "torch" not in sys.modules
"""


def test_files_and_decontamination_need_no_torch(folder, tmp_path):
    argv = [
        "--source",
        folder / "data.jsonl",
        "--tokenizer",
        folder / "set",
        "--out",
        tmp_path / "o",
    ]
    (tmp_path / "eval").mkdir()
    (tmp_path / "prompts").mkdir()
    row = {"question": "the sum of 1 and 2 and 3 and 4 is?", "answer": "#### 10"}
    (tmp_path / "eval/gsm8k.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "prompts/gsm8k.md").write_text("")
    argv += ["--decontaminate", "gsm8k", "--data-dir", tmp_path, "--out", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", FILES, *map(str, argv)], cwd=ROOT, check=True)


def test_help_fits_on_a_screen_and_shows_its_command_lines_as_they_are_typed():
    command = [sys.executable, "prepare.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    assert "\\\\" not in done.stdout and sum(line.endswith("\\") for line in lines) == 2


def test_a_worker_that_is_not_forked_loads_the_tokenizer_itself(folder):
    """As on systems without fork: what a worker is given is pickled."""
    out, tokenizer = folder / "set", Tokenizer.load(folder / "set")
    sources = sources_of([str(folder / "data.jsonl")], None, None, False, out)
    ours = Preparation.of(out, sources, tokenizer, Settings())
    theirs = pickle.loads(pickle.dumps(ours))
    job = next(reading.jobs(sources, 0, 0, 1, skip_bad=False))
    assert np.array_equal(ours.piece(job).arrays["tokens"], theirs.piece(job).arrays["tokens"])


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
            "who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN;"
            "print(*(resource.getrusage(w).ru_maxrss for w in who))"
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
