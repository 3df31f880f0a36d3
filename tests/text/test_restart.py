"""prepare.py killed, interrupted, out of disk, called again: the same bytes, or what differs."""

import json
import resource

import pytest
from prepared import (  # noqa: F401 (fixtures)
    folder_fixture,
    forked,
    killed_at,
    prepared,
    same_files,
    texts_fixture,
    write,
)

from common import locks
from common.errors import UserError
from data import TokenSet
from hf.tokenizer import Tokenizer
from text import building, reading
from text.pieces import Preparation
from text.sources import open_set

POINTS = [  # in the order of the work, each one further on
    ("call:prepare:train_bpe:1", "SIGKILL"),
    ("inside:tokenizer.json:1", "SIGKILL"),
    ("after:tokenizer_config.json:1", "SIGKILL"),
    ("inside:progress.json:2", "SIGKILL"),
    ("call:text.writing:TokenSetWriter.append:4", "SIGKILL"),
    ("before:progress.json:5", "SIGKILL"),
    ("after:progress.json:6", "SIGKILL"),
    ("call:text.writing:TokenSetWriter.append:9", "SIGINT"),
    ("call:text.writing:TokenSetWriter.mark:9", "SIGTERM"),
]


def marked(out):
    """How many tokens a restart has."""
    path = out / "progress.json"
    return json.loads(path.read_text()).get("count", 0) if path.exists() else 0


@pytest.mark.slow
def test_killed_at_many_points_the_same_command_gives_the_same_bytes(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 5000)
    paths = [
        write(tmp_path / "a.parquet", texts * 2),
        write(tmp_path / "b.jsonl.gz", texts * 2),
        write(tmp_path / "c.jsonl", texts * 2),
    ]
    prepared(tmp_path / "whole", "--source", *paths, "--train-vocab", 300)
    monkeypatch.setattr(building, "MARK_SECONDS", -1)  # after every piece
    out = tmp_path / "out"
    command = ["--source", *paths, "--train-vocab", 300, "--out", out, "--workers", 2]
    marks = [0]
    for point, sent in POINTS:
        killed_at(point, command, sent)
        marks.append(marked(out))
    code, printed = forked(command)
    assert code == 0, printed
    assert marks == sorted(marks) and 0 < marks[5] < marks[6] < marks[7] < marks[8]
    assert marks[-1] < TokenSet(out).count
    assert same_files(tmp_path / "whole", out)


# `finish` renames the arrays, hashes them and writes the header.
CLOSING = [
    "before:out/tokens.bin:1",
    "after:out/tokens.bin:1",
    "before:out/loss_mask.bin:1",
    "after:out/loss_mask.bin:1",
    "inside:out/meta.json:1",
    "after:out/meta.json:1",
]


@pytest.mark.parametrize("point", CLOSING)
def test_killed_while_the_set_is_closed_no_token_is_made_again(
    folder, tmp_path, monkeypatch, point
):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "the sum", "completion": "is 12345"}\n')
    out = tmp_path / "out"
    flags = ["--source", folder / "set", folder / "data.jsonl", path]
    with monkeypatch.context() as patch:
        patch.setattr(building, "MARK_SECONDS", -1)
        killed_at(point, [*flags, "--out", out, "--workers", 1])
    assert (out / "meta.json").exists() == (point == "after:out/meta.json:1")
    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "piece", lambda *args: pytest.fail("it was made again"))
        prepared(out, *flags)
    prepared(tmp_path / "whole", *flags)
    assert same_files(out, tmp_path / "whole")


def test_finished_sets_are_used_again_refused_or_replaced(
    folder, texts, tmp_path, capsys, monkeypatch
):
    waits, lock = [], locks.lock_folder

    def noted(folder, kind, wait=0.0):
        waits.append(wait)
        lock(folder, kind, wait)

    monkeypatch.setattr(locks, "lock_folder", noted)
    path, out = write(tmp_path / "x.jsonl", texts[:5]), tmp_path / "out"
    first = prepared(out, "--source", path, "--tokenizer", folder / "set")
    assert set(waits) == {0.0}  # another one makes it: that takes long
    stamp = (out / "tokens.bin").stat().st_mtime_ns
    capsys.readouterr()
    prepared(out, "--source", path, "--tokenizer", folder / "set")
    assert (
        "used again" in capsys.readouterr().out and (out / "tokens.bin").stat().st_mtime_ns == stamp
    )
    assert waits[-1] == building.TURN  # for another one that looks at it
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
    with pytest.raises(UserError, match="overlaps with --source"):
        prepared(out, "--source", out, folder / "set", "--overwrite")
    model = tmp_path / "model"
    Tokenizer.load(folder / "set").save(model)
    with pytest.raises(UserError, match="holds .*json, which the kit wrote, wanted a token set"):
        prepared(model, "--source", path, "--tokenizer", folder / "set", "--overwrite")
    assert (model / "tokenizer.json").exists()


def test_an_unfinished_set_of_something_else_is_refused_or_started_over(
    folder, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reading, "BLOCK", 5000)
    path, out = write(tmp_path / "x.jsonl", texts), tmp_path / "out"
    flags = ["--source", path, "--tokenizer", folder / "set"]
    monkeypatch.setattr(building, "MARK_SECONDS", -1)
    killed_at("call:text.writing:TokenSetWriter.append:3", [*flags, "--out", out, "--workers", 1])
    before = marked(out)
    with pytest.raises(UserError, match="unfinished .*max_tokens was null, is now 99.*--overwrite"):
        prepared(out, *flags, "--max-tokens", 99)
    assert marked(out) == before > 0
    with monkeypatch.context() as patch:  # nothing is left of it, not even with the same arguments
        patch.setattr(building, "fill", lambda writer, *args: pytest.fail(str(writer.count)))
        with pytest.raises(pytest.fail.Exception, match="^0$"):
            prepared(out, *flags, "--overwrite")
    assert prepared(out, *flags, "--max-tokens", 99).count == 99
    assert "is started over (max_tokens was null, is now 99)" in capsys.readouterr().out


def test_a_set_whose_source_has_other_targets_now_is_another_one(folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "the sum", "a": "is 12345"}\n' * 9)
    pairs = ["--source", path, "--prompt-field", "q", "--response-field", "a"]
    pairs += ["--tokenizer", folder / "set"]
    masked = prepared(tmp_path / "source", *pairs, "--mask-prompt")
    mixed = ["--source", tmp_path / "source", folder / "set"]
    prepared(tmp_path / "mixed", *mixed)
    prepared(tmp_path / "mixed", *mixed)
    assert prepared(tmp_path / "source", *pairs, "--overwrite").hash == masked.hash
    open_set.cache_clear()
    with pytest.raises(UserError, match="labels was .*targets .* is now null"):
        prepared(tmp_path / "mixed", *mixed)


def test_a_tokenizer_with_another_end_of_text_makes_another_set(folder, texts, tmp_path):
    """Its vocabulary is the same, and so is its hash: as of a base model and its chat model."""
    path = write(tmp_path / "x.jsonl", texts[:5])
    chat = tmp_path / "chat"
    Tokenizer.load(folder / "set").save(chat)
    config = json.loads((chat / "tokenizer_config.json").read_text())
    bos = {"bos_token": config["eos_token"], "add_bos_token": True}
    (chat / "tokenizer_config.json").write_text(json.dumps(config | bos))
    assert Tokenizer.load(chat).hash == Tokenizer.load(folder / "set").hash
    prepared(tmp_path / "out", "--source", path, "--tokenizer", folder / "set")
    with pytest.raises(UserError, match="ends was .* is now"):
        prepared(tmp_path / "out", "--source", path, "--tokenizer", chat)
    prepared(tmp_path / "other", "--source", path, "--tokenizer", chat)
    with pytest.raises(UserError, match=r"got a token set with \(BOS, EOS, BOS in front\)"):
        prepared(tmp_path / "mixed", "--source", folder / "set", tmp_path / "other")


def test_sets_of_an_older_kit_whose_plan_had_a_seed_go_on(folder, texts, tmp_path, monkeypatch):
    def grow_older(path):
        saved = json.loads(path.read_text())
        saved["plan"]["seed"] = 0
        path.write_text(json.dumps(saved))

    monkeypatch.setattr(reading, "BLOCK", 5000)
    path, out = write(tmp_path / "x.jsonl", texts), tmp_path / "out"
    flags = ["--source", path, "--tokenizer", folder / "set"]
    whole = prepared(tmp_path / "whole", *flags)
    monkeypatch.setattr(building, "MARK_SECONDS", -1)
    killed_at("call:text.writing:TokenSetWriter.append:3", [*flags, "--out", out, "--workers", 1])
    grow_older(out / "progress.json")
    assert marked(out) > 0
    assert prepared(out, *flags).hash == whole.hash
    grow_older(out / "meta.json")
    with monkeypatch.context() as patch:
        patch.setattr(building, "fill", lambda *args: pytest.fail("it was made again"))
        assert prepared(out, *flags).hash == whole.hash


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    folder, texts, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(reading, "BLOCK", 2000)
    monkeypatch.setattr(building, "MARK_SECONDS", -1)
    flags = ["--source", write(tmp_path / "x.jsonl", texts), "--tokenizer", folder / "set"]
    room = (folder / "set" / "tokens.bin").stat().st_size // 2

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [*flags, "--out", tmp_path / "out", "--workers", workers]
    code, printed = forked(command, fill_the_disk)
    assert code == 2 and "File too large" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert prepared(tmp_path / "out", *flags).hash == TokenSet(folder / "set").hash
