"""Data sets of the hub: a local stand-in for it, published formats, mixtures, kills, damage."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import (  # noqa: F401 (fixtures)
    documents,
    killed_at,
    made_fixture,
    online_fixture,
    prepared,
    same_files,
    words_fixture,
)

from common.errors import UserError
from common.owned import LIST
from conftest import ROOT
from data import TokenSet
from evaluation import tasks
from hf import downloads
from hf.tokenizer import Tokenizer
from text import building, hub_datasets, reading, sources
from tools import decontaminate, local_hub

# --- what is taken

FILES = [
    (path, 1)
    for path in (
        "README.md",
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
        "dataset_infos.json",
        "socratic/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet",
    )
]


SPLITS = [f"data/{name}-00000-of-00001.parquet" for name in ("train", "train_1M", "train_5M")]


@pytest.mark.parametrize(
    "files, config, split, wanted",
    [
        (FILES, "main", "train", ["main/train-00000-of-00001.parquet"]),
        (FILES, "main", None, ["main/train-00000-of-00001.parquet"]),
        (
            FILES,
            None,
            "test",
            ["main/test-00000-of-00001.parquet", "socratic/test-00000-of-00001.parquet"],
        ),
        (FILES, "other", None, []),
        (
            [
                ("train/chunk2/a_1.jsonl.zst", 1),
                ("train/chunk1/a_0.jsonl.zst", 1),
                ("test/chunk1/h_0.jsonl.zst", 1),
            ],
            None,
            None,
            ["train/chunk1/a_0.jsonl.zst", "train/chunk2/a_1.jsonl.zst"],
        ),
        ([("MetaMathQA-395K.json", 1), ("README.md", 1)], None, None, ["MetaMathQA-395K.json"]),
        ([("a.json", 1), ("b.jsonl.gz", 1)], None, None, ["b.jsonl.gz"]),
        ([("en_train.jsonl", 1), ("fr_train.jsonl", 1)], "en", None, ["en_train.jsonl"]),
        ([(name, 1) for name in SPLITS], None, None, SPLITS[:1]),
        ([(name, 1) for name in SPLITS], None, "train_1M", SPLITS[1:2]),
        ([(name, 1) for name in SPLITS[1:]], None, None, []),
        (
            [("data/en-train-00000-of-00002.parquet", 1)],
            None,
            "train",
            ["data/en-train-00000-of-00002.parquet"],
        ),
        (
            [("a/c4-af-validation.x-00000-of-00001.json.gz", 1)],
            None,
            "validation",
            ["a/c4-af-validation.x-00000-of-00001.json.gz"],
        ),
        (
            [("train_sft/a.jsonl", 1), ("train_gen/a.jsonl", 1)],
            None,
            "train_sft",
            ["train_sft/a.jsonl"],
        ),
        (
            [("en/c4-train.00000-of-01024.json.gz", 1)],
            "en",
            None,
            ["en/c4-train.00000-of-01024.json.gz"],
        ),
        (
            [("data/part-00000-of-00002.parquet", 1)],
            None,
            None,
            ["data/part-00000-of-00002.parquet"],
        ),
    ],
)
def test_shards_of_a_config_and_split(files, config, split, wanted):
    assert [
        path for path, _ in hub_datasets.choose(files, config, split, sources.SHARDS, ".json")
    ] == by_hash(wanted)


OWM = [f"data/train-{i:05}-of-00003.parquet" for i in range(3)]


def by_hash(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())


def test_the_splits_that_there_are_are_named():
    files = [(name, 1) for name in SPLITS[1:]]
    error = hub_datasets.nothing_fits("hf:a/b", "a/b", files, sources.SHARDS)
    assert str(error).endswith(
        "it has data, and the splits train_1M, train_5M, as in hf:a/b::train_1M"
    )


def test_a_part_of_a_data_set_comes_from_all_of_its_folders():
    """80 languages of 1 to 40 shards: a tenth of the shards holds each large one by its share."""
    files = [
        (f"language{i:02}/train-{j:05}-of-00040.parquet", 1)
        for i in range(80)
        for j in range(1 + i // 2)
    ]
    taken = [path for path, _ in hub_datasets.choose(files, None, None, sources.SHARDS)][
        : len(files) // 10
    ]
    large = sum(int(path[8:10]) >= 40 for path in taken) / len(taken)
    assert abs(large - sum(1 + i // 2 for i in range(40, 80)) / len(files)) < 0.1
    assert len({path[:10] for path in taken}) > 50 and taken != sorted(taken)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("hf:a/b", ("a/b", None, None, None)),
        ("hf:a/b:c", ("a/b", "c", None, None)),
        ("hf:a/b@v1", ("a/b", None, None, "v1")),
        ("hf:a/b:c:d@refs/convert/parquet", ("a/b", "c", "d", "refs/convert/parquet")),
        ("hf:a/b::d", ("a/b", None, "d", None)),
    ],
)
def test_names(name, wanted):
    assert tuple(hub_datasets.parse(name).values()) == wanted


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="hf:OWNER/NAME"):
        hub_datasets.parse("hf:nothing")


def test_files_of_the_users_are_left_alone(online, words, tmp_path, monkeypatch):
    """Neither prepare.py nor tools.decontaminate deletes what lies in or beside --out."""
    (tmp_path / "out/shard").mkdir(parents=True)
    mine = [tmp_path / "out/shard/thesis.txt", tmp_path / "out/tokens.bin", tmp_path / "hub.json"]
    for path in mine:
        path.write_text("years of work")
    with pytest.raises(UserError, match="tokens.bin: exists, and this kit did not write it"):
        prepared(
            tmp_path / "out", "--source", "hf:open-web-math/open-web-math", "--tokenizer", words
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        tasks,
        "load",
        lambda name, data_dir, answers: [
            tasks.Example(0, "one two three four five six seven eight nine", "", "", "", {})
        ],
    )
    for flags in ([], ["--out", "clean.jsonl"]):
        decontaminate.main(
            ["--source", "hf:open-web-math/open-web-math", "--tasks", "gsm8k", *flags]
        )
    assert all(path.read_text() == "years of work" for path in mine)
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 180
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("hub", LIST)) == [
        "clean.jsonl",
        "hub.json",
        "out",
    ]


def test_two_data_sets_with_one_file_name(online, words, tmp_path):
    root, fetched = online
    file = "data/train-00000-of-00001.parquet"
    for repo, word in (("a/one", "apple"), ("b/two", "zebra")):
        path = root / repo / file
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [word] * 5}), path)
    flags = ["--source", "hf:a/one", "hf:b/two", "--tokenizer", words]
    tokens = prepared(tmp_path / "out", *flags)
    tokenizer = Tokenizer.load(words)
    wanted = [tokenizer.encode(word).tolist() for word in ["apple"] * 5 + ["zebra"] * 5]
    assert documents(tokens) == wanted
    assert {*fetched} == {file}


# --- kills, a branch that moves, damage


def test_killed_three_times_it_ends_identical_and_reads_no_finished_shard_again(
    online, words, tmp_path, monkeypatch
):
    fetched = online[1]
    monkeypatch.setattr(reading, "BLOCK", 1000)
    names = ["hf:open-web-math/open-web-math", "hf:teknium/OpenHermes-2.5"]
    flags = ["--source", *names, "--tokenizer", words, "--mix", 4, 1, "--max-tokens", 12_500]
    prepared(tmp_path / "whole", *flags)
    monkeypatch.setattr(building, "MARK_SECONDS", -1)  # after every piece
    monkeypatch.setattr(downloads, "dataset_files", moved(downloads.dataset_files))
    out = tmp_path / "out"
    at = []
    for point in (
        "call:text.writing:TokenSetWriter.append:10",
        "inside:progress.json:10",
        "call:text.writing:TokenSetWriter.append:10",
    ):
        killed_at(point, [*flags, "--out", out, "--workers", 2])
        at.append(json.loads((out / "progress.json").read_text()))
    shutil.rmtree(out / hub_datasets.FOLDER)
    fetched.clear()
    prepared(out, *flags)  # in this process: what it fetches is seen
    assert 0 < at[0]["count"] < at[1]["count"] < at[2]["count"] < 10_000
    assert same_files(tmp_path / "whole", out)
    behind = at[2]["state"]["source"]
    assert behind > 0 and fetched == by_hash(OWM)[behind:] + ["openhermes2_5.json"]


def moved(files):
    """The listing, once; asked again, the branch has another commit."""
    asked = set()

    def listing(name, revision=None):
        commit, found = files(name, revision)
        first = name not in asked
        asked.add(name)
        return (commit if first else "f" * 40), found

    return listing


def test_a_branch_that_moves_on_is_not_followed(online, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "dataset_files", moved(downloads.dataset_files))
    flags = ["--source", "hf:openai/gsm8k:main", "--tokenizer", words]
    first = prepared(tmp_path / "out", *flags)
    capsys.readouterr()
    assert (
        prepared(tmp_path / "out", *flags).hash == first.hash
        and "used again" in capsys.readouterr().out
    )


def damage(root, kind):
    """Returns the --source and what the message says; documents that are whole."""
    owm, slim = (
        root / "open-web-math/open-web-math/data",
        root / "cerebras/SlimPajama-627B/train/chunk1",
    )
    path = owm / "train-00001-of-00003.parquet"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return (
            "hf:open-web-math/open-web-math",
            "data/train-00001-of-00003.parquet: not a whole parquet file",
            120,
        )
    if kind == "schema":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
        return (
            "hf:open-web-math/open-web-math",
            "train-00001-of-00003.parquet: has no field 'text'",
            120,
        )
    if kind == "page":
        column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
        at, body = column.dictionary_page_offset or column.data_page_offset, path.read_bytes()
        path.write_bytes(body[:at] + b"\xff" * 60 + body[at + 60 :])
        return (
            "hf:open-web-math/open-web-math",
            "train-00001-of-00003.parquet: damaged after row 20",
            140,
        )
    path = slim / "example_train_1.jsonl.zst"
    text = zstandard.decompress(path.read_bytes())
    half = text.index(b"\n", len(text) // 2) + 1
    path.write_bytes(zstandard.compress(text[:half]) + zstandard.compress(text[half:])[:-9])
    return (
        "hf:cerebras/SlimPajama-627B",
        "example_train_1.jsonl.zst: damaged after line",
        120 + text[:half].count(b"\n"),
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["truncated", "schema", "page", "zstd"])
def test_a_bad_shard_is_named_or_skipped_and_counted(
    online, words, tmp_path, capsys, kind, workers
):
    name, message, whole = damage(online[0], kind)
    flags = ["--source", name, "--tokenizer", words, "--workers", workers]
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "out", *flags)
    tokens = prepared(tmp_path / "out", *flags, "--skip-bad")
    assert (
        tokens.meta["bad_records"] == 1 and abs(tokens.meta["sources"][0]["documents"] - whole) <= 1
    )
    fresh = prepared(tmp_path / "fresh", *flags, "--skip-bad")
    assert fresh.hash == tokens.hash
    own = ["--source", name, "--train-vocab", 300, "--workers", workers, "--skip-bad"]
    counted = [prepared(tmp_path / "own", *own), tokens]
    assert len({made.meta["sources"][0]["documents"] for made in counted}) == 1
    assert message.split(":")[0] in capsys.readouterr().out


# --- over HTTP, with huggingface-hub's own client


def test_over_http(made, words, tmp_path):
    server, address, log = local_hub.serve(made)
    env = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    code = (
        "import sys, prepare\nfrom common.errors import UserError\n"
        "for argv in {!r}:\n    try:\n        prepare.main(argv)\n"
        "    except UserError as error:\n        print('error:', error)"
    )

    def flags(source, out):
        return [
            "--source",
            source,
            "--tokenizer",
            "TinyLlama/TinyLlama_v1.1",
            "--out",
            str(tmp_path / out),
            "--workers",
            "1",
        ]

    argvs = [
        flags("hf:open-web-math/open-web-math", "a"),
        flags("hf:nobody/none", "b"),
        flags("hf:openai/gsm8k:odd", "c"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code.format(argvs)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    server.shutdown()
    assert TokenSet(tmp_path / "a", verify=True).meta["sources"][0]["documents"] == 180, (
        done.stdout + done.stderr
    )
    assert [file for file in log if file.startswith("data/")] == by_hash(OWM)
    assert "error: nobody/none: no such data set on the hub" in done.stdout
    assert "has no file that fits" in done.stdout and "main, socratic" in done.stdout
    assert not list((tmp_path / "home").rglob("*.parquet")), "shards stay in the cache"
