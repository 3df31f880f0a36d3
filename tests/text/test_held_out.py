"""prepare.py --val-share: which documents are held out, and that nothing else decides it."""

import hashlib
import random

import pytest
from prepared import (  # noqa: F401 (fixtures)
    documents,
    folder_fixture,
    killed_at,
    prepared,
    same_files,
    texts_fixture,
    write,
)

import prepare
from common.errors import UserError
from data import TokenSet
from hf.tokenizer import Tokenizer

SHARE = 0.1


def number(text):
    """By hand: the first 64 bits of the text's sha256 as a number from 0 to 1."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


@pytest.fixture(name="corpus")
def corpus_fixture(folder, texts, tmp_path):
    """Two files with 200 of their 600 documents in both, in another order."""
    both = texts[100:300]
    random.Random(7).shuffle(both)
    sources = [write(tmp_path / "a.jsonl", texts[:300]), write(tmp_path / "b.parquet", both)]
    flags = ["--tokenizer", folder / "set", "--val-share", SHARE]
    return sources, flags, texts[:300] + both


def test_a_hash_of_the_text_decides(corpus, tmp_path, folder):
    sources, flags, texts = corpus
    rest = prepared(tmp_path / "out", "--source", *sources, *flags)
    val = TokenSet(tmp_path / "out/val", verify=True)
    tokenizer = Tokenizer.load(folder / "set")
    for tokens, held_out in ((rest, False), (val, True)):
        wanted = [text for text in texts if (number(text) < SHARE) == held_out]
        assert documents(tokens) == [tokenizer.encode(text).tolist() for text in wanted]
        assert tokens.tokenizer_hash == tokenizer.hash
    seen = {tuple(ids) for ids in documents(rest)}
    assert not seen & {tuple(ids) for ids in documents(val)}  # copies are on one side
    share = val.count / (val.count + rest.count)
    assert 0.03 < share < 0.2
    prepare.main(["--verify", "--out", str(tmp_path / "out")])
    damaged = tmp_path / "out/val/tokens.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"xy")
    with pytest.raises(UserError, match="val/tokens.bin is not the file that"):
        prepare.main(["--verify", "--out", str(tmp_path / "out")])


def test_workers_and_order_make_no_difference(corpus, tmp_path):
    sources, flags, _ = corpus
    prepared(tmp_path / "one", "--source", *sources, *flags)
    prepared(tmp_path / "three", "--source", *sources, *flags, "--workers", 3)
    assert same_files(tmp_path / "one", tmp_path / "three")
    assert same_files(tmp_path / "one/val", tmp_path / "three/val")
    prepared(tmp_path / "turned", "--source", *sources[::-1], *flags)
    one, turned = (sorted(documents(TokenSet(tmp_path / n / "val"))) for n in ("one", "turned"))
    assert one == turned


def test_a_vocabulary_of_its_own_and_a_bound(texts, tmp_path):
    path = write(tmp_path / "a.jsonl", texts)
    flags = ["--source", path, "--train-vocab", 400, "--val-share", 0.2, "--max-tokens", 3000]
    rest = prepared(tmp_path / "out", *flags)
    val = TokenSet(tmp_path / "out/val")
    assert (rest.count, val.count) == (3000, 600)
    assert val.tokenizer_hash == rest.tokenizer_hash


def test_a_vocabulary_is_not_learnt_from_what_is_held_out(texts, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", texts)
    learn = prepare.train_bpe
    learnt = []

    def noted(some, size):
        learnt.extend(some)
        return learn(learnt, size)

    monkeypatch.setattr(prepare, "train_bpe", noted)
    prepared(tmp_path / "out", "--source", path, "--train-vocab", 400, "--val-share", 0.2)
    assert learnt == [text for text in texts if number(text) >= 0.2]


def test_killed_on_the_way_it_ends_the_same(corpus, tmp_path):
    sources, flags, _ = corpus
    argv = ["--source", *sources, *flags, "--workers", 1]
    prepared(tmp_path / "whole", *argv)
    killed_at("before:meta.json:2", ["--out", tmp_path / "cut", *argv])
    assert (tmp_path / "cut/meta.json").exists() and not (tmp_path / "cut/val/meta.json").exists()
    prepared(tmp_path / "cut", *argv)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert same_files(tmp_path / "whole/val", tmp_path / "cut/val")


def test_started_over_and_killed_between_its_two_sets(corpus, tmp_path):
    """What was held out before is in the new training set: it must not be taken for its own."""
    sources, flags, _ = corpus
    share = flags.index("--val-share") + 1
    less = [*flags[:share], 0.02, *flags[share + 1 :]]
    argv = ["--source", *sources, *less, "--workers", 1]
    prepared(tmp_path / "whole", *argv)
    prepared(tmp_path / "cut", "--source", *sources, *flags)
    killed_at("call:prepare:prepare_set:2", ["--out", tmp_path / "cut", *argv, "--overwrite"])
    assert (tmp_path / "cut/meta.json").exists()
    assert not (tmp_path / "cut/val/meta.json").exists()
    prepared(tmp_path / "cut", *argv)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert same_files(tmp_path / "whole/val", tmp_path / "cut/val")


def test_what_is_refused(corpus, tmp_path, folder, texts):
    sources, flags, _ = corpus
    for share in ("0", "1", "nan", "-0.1"):
        with pytest.raises(UserError, match=f"--val-share: got {share}, wanted a share between"):
            prepared(tmp_path / "x", "--source", *sources, *flags, f"--val-share={share}")
    with pytest.raises(UserError, match="got a token set as --source, wanted text"):
        prepared(tmp_path / "x", "--source", folder / "set", "--val-share", 0.1)
    prepared(tmp_path / "both", "--source", *sources, *flags)
    with pytest.raises(UserError, match="both/val holds documents that were held out of another"):
        prepared(tmp_path / "both", "--source", *sources, *flags[:2], "--overwrite")
    ignored = ["--mask-prompt"], ["--skip-bad"], ["--data-dir", "d"], ["--max-document-bytes", 9]
    for flag in ignored:
        with pytest.raises(UserError, match=f"{flag[0]}: does not go with --source demo"):
            prepared(tmp_path / "demo", "--source", "demo", *flag)
    with pytest.raises(UserError, match="does not go with --source demo"):
        prepare.main(["--val-share", "0.1", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--mix: a source's part of 1 tokens is less than a token"):
        prepared(tmp_path / "mixed", "--source", *sources, *flags, "--mix", 1, 1, "--max-tokens", 9)
    assert not (tmp_path / "mixed").exists()
    kept = next(text for text in texts if number(text) >= 0.1)
    one = write(tmp_path / "one.jsonl", [kept])
    with pytest.raises(UserError, match="no document is held out at --val-share 0.1"):
        prepared(tmp_path / "few", "--source", one, *flags)
    prepared(tmp_path / "out", "--source", *sources, *flags)
    with pytest.raises(UserError, match="side was .*0.1.*, is now .*0.2"):
        prepared(tmp_path / "out", "--source", *sources, *flags, "--val-share", 0.2)
    with pytest.raises(UserError, match="side was .*0.1.*, is now null"):
        prepared(tmp_path / "out", "--source", *sources, *flags[:2])
