"""Data sets of the hub: a local stand-in for it, published formats, mixtures, kills, damage."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common.errors import UserError
from conftest import ROOT
from data import TokenSet
from evaluation import tasks
from hf import downloads
from hf.tokenizer import Tokenizer
from prepared import documents, killed_at, prepared, same_files
from text import building, formats, hub_datasets, reading, sources
from tools import decontaminate, local_hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    local_hub.make(root, n=60)
    return root


@pytest.fixture
def online(made, tmp_path, monkeypatch):
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


@pytest.fixture
def words(made):
    return made / "models/TinyLlama/TinyLlama_v1.1"


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
    ],
)
def test_shards_of_a_config_and_split(files, config, split, wanted):
    assert [
        path for path, _ in hub_datasets.choose(files, config, split, sources.SHARDS, ".json")
    ] == by_hash(wanted)


OWM = [f"data/train-{i:05}-of-00003.parquet" for i in range(3)]


def by_hash(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())


def test_a_part_of_a_data_set_comes_from_all_of_its_folders():
    """80 languages of 1 to 40 shards: the first tenth of the shards holds each large language by its share."""
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


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "```python\nprint(5)\n```\n```output\n5\n```\nIt is 5."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def test_chats_by_turns():
    texts = formats.document("chat", ["messages"], [TURNS])
    assert texts == [
        "<|system|>\nBe kind.\n<|user|>\n2+3?\n<|assistant|>\n",
        "```python\nprint(5)\n```\n```output\n",
        "5\n```\n",
        "It is 5.\n",
        "<|user|>\nSure?\n<|assistant|>\n",
        "Yes.",
    ]
    other = [
        {
            "from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]),
            "value": t["content"],
        }
        for t in TURNS
    ]
    assert formats.document("chat", ["conversations"], [other]) == texts
    assert formats.document("chat", ["prompt", "completion"], ["q", "```output\nno end"]) == [
        "<|user|>\nq\n<|assistant|>\n",
        "```output\n",
        "no end",
        "",
    ]
    for bad in (None, "text", [{"role": "user", "content": "q"}], [{"role": "assistant"}], [[1]]):
        with pytest.raises(ValueError):
            formats.document("chat", ["messages"], [bad])


SETS = {  # repository: (form, a document, of that what is learnt)
    "open-web-math/open-web-math": ("text", None, None),
    "cerebras/SlimPajama-627B": ("text", None, None),
    "bigcode/starcoderdata:java": ("text", "def add_0(a, b):\n    return a + b + 0\n" * 5, None),
    "meta-math/MetaMathQA": ("pair", "{q}\n{r}\nThe answer is: {s}", None),
    "TIGER-Lab/MathInstruct": ("pair", "{q}\n{r}", None),
    "openai/gsm8k:main:test": ("pair", "test main: {q}\n{r}", None),
    "AI-MO/NuminaMath-TIR": (
        "chat",
        "<|user|>\n{q}\n<|assistant|>\n{t}",
        "Add the two numbers.\n```python\nprint({a} + {b})\n```\n```output\nHe has $\\boxed{{{s}}}$ apples.",
    ),
    "allenai/tulu-v2-sft-mixture": (
        "chat",
        "<|user|>\n{q}\n<|assistant|>\n{r}\n<|user|>\n{q}\n<|assistant|>\n{r}",
        "{r}\n{r}",
    ),
    "teknium/OpenHermes-2.5": ("chat", "<|user|>\n{q}\n<|assistant|>\n{r}", "{r}"),
}


@pytest.mark.parametrize("name", SETS)
def test_every_published_format(online, words, tmp_path, capsys, name):
    form, whole, learnt = SETS[name]
    tokens = prepared(tmp_path / "out", "--source", f"hf:{name}", "--tokenizer", words)
    shown = capsys.readouterr().out
    assert f"taken as {form} from" in shown and "at commit 0123456789ab" in shown
    q, a, b = local_hub.problem(0)
    fill = {
        "q": q,
        "a": a,
        "b": b,
        "s": a + b,
        "t": local_hub.trajectory(0)[1],
        "r": f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
    }
    if whole is None:
        file = hub_datasets.choose(
            [(str(p.relative_to(online[0] / name)), 1) for p in (online[0] / name).rglob("*")],
            None,
            None,
            sources.SHARDS,
        )[0][0]
        whole = local_hub.page(
            (5000 if "Slim" in name else 0) + 60 * int(re.search(r"train[-_](\d+)", file)[1])
        )
    else:
        whole = whole.format(**fill) if "{q}" in whole else whole
    tokenizer, ids = Tokenizer.load(words), documents(tokens)[0]
    assert tokenizer.decode(ids) == whole
    assert tokens.meta["sources"] == [
        {
            "name": f"hf:{name}",
            "documents": tokens.meta["sources"][0]["documents"],
            "tokens": tokens.count,
        }
    ]
    if learnt is None:
        assert tokens.loss_mask is None
    else:
        mask = tokens.loss_mask[: len(ids) + 1].astype(bool)
        assert tokenizer.decode(np.array(ids)[mask[:-1]]) == learnt.format(**fill) and mask[-1]
    assert not (tmp_path / "out" / hub_datasets.FOLDER).exists()


def test_an_input_beside_the_instruction_belongs_to_the_prompt():
    assert formats.guess({"instruction", "input", "output"}) == (
        "pair",
        ["instruction", "input", "output"],
    )
    assert formats.document(
        "pair", ["instruction", "input", "output"], ["Add.", "2 and 3", "5"]
    ) == ["Add.\n2 and 3\n", "5"]
    assert formats.document(
        "pair", ["instruction", "input", "output"], ["Add 2 and 3.", "", "5"]
    ) == ["Add 2 and 3.\n", "5"]


def test_pairs_are_masked_where_asked_for(online, words, tmp_path):
    tokens = prepared(
        tmp_path / "out",
        "--source",
        "hf:openai/gsm8k:main:train",
        "--tokenizer",
        words,
        "--mask-prompt",
    )
    tokenizer, ids = Tokenizer.load(words), np.array(documents(tokens)[0])
    mask = tokens.loss_mask[: len(ids)].astype(bool)
    assert tokenizer.decode(ids[~mask]) == f"train main: {local_hub.problem(0)[0]}\n"


@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_arrays_are_read_in_blocks(tmp_path, words, monkeypatch, block):
    rows = [
        {"text": t, "n": [1, {"a": "]"}]}
        for t in ("a", "naïve 数学 🙂", "x, ] [ {", '"quoted" \\ \n', "last")
    ]
    path = tmp_path / "x.json"
    path.write_text(" \n" + json.dumps(rows, indent=1, ensure_ascii=False))
    whole = prepared(tmp_path / "whole", "--source", path, "--tokenizer", words)
    monkeypatch.setattr(reading, "BLOCK", block)
    assert prepared(tmp_path / "out", "--source", path, "--tokenizer", words).hash == whole.hash
    assert [Tokenizer.load(words).decode(d) for d in documents(whole)] == [
        row["text"] for row in rows
    ]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="x.json: damaged after record 4"):
        prepared(tmp_path / "cut", "--source", path, "--tokenizer", words)


def test_files_of_the_users_are_left_alone(online, words, tmp_path, monkeypatch):
    """Neither prepare.py nor tools.decontaminate deletes what lies in or beside --out."""
    (tmp_path / "out/shard").mkdir(parents=True)
    mine = [tmp_path / "out/shard/thesis.txt", tmp_path / "out/tokens.bin", tmp_path / "hub.json"]
    for path in mine:
        path.write_text("years of work")
    with pytest.raises(UserError, match="holds tokens.bin, but is not a token set"):
        prepared(
            tmp_path / "out", "--source", "hf:open-web-math/open-web-math", "--tokenizer", words
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        tasks,
        "load",
        lambda name, data_dir: [
            tasks.Example(0, "one two three four five six seven eight nine", "", "", "", {})
        ],
    )
    for flags in ([], ["--out", "clean.jsonl"]):
        decontaminate.main(
            ["--source", "hf:open-web-math/open-web-math", "--tasks", "gsm8k", *flags]
        )
    assert all(path.read_text() == "years of work" for path in mine)
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 180
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hub") == [
        "clean.jsonl",
        "hub.json",
        "out",
    ]


# --- mixtures


@pytest.mark.parametrize(
    "weights, message",
    [("nan 1", "a weight above 0"), ("inf 1", "a weight above 0"), ("1 100", "less than a token")],
)
def test_a_mixture_that_cannot_be(online, words, tmp_path, weights, message):
    with pytest.raises(UserError, match=message):
        prepared(
            tmp_path / "out",
            "--source",
            "hf:cerebras/SlimPajama-627B",
            "hf:bigcode/starcoderdata",
            "--tokenizer",
            words,
            "--mix",
            *weights.split(),
            "--max-tokens",
            10,
        )


def test_a_mixtures_proportions_are_exact_for_any_number_of_workers(online, words, tmp_path):
    names = [
        "hf:cerebras/SlimPajama-627B",
        "hf:bigcode/starcoderdata",
        "hf:open-web-math/open-web-math",
    ]
    for workers in (1, 2):
        tokens = prepared(
            tmp_path / str(workers),
            "--source",
            *names,
            "--tokenizer",
            words,
            "--mix",
            6,
            3,
            1,
            "--max-tokens",
            10001,
            "--workers",
            workers,
        )
        counts = [entry["tokens"] for entry in tokens.meta["sources"]]
        assert (
            np.abs(np.array(counts) / 10001 - [0.6, 0.3, 0.1]).max() < 1e-4
            and sum(counts) == tokens.count == 10001
        )
        assert [entry["name"] for entry in tokens.meta["sources"]] == names
    assert same_files(tmp_path / "1", tmp_path / "2")
    part = prepared(
        tmp_path / "part", "--source", names[1], "--tokenizer", words, "--max-tokens", counts[1]
    )
    assert np.array_equal(tokens.tokens[counts[0] : counts[0] + counts[1]], part.tokens)
    with pytest.raises(UserError, match="starcoderdata ends .* tokens short of its share"):
        prepared(
            tmp_path / "short",
            "--source",
            *names[:2],
            "--tokenizer",
            words,
            "--mix",
            1,
            9,
            "--max-tokens",
            60000,
        )


@pytest.mark.parametrize(
    "flags", [["--mix", 1], ["--mix", 1, 0, "--max-tokens", 9], ["--mix", 1, 2]]
)
def test_mixtures_that_make_no_sense(words, tmp_path, flags):
    with pytest.raises(
        UserError, match="wanted a weight above 0 for each of 2 sources, and --max-tokens"
    ):
        prepared(tmp_path / "out", "--source", "a", "b", "--tokenizer", words, *flags)


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
        "call:data:TokenSetWriter.append:10",
        "inside:progress.json:10",
        "call:data:TokenSetWriter.append:10",
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


@pytest.mark.parametrize("workers", [1, 2])
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
        "import sys, prepare\nfrom common.errors import UserError\nfor argv in {!r}:\n    try:\n        prepare.main(argv)\n"
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
