"""tools.compare, and a run repeated with one change (`--from`)."""

import json
import re
import shutil

import pytest

import train_ref
import train_slm
from common.errors import UserError
from conftest import write_model, write_set
from tools import compare

SIZE = "--seq-len 16 --batch-size 4 --device cpu --threads 1 --warmup 1"


@pytest.fixture
def runs(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 600)
    write_model(tmp_path / "m", vocabulary)
    assert stage(train_slm, f"--k 1 --data d --init m --out a {SIZE} --steps 3 --lr 2e-3")[0] == 0
    return tmp_path


def record(folder):
    return json.loads((folder / "args.json").read_text())


def test_repeated_with_one_change(runs, stage, capsys):
    assert stage(train_slm, "--from a/args.json --out b --score loss --k 0.5")[0] == 0
    differing = {
        key for key in record(runs / "a") if record(runs / "a")[key] != record(runs / "b")[key]
    }
    assert differing == {"k", "score", "source"}
    code, out, _ = stage(compare, "a b")
    assert code == 0 and "| k " in out and "| score " in out and "| lr " not in out
    assert "| code of the score " in out and "| source " not in out
    summaries = [json.loads((runs / name / "summary.json").read_text()) for name in "ab"]
    for summary in summaries:
        assert f"{summary['tokens_selected']:,}" in out


def test_what_changes_no_number_is_repeated_too(runs, stage):
    flags = "--from a/args.json --checkpointing --head full --eval-every 2"
    assert stage(train_slm, f"{flags} --out b")[0] == 0
    again = train_slm.arguments(["--from", "b/args.json", "--out", "c"])
    assert (again.checkpointing, again.head, again.eval_every) == (True, "full", 2)
    again = train_slm.arguments(["--from", "b/args.json", "--out", "c", "--no-checkpointing"])
    assert not again.checkpointing
    code, out, _ = stage(compare, "a b")
    assert code == 0 and "| checkpointing " in out and "| head " in out


def test_what_follows_from_other_flags_follows_again(runs, stage):
    assert stage(train_slm, "--from a/args.json --out b --lr 4e-3")[0] == 0
    assert record(runs / "b")["min_lr"] == pytest.approx(4e-4)
    assert stage(train_slm, f"--k 1 --data d --init m --out c {SIZE} --epochs 0.2")[0] == 0
    steps = record(runs / "c")["steps"]
    assert stage(train_slm, "--from c/args.json --out e --batch-size 2")[0] == 0
    assert record(runs / "e")["steps"] == pytest.approx(2 * steps, abs=1)
    assert stage(train_slm, "--from c/args.json --out f --steps 1")[0] == 0
    assert record(runs / "f")["steps"] == 1 and record(runs / "f")["epochs"] is None


def test_what_follows_is_seen_in_either_way_of_writing_a_flag(runs, stage):
    assert stage(train_slm, "--from a/args.json --out b --lr=4e-3 --batch-size=2")[0] == 0
    made = record(runs / "b")
    assert made["min_lr"] == pytest.approx(4e-4) and made["micro_batch_size"] == 2
    assert stage(train_slm, "--from a/args.json --out c --epochs=0.1")[0] == 0
    assert record(runs / "c")["epochs"] == 0.1


def test_what_belongs_to_a_score_goes_with_it(runs):
    """Its numbers, its own scope, its k; and the last of two numbers counts."""

    def again(flags, **changes):
        (runs / "e.json").write_text(json.dumps(record(runs / "a") | changes))
        args = train_slm.arguments(["--from", "e.json", *flags.split()])
        return args.score, args.k, args.scope, args.set

    earlier = {"score": "mile", "set": ["gamma=2"], "k": 1.0}
    assert again("", **earlier) == ("mile", 1.0, "micro", ["gamma=2"])
    assert again("--set gamma=3", **earlier) == ("mile", 1.0, "micro", ["gamma=3"])
    assert again("--set gamma=1", **earlier) == ("mile", 1.0, "micro", None)  # the default
    assert again("--set gamma=10 --set gamma=9", **earlier)[3] == ["gamma=9"]
    assert again("--score mile", **earlier) == ("mile", 1.0, "micro", ["gamma=2"])
    assert again("--score=mile", **earlier) == ("mile", 1.0, "micro", ["gamma=2"])
    assert again("--score dft", **earlier) == ("dft", 1.0, "micro", None)
    again("--score loss", **{**earlier, "stored": ["q=q.bin"]})  # which it does not read
    earlier = {"score": "excess", "k": 0.6, "scope": "micro"}
    assert again("--score clean", **earlier) == ("clean", 0.6, "set", None)
    assert again("--score mile", **earlier) == ("mile", 1.0, "micro", None)
    assert again("--score loss", **earlier | {"k": 0.5, "scope": "batch"}) == (
        "loss",
        0.5,
        "batch",
        None,
    )


def test_what_cannot_go_with_another_flag_is_left_out(runs):
    earlier = {"k": 0.7, "rank_windows": 2, "revision": "main", "score": "excess"}
    earlier["execution"] = {"parallel": "fsdp", "shard_size": 2, "reshard_after_forward": "never"}
    (runs / "e.json").write_text(json.dumps(record(runs / "a") | earlier))

    def again(flags):
        return train_slm.arguments(["--from", "e.json", *flags.split()])

    args = again("")
    assert (args.k, args.rank_windows, args.revision, args.shard_size) == (0.7, 2, "main", 2)
    assert again("--score dft").k == 1.0  # a weight has none
    assert again("--score loss").k == 0.7
    assert again("--scope sequence").rank_windows is None
    assert again("--init elsewhere").revision is None
    args = again("--parallel ddp")
    assert (args.shard_size, args.reshard_after_forward) == (None, "default")


def test_the_same_run_differs_in_nothing(runs, stage):
    code, out, _ = stage(compare, "a a")
    assert code == 0 and "all arguments are equal" in out


def test_what_is_no_run(runs, stage):
    (runs / "other.json").write_text('{"learning_rate": 1}')
    for arguments, message in (
        ("--from other.json --out b", "is not the args.json of a run"),
        ("--from nothing.json --out b", "nothing.json does not exist"),
    ):
        code, _, err = stage(train_ref, arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(UserError, match="d: is not a run"):
        compare.main([str(runs / "d")])


def test_precision_and_ranks_are_compared_too(runs, stage):
    """`--dtype auto` is another precision on another device: the same flags, other numbers."""
    for name in ("b", "c"):
        shutil.copytree(runs / "a", runs / name)
    saved = record(runs / "a")
    other = {**saved, "numerics": {**saved["numerics"], "dtype": "bfloat16", "micro_batch": 1}}
    other["made"] = {**saved["made"], "ranks": 8}
    (runs / "b/args.json").write_text(json.dumps(other))
    code, out, _ = stage(compare, "a b")
    assert code == 0 and re.search(r"computed with dtype \| +float32 \| +bfloat16", out)
    assert re.search(r"ranks +\| +1 \| +8", out) and "micro_batch " not in out
    assert "all arguments are equal" in stage(compare, "a c")[1]
