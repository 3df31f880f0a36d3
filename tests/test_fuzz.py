"""Every format that is read, damaged: it is read, or refused in one line.

Text files (JSON lines, parquet, compressed ones) are the matter of tests/text.
"""

import importlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fuzzing import (
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_value,
    reads_or_refuses,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import owned
from common.checksums import Checksums, file_hash
from common.errors import UserError
from common.records import read_json
from conftest import HANGS, ROOT, write_model, write_set
from data import STORED_FORMAT, Stored, TokenSet
from demo import chain
from evaluation import results, tasks, unfinished
from evaluation.pinned import read_rows
from hf import checkpoint
from hf import tokenizer as tokenizer_file
from hf.config import config_from_hf
from hf.tokenizer import Tokenizer
from hf.weight_files import weight_files
from text import building, contents, hub_datasets, writing
from tools.explore import runs
from training import finished, states

FAST, SLOW = 500, 20_000  # inputs over all formats
TEXT = "Tom has 3 apples  and\tbuys 4.\n naïve 数学 🙂 don't </s> 12345"
PIECES = 40  # of the tokenizer.model besides bytes


# --------------------------------------------------------------------------------------------------
# whole files, one of each format


@pytest.fixture(scope="module", name="whole")
def whole_fixture(vocabulary, tmp_path_factory):
    """A folder with everything in it, whole."""
    folder = tmp_path_factory.mktemp("whole")
    n = 300
    rng = np.random.RandomState(0)
    mask, kind = rng.randint(0, 2, (2, n)).astype(np.uint8)
    write_set(folder, vocabulary, n, loss_mask=mask, kind=kind)
    write_model(folder, vocabulary, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    losses = rng.random_sample(n).astype("<f2")
    (folder / "ref_loss.bin").write_bytes(losses.tobytes())
    write_note(folder)
    model = checkpoint.load(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    state = {"step": 1, "seconds": 0.5, "tokens": [1, 2], "val_loss": None}
    torch.save({**state, "model": model.state_dict(), "optimizer": {}}, folder / "train_state.pt")
    for name, value in OBJECTS.items():
        (folder / name).write_text(json.dumps(value))
    owned.claim(folder / "sources.jsonl")
    for name, rows in LINES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def write_note(folder):
    """ref_loss.json with right checksums of the losses beside it."""
    path = folder / "ref_loss.bin"
    header = json.loads((folder / "meta.json").read_text())
    note = {
        "format": STORED_FORMAT,
        "data": header["sha256"],
        "reference": "-",
        "seq_len": 16,
        "dtype": "float32",
        "count": header["count"],
        "entropy": False,
        "n_scored": -(-(header["count"] - 1) // 16),
        "checksums": {path.name: Checksums(path, path.stat().st_size).all()},
        "validation": [{"data": header["sha256"], "loss": 2.5, "name": "val"}],
    }
    (folder / "ref_loss.json").write_text(json.dumps(note))


STEP = {
    "step": 1,
    "tokens_seen": 100,
    "tokens_selected": 60,
    "loss": 2.0,
    "loss_selected": 2.5,
    "threshold": 0.1,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "tok_per_s": 1000,
    "val_loss": 2.0,
    "reference_lead": 0.1,
    "kept": {"even": 0.5},
    "val_loss_by_kind": {"even": 1.0},
}
ENTRY = {
    "task": "gsm8k",
    "n": 10,
    "published": 50.0,
    "published_se": 1.0,
    "strict": 40.0,
    "strict_se": 1.0,
    "failed": 0,
    "settings": {"mode": "cot"},
}
SAME = dict.fromkeys(unfinished.IDENTITY, "-")
OBJECTS = {
    "args.json": {
        "inputs": {"data": "-", "init": "-"},
        "init": "x",
        "data": ".",
        "steps": 10,
        "seq_len": 16,
        "batch_size": 2,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "seed": 0,
        "k": 0.6,
        "score": "excess",
        "scope": "micro",
        "ref_loss": "ref_loss.bin",
    },
    "summary.json": {
        "val_loss": 2.0,
        "exact_match": 0.5,
        "tokens_seen": 200,
        "tokens_selected": 100,
        "seconds": 1.5,
        "peak_memory_bytes": 10**9,
    },
    "results.json": {"gsm8k": ENTRY, "math": {**ENTRY, "task": "math"}},
    "hub.json": {"hf:a/b": {"commit": "0" * 40, "files": [["x/train.parquet", 10]]}},
    "progress.json": {
        "plan": {"sources": ["a", "b"]},
        "count": 30,
        "state": {
            "sources": [
                {"name": "a", "documents": 2, "tokens": 20},
                {"name": "b", "documents": 1, "tokens": 10},
            ],
            "source": 1,
            "record": 1,
            "bad": 0,
            "contaminated": 0,
            "text_bytes": 100,
        },
    },
    "model.safetensors.index.json": {
        "metadata": {"total_size": 1},
        "weight_map": {"a": "pytorch_model.bin", "b": "tokens.bin"},
    },
}
LINES = {
    "log.jsonl": [{**STEP, "step": i, "tokens_seen": 100 * i} for i in (1, 2, 3)],
    "problems.jsonl": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)],
    "p.partial-0.jsonl": [
        {"settings": SAME},
        {"idx": 1, "text": "The answer is 2."},
        {"idx": 0, "text": "1"},
    ],
    "p.jsonl": [{"idx": i, "pred": "2", "strict": True, "text": f"It is {i}."} for i in range(3)],
    "sources.jsonl": [
        {"plan": "0" * 64, "arrays": {"tokens.bin": "0" * 64}},
        {"file": "tokens.bin", "size": 600, "changed": 10**18, "hashed": 600, "sha256": "0" * 64},
        {"file": "gone.txt", "size": 5, "changed": 10**18, "hashed": 5, "sha256": "0" * 64},
    ],
}


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def message(*fields):
    """A protobuf message of (number, value) pairs: ints, floats, or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def sentencepiece_model():
    """A SentencePiece BPE with byte fallback: specials, bytes, letters and a few words."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    letters = "\u2581abcdefghijklmnopqrstuvwxyz"
    pieces += [("\u2581" + letter, -float(i), 1) for i, letter in enumerate(letters[1:])]
    pieces += [(letter, -100.0, 1) for letter in letters]
    fields = []
    for piece, score, kind in pieces:
        fields.append((1, message((1, piece.encode()), (2, score), (3, kind))))
    fields.append((2, message((3, 2), (41, 1), (42, 2))))
    fields.append((3, message((3, 1), (4, 0), (5, 1))))
    return message(*fields)


# --------------------------------------------------------------------------------------------------
# how each is read, all of it


def read_set(folder):
    data = TokenSet(folder, verify=True)
    windows = np.arange(data.n_windows(16))
    data.batch(windows, 16)
    data.labels(windows, 16)


def read_stored(folder):
    data = TokenSet(folder)
    stored = Stored(folder / "ref_loss.bin", data, 16, numerics={"dtype": "float32"})
    windows = np.arange(data.n_windows(16))
    stored.batch(windows, data.valid(windows, 16))


def read_run(folder):
    finished.summary(folder)
    chain.tokens_to_reach(folder, 1.0)
    runs.snapshots(folder)


def read_results(folder):
    entries = results.read_entries(folder)
    results.table(entries)
    results.markdown(entries)


def read_progress(folder):
    saved = writing.marked(folder)
    assert saved.plan is None or building.difference(saved.plan, {"sources": ["c"]})
    writer = SimpleNamespace(folder=folder, state=saved.state, count=saved.count)
    building.begin(writer, ["a", "b"], n_sources=2)


def read_notes(folder):
    notes = contents.Notes(folder)
    notes.other_arrays()
    contents.differing(notes, thorough=True)


def read_unfinished(folder):
    path = unfinished.partial_file(folder, "p", 0)
    unfinished.check_same(path, unfinished.saved_settings(path) or SAME, SAME)
    unfinished.read_answers(folder, "p")


def read_list(folder):
    owned.written(folder)
    owned.kind_of(folder)


def read_config(folder):
    path = folder / "config.json"
    checkpoint.parameter_shapes(config_from_hf(read_json(path, "model"), path))


def read_tokenizer(folder):
    tokenizer = Tokenizer.load(folder)
    for specials in (False, True):
        tokenizer.decode(tokenizer.encode(TEXT, specials))
    assert len(tokenizer.hash) == 64
    tokenizer.save(folder / "saved")


def read_weights(folder):
    checkpoint.load(folder)
    checkpoint.model_hash(folder)


def read_problems(folder):
    for problem in tasks.load(str(folder / "problems.jsonl")):
        tasks.prompt(problem)


def read_generations(folder):
    for i, row in enumerate(read_rows(folder / "problems.jsonl")):
        results.text_of({"gt": "1", "text": row.get("question"), **row}, f"line {i}")


# --------------------------------------------------------------------------------------------------
# how each is damaged


def damage_object(name):
    def damage(rng, folder):
        path = folder / name
        path.write_bytes(damaged_json(rng, json.loads(path.read_text())))

    return damage


def damage_lines(name):
    def damage(rng, folder):
        (folder / name).write_bytes(damaged_lines(rng, LINES[name]))

    return damage


def damage_bytes(name):
    def damage(rng, folder):
        path = folder / name
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))

    return damage


def damage_arrays(rng, folder):
    """Arrays that do not fit, under hashes that do: what a faulty writer would leave."""
    name = rng.choice(["tokens.bin", "loss_mask.bin", "kind.bin"])
    damage_bytes(name)(rng, folder)
    header = json.loads((folder / "meta.json").read_text())
    tokens = folder / "tokens.bin"
    header |= {"sha256": file_hash(tokens), "sample_sha256": file_hash(tokens, sampled=True)}
    if rng.randrange(2):
        header["count"] = tokens.stat().st_size // 2
    if rng.randrange(2):
        header["vocab_size"] = rng.choice([1, 100, 70_000])
    (folder / "meta.json").write_text(json.dumps(header))


def damage_losses(rng, folder):
    damage_bytes("ref_loss.bin")(rng, folder)
    if rng.randrange(2):
        write_note(folder)


def damage_safetensors(rng, folder):
    """The header's JSON, with its length right or wrong, or any bytes."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.randrange(3) == 0:
        path.write_bytes(damaged_bytes(rng, content))
        return
    header = damaged_json(rng, json.loads(content[8 : 8 + size]))
    length = rng.choice([len(header)] * 6 + [0, len(header) - 1, 10**9, 2**63])
    path.write_bytes(struct.pack("<Q", max(0, length)) + header + content[8 + size :])


def damage_state(rng, folder):
    """What a state holds beside tensors."""
    path = folder / "train_state.pt"
    state = torch.load(path, weights_only=True)
    record = {key: state.pop(key) for key in states.KEYS}
    changed = damaged_value(rng, record)
    torch.save({**state, **changed} if isinstance(changed, dict) else changed, path)


class Printing:
    """What a hostile pickle would do."""

    def __reduce__(self):
        return print, ("run!",)


def damage_pickle(rng, folder):
    path = folder / "pytorch_model.bin"
    how = rng.randrange(4)
    if how == 0:
        damage_bytes(path.name)(rng, folder)
        return
    state = torch.load(path, weights_only=True)
    name = rng.choice(sorted(state))
    if how == 1:
        state[name] = rng.choice(
            [
                torch.zeros(1).expand(1 << 40),
                torch.zeros(3, dtype=torch.complex64).conj(),
                torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                torch.zeros(2, 2).to_sparse(),
                torch.zeros(0),
                torch.tensor(True),
                torch.ones(2, device="meta"),
                None,
                "x",
                [],
            ]
        )
    elif how == 2:
        state[rng.choice([0, "x", ("a",), None])] = state.pop(name)
    else:
        state = rng.choice([[], None, {}, 5, torch.zeros(2)])
    torch.save(state, path)
    if rng.randrange(8) == 0:
        path.write_bytes(pickle.dumps(Printing()))


def damage_tokenizer(rng, folder):
    """tokenizer.json where it hurts: merges, ids, patterns."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    how = rng.randrange(5)
    if how == 0:
        vocab[rng.choice(sorted(vocab))] = rng.choice([-1, 0, 2**24, 2**40, 1.5, "x", None])
    elif how == 1:
        merge = rng.choice([["a"], ["a", "b", "c"], "a b c", "", ["a", 1], 5, None, [["a"], "b"]])
        spec["model"]["merges"].append(merge)
    elif how == 2:
        rule = rng.choice(
            ["(", "(a+)+$", "", "a*", "(?=x)", "[", "\\p{Z", "(?i)x|", 5, "x{9999999}"]
        )
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }
    elif how == 3:
        token = {"content": rng.choice(["", "a", "<s>", 5, None]), "id": rng.choice([0, -1, 2**40])}
        spec["added_tokens"].append(token)
    path.write_bytes(
        damaged_json(rng, spec) if rng.randrange(3) == 0 else json.dumps(spec).encode()
    )


JSON_TOKENIZER = ("tokenizer.model",)
MODEL_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PICKLE = ("model.safetensors", "model.safetensors.index.json")

FORMATS = {  # name: (what lies not beside it, damage, read)
    "meta.json": ((), damage_object("meta.json"), read_set),
    "arrays": ((), damage_arrays, read_set),
    "ref_loss.json": ((), damage_object("ref_loss.json"), read_stored),
    "ref_loss.bin": ((), damage_losses, read_stored),
    "args.json": ((), damage_object("args.json"), read_run),
    "log.jsonl": ((), damage_lines("log.jsonl"), read_run),
    "summary.json": ((), damage_object("summary.json"), read_run),
    "results.json": ((), damage_object("results.json"), read_results),
    "hub.json": ((), damage_object("hub.json"), lambda f: hub_datasets.noted(f / "hub.json")),
    "progress.json": ((), damage_object("progress.json"), read_progress),
    "sources.jsonl": ((), damage_lines("sources.jsonl"), read_notes),
    "unfinished answers": ((), damage_lines("p.partial-0.jsonl"), read_unfinished),
    "answers": (
        (),
        damage_lines("p.jsonl"),
        lambda f: unfinished.finished_answers(f / "p.jsonl"),
    ),
    "the list": ((), damage_bytes(owned.LIST), read_list),
    "config.json": ((), damage_object("config.json"), read_config),
    "index": (PICKLE[:1], damage_object("model.safetensors.index.json"), weight_files),
    "safetensors": ((), damage_safetensors, read_weights),
    "pickle": (PICKLE, damage_pickle, read_weights),
    "tokenizer.json": (JSON_TOKENIZER, damage_tokenizer, read_tokenizer),
    "tokenizer's json": (JSON_TOKENIZER, damage_object("tokenizer.json"), read_tokenizer),
    "its config": (JSON_TOKENIZER, damage_object("tokenizer_config.json"), read_tokenizer),
    "tokenizer.model": (MODEL_TOKENIZER, damage_bytes("tokenizer.model"), read_tokenizer),
    "state": ((), damage_bytes("train_state.pt"), states.newest_of),
    "its record": ((), damage_state, states.newest_of),
    "problems": ((), damage_lines("problems.jsonl"), read_problems),
    "generations": ((), damage_lines("problems.jsonl"), read_generations),
}


def copied(name, whole, place):
    """A whole folder without what does not belong beside this format."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, ignore=shutil.ignore_patterns(*FORMATS[name][0]))
    return place


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read(name, whole, tmp_path):
    """Else the rest of this file would say nothing."""
    _, _, read = FORMATS[name]
    folder = copied(name, whole, tmp_path / "f")
    assert reads_or_refuses(lambda: read(folder))


def fuzz(name, whole, place, inputs):
    """Damage and read so many times."""
    _, damage, read = FORMATS[name]
    counted = {True: 0, False: 0}

    @settings(
        max_examples=inputs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def once(rng):
        damage(rng, copied(name, whole, place))
        counted[reads_or_refuses(lambda: read(place))] += 1

    once()
    assert counted[False], f"nothing of {counted} was refused"
    return counted


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name, whole, tmp_path, capsys):
    fuzz(name, whole, tmp_path / "f", FAST // len(FORMATS))
    assert "run!" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files(name, whole, tmp_path, capsys):
    fuzz(name, whole, tmp_path / "f", SLOW // len(FORMATS))
    assert "run!" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# through the command line

SCORE = "score.py --data f --model f --out losses/l.bin --seq-len 16 --device cpu"
TRAIN = "train_slm.py --data f --init f --ref-loss f/ref_loss.bin --out run --steps 1 --seq-len 16"
EVALUATE = "eval_math.py --model f --tasks f/problems.jsonl --out eval --device cpu"
COMMANDS = {
    "meta.json": SCORE,
    "arrays": SCORE,
    "config.json": SCORE,
    "safetensors": SCORE,
    "pickle": SCORE,
    "tokenizer.json": SCORE,
    "its config": SCORE,
    "ref_loss.json": TRAIN,
    "ref_loss.bin": TRAIN,
    "problems": EVALUATE,
}


def refused(name, whole, place, seed):
    """A folder with damage that its reader refuses: the first after `seed`."""
    _, damage, read = FORMATS[name]
    for number in itertools.count(1000 * seed):
        damage(random.Random(number), copied(name, whole, place))
        if not reads_or_refuses(lambda: read(place)):
            return


def check_one_line(code, err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    assert err.endswith(lines[0] + "\n"), "it is not the last line"


@pytest.mark.parametrize("name", ["meta.json", "safetensors", "ref_loss.json"])
def test_a_stage_refuses(name, whole, tmp_path, stage):
    refused(name, whole, tmp_path / "f", seed=0)
    script, arguments = COMMANDS[name].split(" ", 1)
    code, _, err = stage(importlib.import_module(script.removesuffix(".py")), arguments)
    check_one_line(code, err)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses(name, seed, whole, tmp_path):
    refused(name, whole, tmp_path / "f", seed)
    script, *arguments = COMMANDS[name].split()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    check_one_line(done.returncode, done.stderr)


# --------------------------------------------------------------------------------------------------
# what once was a traceback, a hang or a crash


def changed(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def with_pattern(rule):
    def change(spec):
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }

    return change


@pytest.mark.parametrize(
    "name, file, change, words",
    [
        ("meta.json", "meta.json", lambda m: m.update(count=-1), "count is -1, wanted 0 or more"),
        ("meta.json", "meta.json", lambda m: m.update(dtype="x"), "dtype is 'x', wanted <u2"),
        ("meta.json", "meta.json", lambda m: m.update(kinds={}), "kinds is {}, wanted a list"),
        ("meta.json", "meta.json", lambda m: m.update(kinds=["a"]), "a label of 1, meta.json"),
        ("meta.json", "meta.json", lambda m: m.update(vocab_size=5), "all are below 5"),
        ("meta.json", "meta.json", lambda m: m.pop("tokenizer"), "tokenizer is missing"),
        ("ref_loss.json", "ref_loss.json", lambda m: m.pop("checksums"), "checksums is missing"),
        ("ref_loss.json", "ref_loss.json", lambda m: m.update(format=1), "format is 1, wanted 2"),
        ("results.json", "results.json", lambda m: m["math"].pop("n"), "['math'].n is missing"),
        ("hub.json", "hub.json", lambda m: m["hf:a/b"]["files"].append(["../x", 1]), "[path, byte"),
        (
            "tokenizer.json",
            "tokenizer.json",
            lambda m: m["model"]["merges"].append("a b c"),
            "merge",
        ),
        ("tokenizer.json", "tokenizer.json", lambda m: m["model"].update(vocab=[]), "the vocab []"),
        (
            "tokenizer.json",
            "tokenizer.json",
            lambda m: m["model"]["vocab"].update(a=1),
            "of one id",
        ),
        (
            "tokenizer.json",
            "tokenizer.json",
            lambda m: m["model"]["vocab"].update(a=1 << 40),
            "the id",
        ),
        (
            "tokenizer.json",
            "tokenizer.json",
            lambda m: m["added_tokens"][0].update(content=""),
            "added",
        ),
        ("tokenizer.json", "tokenizer.json", with_pattern("("), "the split by '('"),
        ("tokenizer.json", "tokenizer.json", with_pattern("a*"), "which matches nothing"),
        ("its config", "config.json", lambda m: m.update(eos_token_id="x"), "eos_token_id"),
        ("config.json", "config.json", lambda m: m.update(eos_token_id={}), "eos_token_id is '{}'"),
    ],
)
def test_what_once_broke(name, file, change, words, whole, tmp_path):
    folder = copied(name, whole, tmp_path / "f")
    if name == "its config":
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "special_tokens_map.json").unlink()
    changed(folder, file, change)
    with pytest.raises(UserError, match=re.escape(words)):
        FORMATS[name][2](folder)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "meta.json"]
)
def test_a_pipe_is_not_waited_for(file, whole, tmp_path):
    folder = copied("tokenizer.json", whole, tmp_path / "f")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(UserError, match=f"{file} is a pipe or a device"):
        if file == "meta.json":
            read_set(folder)
        elif file == "tokenizer.json":
            read_tokenizer(folder)
        else:
            read_weights(folder)


def test_a_pattern_that_takes_for_ever(vocabulary, whole, tmp_path, monkeypatch):
    """tiktoken gives it up, and then Python's regex does."""
    monkeypatch.setattr(tokenizer_file, "PATIENCE", 0.1)
    folder = copied("tokenizer.json", whole, tmp_path / "f")
    changed(folder, "tokenizer.json", with_pattern(r"(x+x+)+y\b(?<!z)"))
    with pytest.raises(UserError, match="takes over 0.1 s to split a document of 5,000 characters"):
        Tokenizer.load(folder).encode("x" * 5000)
