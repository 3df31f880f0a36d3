"""Training states of several ranks: found, refused, killed while they are written, resumed."""

import errno
import json
import os
import pickle
import shutil
import struct

from common.device import Env

import pytest
import torch
import torch.distributed as dist
from test_train import TINY, distance, log, same, tensors

import train_ref
from common import changes, files, locks, owned
from common.errors import UserError
from conftest import HANGS, finish, launch, write_model, write_set
from data import Loader
from killed import Point, arm_call, killed
from training import checkpoints, states

DDP, FSDP = "--parallel ddp", "--parallel fsdp"
HSDP = f"{FSDP} --shard-size 2"
REF = f"--data d --init m {TINY} --micro-batch-size 1"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 3000)
    write_model(tmp_path / "m", vocabulary)
    return tmp_path


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one rank, and what `States` needs to know of it. Stages here know of none."""
    monkeypatch.setattr("common.errors.in_a_group", lambda: None)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    env = Env.__new__(Env)
    env.rank, env.world, env.main, env.patient = 0, 1, True, None
    yield env
    dist.destroy_process_group()


def save(folder, env, step, found, when_whole=lambda: None):
    """A state's folder, as States writes it."""
    record = {"step": step, "seconds": 0.0, "tokens": [step, step], "val_loss": None}
    record |= {"config": {}, "tokenizer_from": "m", "card": ""}
    group = env.new_patient_group()
    path = folder / f"state-{step:06d}"
    saving = checkpoints.start_saving(
        folder / states.NEW, path, found, record, env, group, when_whole
    )
    checkpoints.finish_saving(saving)
    return path


@pytest.fixture
def two(alone, tmp_path):
    """A folder with the states of step 5 and step 10."""
    for step in (5, 10):
        save(tmp_path, alone, step, {"model.a": torch.arange(1000.0) + step})
    assert states.newest_of(tmp_path) == tmp_path / "state-000010"
    return tmp_path


def test_what_was_saved_is_loaded_in_place(two):
    target = torch.zeros(1000)
    checkpoints.load(two / "state-000010", {"model.a": target})
    assert torch.equal(target, torch.arange(1000.0) + 10)
    assert torch.equal(checkpoints.weights(two / "state-000005")["a"], torch.arange(1000.0) + 5)
    assert states.read(two / "state-000005")["step"] == 5
    assert not (two / states.NEW).exists()


DAMAGE = {
    "a part is missing": ("__0_0.distcp", lambda path: path.unlink()),
    "a part is cut": ("__0_0.distcp", lambda path: os.truncate(path, 100)),
    "a part is empty": ("__0_0.distcp", lambda path: os.truncate(path, 0)),
    "a part is too long": ("__0_0.distcp", lambda path: path.open("ab").write(b"x")),
    "no metadata": (".metadata", lambda path: path.unlink()),
    "metadata is cut": (".metadata", lambda path: os.truncate(path, 100)),
    "no record": ("state.json", lambda path: path.unlink()),
    "the record is cut": ("state.json", lambda path: os.truncate(path, 20)),
    "the record is empty": ("state.json", lambda path: os.truncate(path, 0)),
    "the record is another": ("state.json", lambda path: path.write_text("[]")),
    "the record lacks files": ("state.json", lambda path: path.write_text('{"step": 10}')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_state_is_found_out_and_the_one_before_is_used(two, damage, capsys):
    name, spoil = DAMAGE[damage]
    spoil(two / "state-000010" / name)
    assert states.newest_of(two) == two / "state-000005"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "state-000010" in line and line.endswith("going on from state-000005")
    spoil(two / "state-000005" / name)
    with pytest.raises(UserError, match="no older one is left: start over with --overwrite"):
        states.newest_of(two)


def test_an_older_damaged_state_is_not_worth_a_word(two, capsys):
    (two / "state-000005/state.json").unlink()
    assert states.newest_of(two) == two / "state-000010" and not capsys.readouterr().err


def a_bit_flips(path):
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<3f", *range(20, 23)))  # among the numbers, in both states
    content[at] ^= 1
    path.write_bytes(content)


def a_block_of_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def a_name_is_no_text(path):
    """Of a file in the zip archive: Python's zipfile has no error of its own for that."""
    content = bytearray(path.read_bytes())
    content[content.index(b"/data.pkl") - 1] = 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [a_bit_flips, a_block_of_zeros, a_name_is_no_text])
def test_a_part_of_the_right_size_with_other_bytes_is_found_out(two, spoil, capsys):
    spoil(two / "state-000010/__0_0.distcp")
    assert states.newest_of(two) == two / "state-000005"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "state-000010: is damaged" in line and line.endswith("going on from state-000005")


def test_a_state_in_one_file_whose_name_inside_is_no_text(tmp_path):
    path = tmp_path / states.STATE
    torch.save({"a": torch.zeros(3)}, path)
    a_name_is_no_text(path)
    with pytest.raises(UserError, match="is damaged"):
        states.check(path)


def test_what_cannot_be_loaded_is_one_line(two):
    a_block_of_zeros(two / "state-000010/__0_0.distcp")
    with pytest.raises(UserError, match="is damaged .*; after `rm -r .*` the same command goes on"):
        checkpoints.load(two / "state-000010", {"model.a": torch.zeros(1000)})


class Hostile:
    """What it is unpickled with is called."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def replace_metadata(folder, made):
    """As whoever wants to be believed does it: the record fits."""
    content = made if isinstance(made, bytes) else pickle.dumps(made)
    (folder / ".metadata").write_bytes(content)
    record = json.loads((folder / "state.json").read_text())
    record["files"][".metadata"] = len(content)
    (folder / "state.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile(os.system, "touch was-run"),
        Hostile(eval, "open('was-run', 'w')"),
        Hostile(torch.load, "other.pt"),
        Hostile(getattr, "text", "join"),
        {"state_dict_metadata": {}},
        b"\x80\x04.",
        b"x",
    ],
)
def test_a_hostile_pickle_is_refused_in_one_line_and_not_run(two, hostile, capsys, monkeypatch):
    monkeypatch.chdir(two)
    folder = two / "state-000010"
    replace_metadata(folder, hostile)
    with pytest.raises(UserError, match="is damaged or hostile") as refused:
        states.read(folder)
    assert len(str(refused.value).splitlines()) == 1
    assert states.newest_of(two) == two / "state-000005"
    assert not (two / "was-run").exists()


def test_bytes_that_dcp_would_unpickle_and_files_elsewhere_are_refused(two):
    """DCP runs torch.load(weights_only=False) on what its metadata calls bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder = two / "state-000010"
    good = pickle.loads((folder / ".metadata").read_bytes())
    good.state_dict_metadata["model.a"] = BytesStorageMetadata()
    replace_metadata(folder, good)
    with pytest.raises(UserError, match="BytesStorageMetadata has no place in it"):
        states.read(folder)
    good = pickle.loads((two / "state-000005/.metadata").read_bytes())
    for place in good.storage_data.values():
        place.relative_path = "../secret"
    replace_metadata(folder, good)
    with pytest.raises(UserError, match="names files that are no part of the state"):
        states.read(folder)


def test_a_write_that_fails_is_an_os_error(alone, tmp_path, monkeypatch):
    """DCP's CheckpointException is no Exception: nobody would catch it."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    found = {"model.a": torch.zeros(8)}
    save(tmp_path, alone, 5, found)
    with monkeypatch.context() as patch, pytest.raises(OSError) as failed:
        patch.setattr(files, "part", full)
        save(tmp_path, alone, 10, found)
    assert failed.value.errno == errno.ENOSPC and "__0_0.distcp" in failed.value.filename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="rank 0 could not write"):
        patch.setattr(torch, "save", lambda *_: 1 / 0)
        save(tmp_path, alone, 10, found)
    assert states.newest_of(tmp_path) == tmp_path / "state-000005"


def test_nobody_else_s_file_is_replaced_or_deleted(two, alone):
    """Notes that the user left in a state's folder, and a folder of the user's own."""
    notes = two / "state-000005/notes.txt"
    notes.write_text("mine")
    states.remove(two / "state-000005")
    assert notes.read_text() == "mine" and not (two / "state-000005/state.json").exists()
    own = two / "state-000015/mine"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(UserError, match="this kit did not write it"):
        save(two, alone, 15, {"model.a": torch.zeros(8)})
    assert own.read_text() == "mine"


def stopped(stage, monkeypatch, args, at):
    """SIGTERM in the middle of step `at`, in this process. Returns what it said."""
    point = Point(f"call:data:Loader.micro_batches:{at}", "SIGTERM")
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "micro_batches", arm_call(point, Loader.micro_batches))
        code, _, err = stage(train_ref, args)
    assert code == 130 and "interrupted: what was done is kept" in err
    return err


def test_sigterm_ends_behind_the_step_and_loses_none(stage, inputs, monkeypatch):
    args = f"{REF} --steps 12 --save-every 5"
    stopped(stage, monkeypatch, f"{args} --out a", at=8)
    assert states.read_file(inputs / "a/train_state.pt")["step"] == 8
    assert states.read_file(inputs / "a/train_state.before.pt")["step"] == 5
    assert stage(train_ref, f"{args} --out a")[0] == 0
    assert stage(train_ref, f"{args} --out whole")[0] == 0
    assert same(inputs / "whole", inputs / "a") and log(inputs / "whole") == log(inputs / "a")


def test_states_by_time(stage, inputs, monkeypatch):
    saved = []
    write = states.States.save
    monkeypatch.setattr(
        states.States,
        "save",
        lambda self, *args: saved.append(args[2]["step"]) or write(self, *args),
    )
    assert stage(train_ref, f"{REF} --steps 4 --out never")[0] == 0
    assert saved == [4]
    assert stage(train_ref, f"{REF} --steps 4 --out each --save-minutes 1e-9")[0] == 0
    assert saved == [4, 1, 2, 3, 4]
    assert same(inputs / "never", inputs / "each")


def as_folder(folder, env):
    """Turn a run's train_state.pt into what several ranks would have written."""
    state = states.read_file(folder / "train_state.pt")
    found = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["state"].items():
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    path = save(folder, env, state["step"], found)
    record = json.loads((path / "state.json").read_text())
    kept = {key: state[key] for key in state if key not in ("model", "optimizer")}
    (path / "state.json").write_text(json.dumps(record | kept))
    files.remove(folder / "train_state.pt")
    return path


def test_one_rank_goes_on_bit_identical_from_a_folder(stage, inputs, alone, monkeypatch):
    args = f"{REF} --steps 12 --save-every 5"
    stopped(stage, monkeypatch, f"{args} --out a", at=6)
    as_folder(inputs / "a", alone)
    locks.unlock(inputs / "a")
    assert states.newest_of(inputs / "a").name == "state-000006"  # train_state.before.pt: 5
    shutil.copytree(inputs / "a", inputs / "b")
    os.truncate(inputs / "b/state-000006/__0_0.distcp", 50)
    for out in ("a", "b", "whole"):
        code, _, err = stage(train_ref, f"{args} --out {out}")
        assert code == 0 and ("is damaged" in err) == (out == "b"), err
    for out in ("a", "b"):
        assert same(inputs / "whole", inputs / out) and log(inputs / "whole") == log(inputs / out)
        assert [path.name for path in states.present(inputs / out)] == ["train_state.pt"]


def test_a_finished_run_keeps_one_state_of_several_ranks(tmp_path):
    """A kill came between summary.json and the end."""
    for name in ("state-000004", "state-000006", "state-000010"):
        owned.own_folder(tmp_path / name)
        files.write_atomic(tmp_path / name / "state.json", "{}")
    states.keep_one(tmp_path, 12)  # of which nothing is there: nothing goes
    assert len(states.present(tmp_path)) == 3
    states.keep_one(tmp_path, 10)
    assert [path.name for path in states.present(tmp_path)] == ["state-000010"]


def test_a_good_state_is_kept_until_the_next_is_whole(stage, inputs, monkeypatch):
    """train_state.pt is damaged: the one before it is all there is while the next is written."""
    args = f"{REF} --steps 12 --save-every 5 --out a"
    stopped(stage, monkeypatch, args, at=11)
    os.truncate(inputs / "a/train_state.pt", 100)

    def stop(moment, path):
        if moment == "before rename" and path.name == "train_state.pt":
            assert states.newest_of(inputs / "a").name == "train_state.before.pt"
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(changes, "reached", stop)
        code, _, err = stage(train_ref, args)
    assert code == 130 and "going on from train_state.before.pt" in err
    assert states.newest_of(inputs / "a").name == "train_state.before.pt"


# --------------------------------------------------------------------------------------------------
# several ranks

# A state is saved after every fifth of 60 steps on two ranks. Each kill comes further than the one
# before. (point, rank)
KILLS = (
    ("call:training.checkpoints:start_saving:1", 0),
    ("moment:state.new:2", 0),  # its name is noted, the folder is not made
    ("moment:state.new:4", 0),
    ("moment:__0_0.distcp:1", 0),
    ("moment:__1_0.distcp:1", 1),
    ("moment:__0_0.distcp:2", 0),  # one part is whole, the other one perhaps
    ("moment:__1_0.distcp:2", 1),
    ("moment:.metadata.tmp:1", 0),
    ("moment:.metadata.tmp:2", 0),
    ("moment:.metadata:1", 0),
    ("moment:.metadata:2", 0),
    ("moment:state.json:1", 0),
    ("inside:state.json:1", 0),
    ("after:state.json:1", 0),
    ("before:state-0000*:1", 0),
    ("after:state-0000*:1", 0),  # it is whole
    ("moment:state.json:5", 0),  # while an older one is removed
    ("call:training.states:States._is_whole:2", 0),
    ("call:data:Loader.micro_batches:8", 1),
    ("moment:state.json:9", 0),
    ("before:model.safetensors:1", 0),
    ("inside:summary.json:1", 0),
)


@pytest.mark.parametrize(
    "parallel, points",
    [
        pytest.param(FSDP, KILLS, id="every point"),  # 23 launches of two ranks: minutes
        pytest.param(FSDP, KILLS[2::4], id="fsdp"),
        pytest.param(DDP, KILLS[4::4], id="ddp"),
    ],
)
@pytest.mark.slow
def test_killed_while_ranks_save_it_ends_bit_identical(inputs, parallel, points):
    args = f"train_ref.py {REF} --steps 60 --save-every 5 {parallel}"
    finish(launch(f"{args} --out whole", inputs, ranks=2))
    for point, rank in points:
        killed(point, f"{args} --out cut", inputs, ranks=2, rank=rank)
        assert not (inputs / "cut/summary.json").exists()
    out = finish(launch(f"{args} --out cut", inputs, ranks=2))
    assert "damaged" not in out
    assert same(inputs / "whole", inputs / "cut") and log(inputs / "whole") == log(inputs / "cut")
    assert [path.name for path in states.present(inputs / "cut")] == ["state-000060"]
    assert not (inputs / "cut" / states.NEW).exists()


@pytest.mark.slow
def test_sigterm_on_one_rank_and_on_to_other_numbers_of_ranks(stage, inputs):
    """1 -> 2 -> 4 -> 1 ranks: each is stopped in its seventh step, and keeps it."""
    args = f"{REF} --steps 30 --save-every 5"
    assert stage(train_ref, f"{args} --out whole")[0] == 0
    point = "call:data:Loader.micro_batches:7"
    for done, ranks, how in ((7, 0, ""), (14, 2, FSDP), (21, 4, HSDP)):
        rank = ranks - 1 if ranks else None
        command = f"train_ref.py {args} {how} --out moved"
        out = killed(point, command, inputs, sent="SIGTERM", ranks=ranks, rank=rank)
        assert "interrupted: what was done is kept" in out
        assert states.read(states.newest_of(inputs / "moved"))["step"] == done
        assert len(log(inputs / "moved")) == done
    assert stage(train_ref, f"{args} --out moved")[0] == 0
    assert distance(inputs / "whole", inputs / "moved") < 1e-5
    assert [r["tokens_seen"] for r in log(inputs / "whole")] == [
        r["tokens_seen"] for r in log(inputs / "moved")
    ]


@pytest.mark.slow
def test_more_ranks_than_rows_and_bfloat16_moments(stage, inputs, vocabulary):
    """Of a vector of 6 numbers on four ranks the last one has none."""
    changes = {"hidden_size": 6, "num_attention_heads": 1, "num_key_value_heads": 1}
    write_model(inputs / "m", vocabulary, **changes)
    args = f"{REF} --steps 9 --save-every 3 --moments bfloat16"
    finish(launch(f"train_ref.py {args} {FSDP} --out whole", inputs, ranks=4))
    point = "call:data:Loader.micro_batches:5"
    killed(point, f"train_ref.py {args} {FSDP} --out cut", inputs, ranks=4)
    finish(launch(f"train_ref.py {args} {FSDP} --out cut", inputs, ranks=4))
    assert same(inputs / "whole", inputs / "cut") and log(inputs / "whole") == log(inputs / "cut")


@pytest.mark.slow
def test_a_full_disk_on_another_rank_is_one_line(inputs):
    """A limit on file size stands in for a full disk; the part of the second rank does not fit."""
    args = f"train_ref.py {REF} --steps 400 --save-every 5 {DDP} --out a"
    process = launch(f"tests/limited.py 1 60000 {args}", inputs, ranks=2)
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    ours = [line for line in out.splitlines() if "error: " in line and "goes on" in line]
    assert ours and not (inputs / "a/state-000005").exists()
    assert states.newest_of(inputs / "a") is None and len(log(inputs / "a")) < 400


def test_the_export_of_any_state(stage, inputs, alone, monkeypatch):
    from tools import export

    args = f"{REF} --steps 12 --save-every 5 --out a"
    stopped(stage, monkeypatch, args, at=6)
    assert stage(export, "a --out six")[0] == 0
    as_folder(inputs / "a", alone)
    assert stage(export, "a --out folder")[0] == 0
    assert stage(export, "a --out five --step 5")[0] == 0
    assert same(inputs / "six", inputs / "folder") and not same(inputs / "six", inputs / "five")
    wanted = states.read_file(inputs / "a/train_state.before.pt")["model"]
    assert all(torch.equal(t, wanted["lm." + name]) for name, t in tensors(inputs / "five").items())
    text = (inputs / "six/README.md").read_text()
    assert "| steps | 6 of 12 |" in text
    # An older export in shards must not stay beside a new one in one file.
    shard = inputs / "folder/model-00001-of-00002.safetensors"
    files.write_atomic(shard, "")
    assert stage(export, "a --out folder --overwrite")[0] == 0
    assert not shard.exists() and same(inputs / "folder", inputs / "six")
    for wrong, message in (
        ("a --out six", "six: holds a model; name another --out, or --overwrite it"),
        ("a --out b --step 7", "--step: got 7, wanted one that a has a state of: 5, 6"),
        ("a --out a/b", "overlaps with the run a"),
        ("m --out b", "m: has no training state"),
        ("a", "--out: got none"),
    ):
        code, _, err = stage(export, wrong)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert stage(export, "a --out six --step 5 --overwrite")[0] == 0
    assert same(inputs / "six", inputs / "five")


def test_a_damaged_state_is_not_exported_and_does_not_hide_another(stage, inputs, monkeypatch):
    from tools import export

    stopped(stage, monkeypatch, f"{REF} --steps 12 --save-every 5 --out a", at=6)
    newest = inputs / "a/train_state.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert stage(export, "a --out five --step 5")[0] == 0
    code, _, err = stage(export, "a --out six --step 6")
    assert code == 2 and "has a state of: 5; " in err and "train_state.pt: is damaged" in err
    before = inputs / "a/train_state.before.pt"
    content = bytearray(before.read_bytes())
    content[len(content) // 2] ^= 1
    before.write_bytes(content)
    code, _, err = stage(export, "a --out again --step 5")
    assert code == 2 and "train_state.before.pt: is damaged" in err
    assert not (inputs / "again/model.safetensors").exists()


def test_what_is_staged_is_a_copy_on_the_cpu_and_nothing_is_copied_ahead(tmp_path):
    """DCP's loader that copies ahead would open a stream of the first GPU on every rank."""
    writer = checkpoints.Writer(tmp_path / "a", tmp_path / "b", {}, 1, print)
    live = {"w": torch.ones(3), "step": torch.tensor(1.0)}
    staged = writer.stage(live)
    live["w"].zero_()
    assert staged["w"].tolist() == [1, 1, 1] and staged["step"] == 1
    assert all(tensor.device.type == "cpu" for tensor in staged.values())
    assert writer.per_thread_copy_ahead == 0
