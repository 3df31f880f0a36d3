"""Windows, the loader and the stored losses."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from common.checksums import BLOCK, SAMPLED, Checksums, file_hash
from common.errors import UserError
from conftest import ROOT, write_set
from data import (
    STORED_FORMAT,
    Loader,
    Stored,
    TokenSet,
)
from text.writing import TokenSetWriter, token_dtype


@pytest.mark.parametrize(
    "count, seq_len", [(2, 8), (9, 8), (10, 8), (17, 8), (100, 7), (1000, 128)]
)
def test_every_token_but_the_first_is_a_target_once_in_the_right_context(
    vocabulary, tmp_path, count, seq_len
):
    data = write_set(tmp_path, vocabulary, count)
    tokens, targets = np.array(data.tokens, np.int64), []
    for w in range(data.n_windows(seq_len)):
        x, y, valid = (a[0] for a in data.batch([w], seq_len))
        n = valid.sum()
        assert (
            valid[:n].all() and (x[:n] == tokens[w * seq_len :][:n]).all()
        )  # padding stands at the end only
        assert (y[:n] == tokens[w * seq_len + 1 :][:n]).all()
        targets += list(range(w * seq_len + 1, w * seq_len + 1 + n))
    assert targets == list(range(1, count))


def test_loss_mask_decides_what_is_a_target(vocabulary, tmp_path):
    mask = np.random.RandomState(0).randint(0, 2, 50).astype(np.uint8)
    data = write_set(tmp_path, vocabulary, 50, loss_mask=mask)
    valid = data.valid(range(data.n_windows(8)), 8).flatten()
    assert (valid[:49] == mask[1:]).all() and not valid[49:].any()


def test_an_epoch_is_the_set_as_a_multiset_and_epochs_differ():
    loader = Loader(n_windows=37, batch_size=5, seed=3)
    stream = np.concatenate([loader.windows(step) for step in range(37)])  # 5 epochs
    epochs = stream.reshape(5, 37)
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_step_depends_on_seed_and_step_alone():
    a, b = Loader(100, 8, seed=1), Loader(100, 8, seed=1)
    later = [a.windows(step).tolist() for step in range(40)][-1]
    assert b.windows(39).tolist() == later != Loader(100, 8, seed=2).windows(39).tolist()
    four = a.micro_batches(7, 2)
    assert (
        np.concatenate(four).tolist() == a.windows(7).tolist() and [len(m) for m in four] == [2] * 4
    )


def test_vocabulary_size_decides_the_type():
    assert token_dtype(65535) == np.dtype("<u2") and token_dtype(65536) == np.dtype("<u4")


def test_writer_goes_on_after_the_last_mark(tmp_path, vocabulary):
    def pieces(i):
        return {"tokens": np.arange(i * 10, i * 10 + 10), "kind": np.full(10, i)}

    whole = TokenSetWriter(tmp_path / "whole", 300, ("tokens", "kind"), plan={"a": 1})
    for i in range(6):
        whole.append(**pieces(i))
    whole.finish(tokenizer="t")

    cut = TokenSetWriter(tmp_path / "cut", 300, ("tokens", "kind"), plan={"a": 1})
    for i in range(4):
        cut.append(**pieces(i))
        if i == 2:
            cut.mark({"next": 3})
    del cut  # killed: piece 3 is on disk or not
    again = TokenSetWriter(tmp_path / "cut", 300, ("tokens", "kind"), plan={"a": 1})
    assert again.state == {"next": 3} and again.count == 30
    for i in range(3, 6):
        again.append(**pieces(i))
    again.finish(tokenizer="t")
    for name in ("tokens.bin", "kind.bin", "meta.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = TokenSetWriter(tmp_path / "cut2", 300, plan={"a": 1})
    other.append(tokens=np.arange(5))
    other.mark({"next": 1})
    assert (
        TokenSetWriter(tmp_path / "cut2", 300, plan={"a": 2}).state is None
    )  # another plan starts over


def break_size(folder):
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(100)


def break_bytes(folder):
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[10] ^= 1
    (folder / "tokens.bin").write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_size, "has 100 bytes, meta.json says 5000 tokens"),
        (break_bytes, "sha256 differs"),
        (lambda f: (f / "tokens.bin").unlink(), "tokens.bin does not exist"),
        (lambda f: (f / "meta.json").unlink(), "meta.json does not exist"),
        (lambda f: (f / "meta.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "meta.json").write_text('{"format": 9}'), "format is 9, wanted 1"),
    ],
)
def test_a_damaged_set_is_refused(vocabulary, tmp_path, damage, message):
    write_set(tmp_path, vocabulary)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        TokenSet(tmp_path)


def test_verify_finds_what_the_samples_miss(vocabulary, tmp_path):
    write_set(tmp_path, vocabulary, 2_000_000)
    with open(tmp_path / "tokens.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"\1\1")
    TokenSet(tmp_path)
    with pytest.raises(UserError, match="sha256 differs"):
        TokenSet(tmp_path, verify=True)


def store(folder, data, seq_len, values, changes=None):
    values.astype("<f2").tofile(folder / "ref_loss.bin")
    header = {
        "format": STORED_FORMAT,
        "checksums": {"ref_loss.bin": Checksums(folder / "ref_loss.bin", 2 * data.count).all()},
        "data": data.hash,
        "reference": "r",
        "seq_len": seq_len,
        "count": data.count,
        "n_scored": data.n_windows(seq_len),
        **(changes or {}),
    }
    (folder / "ref_loss.json").write_text(json.dumps(header))
    return folder / "ref_loss.bin"


def test_stored_losses_are_indexed_by_the_target(vocabulary, tmp_path):
    data = write_set(tmp_path / "set", vocabulary, 20)
    values = np.arange(20.0) / 4  # nats
    values[0] = np.nan  # never a target
    stored = Stored(store(tmp_path, data, 8, values), data, 8)
    windows = [2, 0]
    out = stored.batch(windows, data.valid(windows, 8))
    assert (4 * out).tolist() == [[17, 18, 19, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_a_missing_value_is_an_error_unless_masked(vocabulary, tmp_path):
    mask = np.ones(20, np.uint8)
    mask[5] = 0
    data = write_set(tmp_path / "set", vocabulary, 20, loss_mask=mask)
    values = np.arange(20.0) / 4  # nats
    values[5] = np.nan
    stored = Stored(store(tmp_path, data, 8, values), data, 8)
    stored.batch([0, 1], data.valid([0, 1], 8))
    values[12] = np.nan
    stored = Stored(store(tmp_path, data, 8, values), data, 8)
    with pytest.raises(UserError, match="1 targets of this batch, the first is token 12"):
        stored.batch([0, 1], data.valid([0, 1], 8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "x"}, "losses of token set x"),
        ({"count": 19}, "a length of 19"),
        ({"seq_len": 9}, "windows of 9"),
        ({"n_scored": 1}, "1 of 3 windows"),
    ],
)
def test_losses_of_something_else_are_refused(vocabulary, tmp_path, changes, message):
    data = write_set(tmp_path / "set", vocabulary, 20)
    path = store(tmp_path, data, 8, np.arange(20.0), changes)
    with pytest.raises(UserError, match=message):
        Stored(path, data, 8)


RANDOM_PLACES = """
import json, sys
sys.path.insert(0, sys.argv[1])
from data import Loader, Stored, TokenSet

def memory():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024

def read():
    return int(open("/proc/self/io").read().split("rchar:")[1].split()[0])

before = read()
data = TokenSet("big")
stored = Stored("ref_loss.bin", data, 2048)
opened = read() - before
loader, resident = Loader(data.n_windows(2048), 8, 0), []
for step in range(101):
    windows, = loader.micro_batches(step, 8)
    x, y, valid = data.batch(windows, 2048)
    stored.batch(windows, valid)
    if step % 20 == 0:
        resident.append(memory())
print(json.dumps([opened, resident]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_billion_tokens_cost_no_memory_and_no_start(tmp_path):
    """A sparse token set and its losses, 2 GB each: opening reads little, no pages are left."""
    n = 10**9
    (tmp_path / "big").mkdir()
    for path in (tmp_path / "big/tokens.bin", tmp_path / "ref_loss.bin"):
        with open(path, "wb") as file:
            file.truncate(2 * n)
    (tmp_path / "big/meta.json").write_text(
        json.dumps(
            {
                "format": 1,
                "count": n,
                "dtype": "<u2",
                "vocab_size": 32000,
                "sha256": "-",
                "tokenizer": "-",
                "sample_sha256": file_hash(tmp_path / "big/tokens.bin", sampled=True),
            }
        )
    )
    whole, rest = divmod(2 * n, BLOCK)
    zeros = [zlib.crc32(bytes(BLOCK))] * whole + [zlib.crc32(bytes(rest))]
    (tmp_path / "ref_loss.json").write_text(
        json.dumps(
            {
                "format": STORED_FORMAT,
                "checksums": {"ref_loss.bin": zeros},
                "data": "-",
                "count": n,
                "seq_len": 2048,
                "n_scored": -(-(n - 1) // 2048),
                "reference": "-",
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", RANDOM_PLACES, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    opened, resident = json.loads(done.stdout)
    assert opened < (SAMPLED + 2) * BLOCK  # the checksums that are looked at, and a little more
    assert max(resident) - resident[0] < 8 << 20  # of more than 100 MB that were mapped


def test_values_that_no_loss_can_have_are_refused(vocabulary, tmp_path):
    data = write_set(tmp_path / "set", vocabulary, 2000)
    for values in (np.full(2000, -50.0), np.full(2000, 40.0), np.full(2000, np.inf)):
        with pytest.raises(UserError, match="wanted none below 0 and a mean up to 7.66 nats"):
            Stored(store(tmp_path, data, 8, values), data, 8)


def test_losses_that_were_changed_after_scoring_are_refused(vocabulary, tmp_path):
    data = write_set(tmp_path / "set", vocabulary, 2000)
    values = np.random.RandomState(0).rand(2000) * 3
    path = store(tmp_path, data, 8, values)
    Stored(path, data, 8)
    for changed in (np.random.RandomState(1).permutation(values), np.zeros(2000)):
        changed.astype("<f2").tofile(path)
        with pytest.raises(UserError, match="checksum differs; score again: python score.py"):
            Stored(path, data, 8)


def test_a_file_that_is_cut_while_it_is_read_is_no_bus_error(vocabulary, tmp_path):
    data = write_set(tmp_path, vocabulary, 20_000)
    data.batch([0], 8)
    os.truncate(tmp_path / "tokens.bin", 4096)
    with pytest.raises(UserError, match="tokens.bin: was cut while it was in use"):
        data.batch([2000], 8)


def test_a_set_without_a_target_is_refused(vocabulary, tmp_path):
    mask = np.zeros(50, np.uint8)
    mask[0] = 1  # nothing predicts the first token
    data = write_set(tmp_path, vocabulary, 50, loss_mask=mask)
    with pytest.raises(UserError, match="lets no token be a target"):
        data.n_windows(8)


@pytest.mark.parametrize(
    "change, message", [({"vocab_size": 9}, "an id"), ({"kinds": ["even"]}, "a label")]
)
def test_ids_and_labels_that_meta_json_does_not_know_are_refused(
    vocabulary, tmp_path, change, message
):
    write_set(tmp_path / "d", vocabulary, 200, kind=np.arange(200) % 2)
    path = tmp_path / "d/meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | change))
    with pytest.raises(
        UserError, match=f"holds {message} of .*, meta.json says that all are below"
    ):
        data = TokenSet(tmp_path / "d")
        data.batch([0], 16)
        data.labels([0], 16)
