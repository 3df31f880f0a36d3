"""`--track`: what a tracker's own reader finds in its files, and that no tracker stops a run.

wandb, tensorboard and trackio are not among the kit's requirements; where one is not installed its
test is skipped. `pip install wandb tensorboard trackio` runs them all.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ref
import train_slm
from conftest import ROOT, finish, launch, write_model, write_set
from killed import killed
from training import track
from training.meter import HIGHEST, LOWEST, Meter

RUN = (
    "--data d --val v --init m --score loss --k 0.5 --seq-len 16 --batch-size 4 --device cpu "
    "--threads 1 --steps 12 --save-every 4 --eval-every 4"
)


@pytest.fixture
def inputs(vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 3000, kind=np.arange(3000) % 2)
    write_set(tmp_path / "v", vocabulary, 300, seed=1)
    write_model(tmp_path / "m", vocabulary)
    return tmp_path


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# The trackers themselves. Each reader returns (names of the runs, {metric: {step: value}}), where
# of a step that was told twice the last value counts; a histogram is (counts, edges).


def read_wandb(folder):
    from wandb.proto import wandb_internal_pb2

    names, metrics = [], {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in blocks(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                names.append(record.run.run_id)
            items = {".".join(item.nested_key or [item.key]): item for item in record.history.item}
            values = {name: json.loads(item.value_json) for name, item in items.items()}
            if "scores/loss.bins" in values:
                values["scores/loss"] = values["scores/loss.values"], values["scores/loss.bins"]
            for name, value in values.items():
                metrics.setdefault(name, {})[values["_step"]] = value
    return names, metrics


def blocks(raw):
    """The records of a .wandb file: LevelDB's log behind seven bytes, in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, at)
        record += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = (folder / "mine").iterdir()
    events = EventAccumulator(str(place), {"scalars": 0, "histograms": 0})
    events.Reload()
    metrics = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps)  # steps made again are not shown twice
        metrics[name] = {event.step: event.value for event in events.Scalars(name)}
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            value = event.histogram_value
            edges = [value.min, *value.bucket_limit]
            metrics.setdefault(name, {})[event.step] = value.bucket, edges
    return [place.name], metrics


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    metrics = {}
    names = SQLiteStorage.get_runs("mine")
    for row in SQLiteStorage.get_logs("mine", names[0]):
        for name, value in row.items():
            if isinstance(value, dict):
                value = value["values"], value["bins"]
            metrics.setdefault(name, {})[row["step"]] = value
    return names, metrics


READERS = {"wandb": read_wandb, "tensorboard": read_tensorboard, "trackio": read_trackio}


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_was_killed_goes_on_as_the_same_run(name, inputs, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(inputs / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = f"train_slm.py {RUN} --out a --track {name}:mine"
    # The state is of step 4: steps 5 and 6 are made, and told, twice. The others lose what they
    # have not written yet where they are killed, so they are asked to end.
    sent = "SIGKILL" if name == "tensorboard" else "SIGTERM"
    killed("call:training.run:Run.record_step:7", command, inputs, sent=sent)
    (chosen,) = json.loads((inputs / "a/track.json").read_text()).values()
    said = finish(launch(command, inputs))
    assert "the run goes on without it" not in said

    if name == "trackio":
        names, metrics = in_a_process_of_its_own(name, inputs)
    else:
        names, metrics = READERS[name](inputs)
    assert set(names) == {chosen}
    log = records(inputs / "a")
    assert [record["step"] for record in log] == list(range(13))
    for key in ("loss", "threshold", "lr", "tokens_seen", "val_loss"):
        wanted = {record["step"]: record[key] for record in log if key in record}
        assert metrics[key] == pytest.approx(wanted, rel=1e-6), key
    for kind in ("even", "odd"):
        wanted = {record["step"]: record["kept"][kind] for record in log[1:]}
        assert metrics[f"kept/{kind}"] == pytest.approx(wanted, rel=1e-6)
    assert all(value > 1e6 for value in metrics["peak_memory_bytes"].values())
    ((step, (counts, edges)),) = metrics["scores/loss"].items()
    assert step == 10 and sum(counts) == 4 * 16
    assert len(edges) == len(counts) + 1
    middle = sum(n * (a + b) / 2 for n, a, b in zip(counts, edges, edges[1:])) / sum(counts)
    assert abs(middle - log[10]["loss"]) < 0.125  # half a bin


def in_a_process_of_its_own(name, folder):
    """trackio reads where its files are when it is imported."""
    code = f"import test_track; print('read:', test_track.READERS[{name!r}](None))"
    paths = ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/training")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.partition("read:")[2])


# --------------------------------------------------------------------------------------------------
# What needs none of them


class Remembers:
    """A tracker that keeps what it is told."""

    def __init__(self, project, folder, name, arguments, first):
        self.made = (project, folder.name, arguments.get("score"), first)
        self.told = []
        self.summary = None
        Remembers.last = self

    def log(self, step, values, histograms):
        self.told.append((step, values, histograms))

    def finish(self, summary):
        self.summary = summary


def installed(name):
    return True


def test_what_a_tracker_is_told(stage, inputs, monkeypatch):
    monkeypatch.setattr(track, "find_spec", installed)
    monkeypatch.setitem(track.TRACKERS, "wandb", Remembers)
    assert stage(train_slm, f"{RUN} --out plain")[0] == 0
    assert stage(train_slm, f"{RUN} --out a --track wandb:mine")[0] == 0
    assert not (inputs / "plain/track.json").exists()
    log = records(inputs / "a")
    rates = ("tok_per_s", "seconds")
    for mine, plain in zip(log, records(inputs / "plain"), strict=True):
        assert mine.keys() == plain.keys()  # what is for the tracker stays out of the log
        assert all(
            mine[key] == plain[key]
            for key in mine
            if key in track.numbers(mine) and key not in rates
        )
    tracker = Remembers.last
    assert tracker.made == ("mine", "a", "loss", 0)
    assert [step for step, _, _ in tracker.told] == list(range(13))
    assert [bool(histograms) for _, _, histograms in tracker.told].index(True) == 10
    assert tracker.told[4][1]["kept/even"] == log[4]["kept"]["even"]
    assert tracker.summary["val_loss"] == log[-1]["val_loss"]
    # finished: nothing is told again
    assert stage(train_slm, f"{RUN} --out a --track wandb:mine")[0] == 0
    assert Remembers.last is tracker


class FailsToBegin(Remembers):
    def __init__(self, *args):
        raise RuntimeError("no network\nat all")


class FailsOnTheWay(Remembers):
    def log(self, step, values, histograms):
        if step == 3:
            sys.exit("logged out")


class FailsAtTheEnd(Remembers):
    def finish(self, summary):
        raise OSError("no room")


@pytest.mark.parametrize(
    "kind, reason",
    [
        (FailsToBegin, "no network"),
        (FailsOnTheWay, "logged out"),
        (FailsAtTheEnd, "no room"),
    ],
)
def test_a_tracker_that_fails_does_not_stop_a_run(kind, reason, stage, inputs, monkeypatch):
    monkeypatch.setattr(track, "find_spec", installed)
    monkeypatch.setitem(track.TRACKERS, "trackio", kind)
    run = RUN.replace("--score loss --k 0.5", "")
    code, out, err = stage(train_ref, f"{run} --out a --track trackio")
    assert code == 0 and "tokens read" in out and len(records(inputs / "a")) == 13
    said = f"note: --track trackio: {reason}; the run goes on without it"
    assert err.count(said) == 1 and err.count("without it") == 1


def test_a_name_that_is_no_trackers(stage, inputs):
    code, _, err = stage(train_slm, f"{RUN} --out a --track mlflow:mine")
    assert code == 2
    assert "--track: got mlflow:mine, wanted wandb, tensorboard, trackio, perhaps" in err
    assert not (inputs / "a").exists()


def test_a_package_that_is_missing_is_said_before_anything_begins(stage, inputs, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    code, _, err = stage(train_slm, f"{RUN} --out a --track wandb:mine")
    assert code == 2 and "--track wandb:mine: wandb is not installed; pip install wandb\n" in err
    assert not (inputs / "a").exists()
    assert train_slm.arguments(["--track", "wandb"]).track == "wandb"  # as tools.plan reads it


@pytest.mark.slow
def test_without_the_flag_none_of_them_is_imported(inputs):
    code = (
        "import sys, train_slm; sys.argv[0] = 'train_slm.py'; train_slm.main(); "
        f"print('imported:', sorted({set(track.TRACKERS)} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *RUN.replace("12", "2").split(), "--out", "a"],
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "imported: []" in done.stdout, done.stdout + done.stderr


def test_scores_in_bins_are_numpys_histogram():
    """Over two micro-batches, with masked targets and scores beyond the outer edges."""
    env = SimpleNamespace(device="cpu", world=1, total=lambda sums: sums)
    meter = Meter(env, ["a", "b"], histogram=True)
    rng = np.random.RandomState(0)
    counted = []
    for _ in range(2):
        scores = rng.normal(0, 6, (3, 50)).astype(np.float32)
        scores[0, 0] = 1e9
        valid = rng.rand(3, 50) < 0.8
        counted.append(scores[valid])
        scores[~valid] = np.nan  # as in a file of losses that are not known
        env.tensor = torch.from_numpy
        kind = rng.randint(0, 2, (3, 50))
        mask = torch.from_numpy(valid)
        meter.add(torch.ones(3, 50), mask, mask, kind, torch.from_numpy(scores))
    record = meter.read()
    counts, edges = record["histogram"]
    inside = np.concatenate(counted).clip(LOWEST, HIGHEST - 1e-3)
    wanted, wanted_edges = np.histogram(inside, bins=len(counts), range=(LOWEST, HIGHEST))
    assert counts == wanted.tolist()
    assert np.allclose(edges, wanted_edges)
    assert record["kept"] == {"a": 1.0, "b": 1.0}
