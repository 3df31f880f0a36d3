"""Files of text, the token sets that prepare.py makes of them, and prepare.py ended at a point.

For the tests of text/ and of demo/sets.py.
"""

import functools
import gzip
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import killed
import prepare
from common.errors import cli
from common.owned import LIST, written
from conftest import once
from data import TokenSet
from demo import corpus
from hf import downloads
from tools import local_hub

FORK = multiprocessing.get_context("fork")
WORDS = ["the", "sum", "a", "12345", "3.14", "naïve", "数学", "🙂", "x^2", "don't"]
SPACES = ["\n", "\n\n", "\r\n", "  ", "\t"]


@pytest.fixture(scope="session", name="texts")
@once
def texts_fixture():
    rng = random.Random(1)
    lengths = [rng.randint(1, 120) for _ in range(400)]
    return [" ".join(rng.choices(WORDS + SPACES, k=length)) + "." for length in lengths]


@pytest.fixture(scope="session", name="folder")
@once
def folder_fixture(tmp_path_factory, texts):
    """data.jsonl, and the token set made of it with a vocabulary of 400 in set/."""
    folder = tmp_path_factory.mktemp("prepare")
    write(folder / "data.jsonl", texts)
    prepared(folder / "set", "--source", folder / "data.jsonl", "--train-vocab", 400)
    return folder


@pytest.fixture(scope="session", name="demo")
@once
def demo_fixture(tmp_path_factory):
    """The demo with fewer pages. Beside it: b, made by three workers; c, with another seed."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        pages = {"base": 300, "corpus": 300, "curated": 40, "val": 300}
        patch.setattr(corpus, "PAGES", pages)
        prepare.main(["--out", str(root / "a"), "--workers", "1"])
        prepare.main(["--out", str(root / "b"), "--workers", "3"])
        prepare.main(["--out", str(root / "c"), "--workers", "1", "--seed", "1"])
    return root / "a"


@pytest.fixture(scope="session", name="made")
@once
def made_fixture(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    local_hub.make(root, n=60)
    return root


@pytest.fixture(name="online")
def online_fixture(made, tmp_path, monkeypatch):
    """downloads.py's two calls, answered from a copy of the folder: (root, [files fetched])."""
    root, fetched = tmp_path / "hub", []
    shutil.copytree(made / "datasets", root)

    def files(name, revision=None):
        folder = root / name
        return local_hub.COMMIT, [
            (str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file()
        ]

    def get(name, file, revision, repo_type, local_dir):
        assert revision == local_hub.COMMIT and repo_type == "dataset"
        assert not Path(local_dir).exists(), "another shard is still on the disk"
        target = Path(local_dir) / file
        target.parent.mkdir(parents=True)
        shutil.copy(root / name / file, target)
        fetched.append(file)
        return target

    monkeypatch.setattr(downloads, "dataset_files", files)
    monkeypatch.setattr(downloads, "get", get)
    return root, fetched


@pytest.fixture(name="words")
def words_fixture(made):
    return made / "models/TinyLlama/TinyLlama_v1.1"


def write(path, texts):
    """The texts as one file in the format that the path's ending says."""
    path = Path(path)
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(texts) // 3))
        return str(path)
    rows = []
    for i, text in enumerate(texts):
        rows.append(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n")
    lines = "".join(rows).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    elif path.suffix == ".zst":  # two frames, as `cat a.zst b.zst` or a parallel compressor makes
        lines = zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:])
    path.write_bytes(lines)
    return str(path)


def prepared(out, *argv):
    """The token set that prepare.py makes, here in this process."""
    prepare.main(["--out", str(out), "--workers", "1", *map(str, argv)])
    return TokenSet(out, verify=True)


def documents(tokens):
    """The documents of a set without their EOS; there must be an EOS at the very end."""
    eos = tokens.vocab_size - 1
    ends = np.flatnonzero(tokens.tokens == eos)
    assert ends[-1] == tokens.count - 1
    parts = np.split(np.asarray(tokens.tokens), ends + 1)[:-1]
    return [part[part != eos].tolist() for part in parts]


def same_files(a, b):
    assert written(a) == written(b)
    names, others = (
        sorted(path.name for path in Path(folder).iterdir() if path.is_file() and path.name != LIST)
        for folder in (a, b)
    )
    assert names == others
    return all((Path(a) / name).read_bytes() == (Path(b) / name).read_bytes() for name in names)


def forked(argv, before=lambda: None):
    """prepare.py's own entry in another process, with all that the test has patched here.

    Returns (exit code, stderr), after its workers have ended, too: they hold the pipe's end.
    """
    read, write = os.pipe()

    def child():
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        before()
        cli(lambda: prepare.main([str(word) for word in argv]))

    process = FORK.Process(target=child)
    process.start()
    os.close(write)
    with open(read) as pipe:
        printed = pipe.read()
    process.join()
    return process.exitcode, printed


def killed_at(point, argv, sent="SIGKILL"):
    """prepare.py in another process, ended at a point of tests/killed.py."""

    def arm():
        at = killed.Point(point, sent)
        killed.arm_changes(at)
        if at.kind == "call":
            module, name = at.what.split(":")
            arm_call = functools.partial(killed.arm_call, at)
            killed.change(importlib.import_module(module), name, arm_call)

    code, printed = forked(argv, arm)
    assert f"{sent} at {point}" in printed, f"it ended before {point}:\n{printed}"
    assert code == (-9 if sent == "SIGKILL" else 130), (code, printed)
