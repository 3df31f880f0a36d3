"""The demo's chaining: which stages are run, and how a target is found on a curve."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest

import demo.chain as chain
import prepare
import score
import train_ref
import train_slm
from common.command_line import SEED
from conftest import ROOT, write_model, write_set
from training import finished


def students(**changes):
    """Arguments of train_slm.py that name no input and no output, as for the demo."""
    nothing = dict.fromkeys(("data", "val", "init", "out", "ref_loss", "steps", "epochs", "lr"))
    defaults = {"k": 0.6, "score": "excess", "scope": "micro", "backward": "exact", "seed": SEED}
    defaults |= dict.fromkeys(("rank_windows", "set", "k_schedule", "base_loss", "short_loss"))
    return argparse.Namespace(**{**nothing, **defaults, **changes})


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """In an empty folder: the commands that the chain would have run."""
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(chain, "run", commands.append)
    return commands


def scripts(commands):
    return [command.split()[0] for command in commands]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "slm"),
        ({"k": 1.0}, "clm"),
        ({"score": "random"}, "random"),
        ({"k": 0.7}, "slm-k0.7"),
        ({"backward": "pruned"}, "slm-pruned"),
        ({"rank_windows": 4}, "slm-rank4"),
        ({"score": "ref_loss", "scope": "batch"}, "ref_loss-batch"),
        ({"score": "dft", "k": 1.0}, "dft"),
        ({"score": "mile", "k": 1.0, "set": ["gamma=2"]}, "mile-gamma2"),
        ({"score": "clean", "scope": "set"}, "clean"),
        ({"k_schedule": "1.0:0.6@0.3"}, "slm-k1.0-0.6at0.3"),
    ],
)
def test_each_setting_has_its_folder(changes, name):
    assert chain.run_name(students(**changes)) == name


def test_tokens_to_reach_interpolates_between_evaluations(tmp_path):
    lines = [
        {"tokens_seen": 100, "val_loss": 3.0},
        {"tokens_seen": 150},
        {"tokens_seen": 200, "val_loss": 2.0},
        {"tokens_seen": 300, "val_loss": 2.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chain.tokens_to_reach(tmp_path, 2.5) == 150
    assert chain.tokens_to_reach(tmp_path, 2.25) is None  # it was there, and did not stay
    assert chain.tokens_to_reach(tmp_path, 3.5) == 100
    assert chain.tokens_to_reach(tmp_path, 1.9) is None


@pytest.mark.parametrize(
    "losses, reached",
    [
        ([4.0, 2.0], 50),  # halfway
        ([2.5, 2.0], 100),  # the start is there already: it was reached by no training
        ([2.5, 3.5, 2.5], 150),
        ([4.0, 2.0, 4.0, 2.0, 1.0], 250),  # the last time that it gets there
        ([2.5, 3.5], None),
    ],
)
def test_the_start_does_not_count_as_reached(tmp_path, losses, reached):
    lines = [{"tokens_seen": 100 * i, "val_loss": loss} for i, loss in enumerate(losses)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chain.tokens_to_reach(tmp_path, 3.0) == reached


def test_losses_without_the_reference_s_validation_loss_are_made_whole(
    ran, stage, vocabulary, tmp_path
):
    """Those of an older kit: score.py is called again, and only adds it."""
    write_set(tmp_path / "d", vocabulary, 600)
    write_set(tmp_path / "v", vocabulary, 100, seed=1)
    write_model(tmp_path / "m", vocabulary)
    flags = "--model m --data d --seq-len 16 --out x/ref_loss.bin"
    assert stage(score, f"{flags} --device cpu")[0] == 0
    path = tmp_path / "x/ref_loss.json"
    assert not chain.finished(path, f"score.py {flags} --val v")
    assert stage(score, f"{flags} --val v --device cpu")[0] == 0
    assert chain.finished(path, f"score.py {flags} --val v")


def test_missing_stages_run_in_order(ran):
    args = students()
    chain.ensure(args, "slm")
    stages = ["prepare.py", "train_ref.py", "train_ref.py", "score.py", "train_slm.py"]
    assert scripts(ran) == stages
    assert args.data == "data/demo/corpus"
    assert args.init == "out/demo/base"
    assert args.ref_loss == "out/demo/ref_loss.bin"
    assert args.out == "out/demo/slm"


def test_a_student_has_the_steps_and_the_rate_of_the_baseline(ran):
    args = students()
    chain.ensure(args, "slm")
    flags = chain.flags_of(ran[-1])
    assert (str(args.steps), args.lr) == (flags["--steps"], float(flags["--lr"]))
    args = students(steps=3, lr=5e-4)
    chain.ensure(args, "slm")
    assert (args.steps, args.lr) == (3, 5e-4)


def test_flags_of_a_command_line_with_some_that_have_no_value():
    line = "x.py --a 1 --switch --b -2 c --last"
    assert chain.flags_of(line) == {"--a": "1", "--b": "-2"}


def test_the_scripts_have_the_recipe_of_the_chain():
    """runs/seeds.sh says it again, for experiments that give each stage its own flags."""
    shell = (ROOT / "runs/seeds.sh").read_text()
    for name in ("BASE", "REFERENCE", "STUDENT"):
        wanted = getattr(chain, name).replace(" --eval-every 0", "")
        assert f'{name}="{wanted}"\n' in shell


def test_sets_of_another_text_are_not_taken(stage, tmp_path, monkeypatch):
    """prepare.py is called, and says which set is another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(chain.sets.corpus.PAGES, "base", 2100)
    monkeypatch.setitem(chain.sets.corpus.PAGES, "corpus", 1000)
    command = "prepare.py --source demo --out data/demo --workers 1"
    assert stage(prepare, command.removeprefix("prepare.py "))[0] == 0
    path = tmp_path / "data/demo/val/meta.json"
    assert chain.finished(path, command)
    monkeypatch.setattr(chain.sets.corpus, "P_WRONG", 0.6)
    assert not chain.finished(path, command)
    code, _, err = stage(prepare, command.removeprefix("prepare.py "))
    assert code == 2 and "data/demo/base" in err and "--overwrite" in err


def test_finished_stages_are_used_again(ran, monkeypatch):
    monkeypatch.setattr(chain, "finished", lambda path, command: True)
    chain.ensure(students(seed=3), "slm")
    assert ran == []


def test_the_plain_baseline_needs_no_reference(ran):
    chain.ensure(students(k=1.0), "slm")
    assert scripts(ran) == ["prepare.py", "train_ref.py"]


def test_what_other_scores_need_is_made(ran):
    for score_, last in (("ref_and", "--entropy"), ("longce", "--context 32")):
        ran.clear()
        chain.ensure(students(score=score_, k=1.0 if score_ == "longce" else 0.6), "slm")
        assert scripts(ran)[-1] == "score.py" and ran[-1].endswith(last)


def test_losses_on_other_validation_sets_are_not_compared(tmp_path, monkeypatch, capsys):
    """And a folder whose name has a space is evaluated."""
    monkeypatch.chdir(tmp_path)
    made = {"out/demo/clm": "a", "out/demo/ref": "b", "my run": "b"}
    for folder, val in made.items():
        (tmp_path / folder).mkdir(parents=True)
        known = {"inputs": {"validation": val}, "init": "m", "data": "d", "steps": 1, "lr": 1.0}
        known |= {"seq_len": 1, "batch_size": 1, "micro_batch_size": 1, "seed": SEED}
        (tmp_path / folder / "args.json").write_text(json.dumps(known))
    monkeypatch.setattr(chain, "is_finished", lambda folder: str(folder) in made)
    ends = {"val_loss": 1.0, "exact_match": 0.5, "tokens_seen": 1, "tokens_selected": 1}
    called = []

    def of_run(folder):
        is_missing = str(folder) == "my run" and not called
        return {**ends, "exact_match": None} if is_missing else ends

    def pretend(words, env):
        called.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(chain, "summary", of_run)
    monkeypatch.setattr(subprocess, "run", pretend)
    args = students(out="my run")
    args.chain = True
    chain.report(args, argparse.Namespace(main=True))
    out = capsys.readouterr().out
    assert [words[2:4] for words in called] == [["--model", "my run"]]
    assert "on another --val: CLM, every token." in out and "times fewer" not in out
    assert "\nmy run" in out and "\nreference" in out


def test_a_plain_run_of_one_s_own_is_reported_without_the_baseline(
    stage, vocabulary, tmp_path, monkeypatch, capsys
):
    write_set(tmp_path / "d", vocabulary, 600)
    write_model(tmp_path / "m", vocabulary)
    flags = "--k 1.0 --data d --val d --init m --out mine --steps 2 --seq-len 16 --batch-size 4"
    assert stage(train_slm, f"{flags} --device cpu")[0] == 0
    monkeypatch.setattr(chain, "run", lambda command: None)
    matched = {"exact_match": 0.5}
    monkeypatch.setattr(chain, "summary", lambda folder: finished.summary(folder) | matched)
    args = students(k=1.0, out="mine")
    args.chain = True
    chain.report(args, argparse.Namespace(main=True))
    assert "mine" in capsys.readouterr().out


def test_a_named_token_set_is_left_alone(ran):
    args = students(data="mine")
    chain.ensure(args, "slm")
    assert ran == []
    assert vars(args) == {**vars(students(data="mine")), "chain": False}


def test_a_stage_is_the_kits_file_wherever_it_is_called(monkeypatch, tmp_path, capsys):
    """A fork's own folder may hold a score.py that is something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text("raise SystemExit('not the kit')\n")
    called = []
    monkeypatch.setenv("RANK", "0")  # of torchrun's ranks one does it, in one process
    monkeypatch.setenv("WORLD_SIZE", "2")

    def pretend(command, env):
        assert not {"RANK", "WORLD_SIZE"} & {*env} and env["PATH"] == os.environ["PATH"]
        called.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    chain.run("score.py --model out/demo/ref")
    assert called == [[sys.executable, str(ROOT / "score.py"), "--model", "out/demo/ref"]]
    assert capsys.readouterr().out == "\n$ python score.py --model out/demo/ref\n"


def test_several_ranks_run_no_earlier_stage(stage, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(subprocess, "run", None)
    code, _, err = stage(train_ref, "--steps 2")
    assert code == 2 and err.count("\n") == 1
    assert "name --data, or first python prepare.py --source demo --out data/demo" in err
    assert not list(tmp_path.iterdir())


def test_a_stage_is_stale_when_its_inputs_or_arguments_changed(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 600)
    write_model(tmp_path / "m", vocabulary)
    flags = "--data d --init m --steps 2 --seq-len 16 --batch-size 2"
    assert stage(train_ref, f"{flags} --out out/demo/x --device cpu")[0] == 0
    path = tmp_path / "out/demo/x/summary.json"
    command = f"train_ref.py {flags} --out out/demo/x"
    assert chain.finished(path, command)
    assert not chain.finished(path, command.replace("--steps 2", "--steps 3"))
    more = "--lr 3e-3 --warmup 1"  # which the command leaves at their defaults
    assert stage(train_ref, f"{flags} {more} --out out/demo/z --device cpu")[0] == 0
    z = tmp_path / "out/demo/z/summary.json"
    assert chain.finished(z, f"train_ref.py {flags} {more} --out out/demo/z")
    assert not chain.finished(z, f"train_ref.py {flags} --out out/demo/z")

    write_model(tmp_path / "m", vocabulary, seed=1)  # another base under the same name
    assert not chain.finished(path, command)
    code, _, err = stage(train_ref, f"{flags} --out out/demo/x --device cpu")
    assert code == 2
    assert "other arguments (hash of init " in err

    write_set(tmp_path / "v", vocabulary, 200)
    y = tmp_path / "out/demo/y/summary.json"
    command = f"train_ref.py {flags} --val v --out out/demo/y"
    assert stage(train_ref, f"{command.split(maxsplit=1)[1]} --device cpu")[0] == 0
    assert chain.finished(y, command)
    shutil.rmtree(tmp_path / "v")
    write_set(tmp_path / "v", vocabulary, 200, seed=1)
    assert not chain.finished(y, command)
