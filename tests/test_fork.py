"""docs/contributing.md, "Fork it": each example is done as it is written there."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import score
import slm
import train_slm
from conftest import ROOT, write_model, write_set

PAGE = (ROOT / "docs/contributing.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- a fork: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.M | re.S))
(SCRIPT,) = re.findall(r"<!-- a script -->\n```python\n(.*?)^```$", PAGE, re.M | re.S)
FLAGS = (
    "--data d --init m --ref-loss ref_loss.bin --seq-len 16 --batch-size 4 --steps 4 --device cpu "
    "--threads 1 --seed 0"
)


@pytest.fixture
def scored(stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 600)
    write_model(tmp_path / "m", vocabulary)
    write_model(tmp_path / "r", vocabulary, seed=5)
    flags = "--model r --data d --out ref_loss.bin --seq-len 16 --device cpu --threads 1"
    code, _, err = stage(score, f"{flags} --entropy")
    assert code == 0, err
    return tmp_path


@pytest.fixture
def restored():
    """What an example adds to slm.py's tables is gone afterwards."""
    tables = (slm.SCORES, slm.PREDICTION)
    before = [dict(table) for table in tables]
    yield
    for table, items in zip(tables, before):
        table.clear()
        table.update(items)


def selected(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens_selected"] for line in lines]


def test_there_are_four_examples():
    assert set(EXAMPLES) == {"sure", "close", "softly", "surprise"}
    assert len([line for line in SCRIPT.splitlines() if line]) <= 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_trains(stage, scored, restored, name):
    exec(EXAMPLES[name], dict(vars(slm)))
    code, _, err = stage(train_slm, f"{FLAGS} --score {name} --out a")
    assert code == 0, err
    every = [64, 128, 192, 256]
    assert selected(scored / "a") == (every if name == "softly" else [38, 76, 114, 152])


@pytest.mark.slow
def test_each_example_in_a_copy_changes_one_file(scored):
    copy = scored / "kit"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "tests", "data", "out"))
    for name, code in EXAMPLES.items():
        text = (ROOT / "slm.py").read_text()
        (copy / "slm.py").write_text(f"{text}\n\n{code}")
        command = [copy / "train_slm.py", *FLAGS.split(), "--score", name, "--out", name]
        done = subprocess.run(
            [sys.executable, *command], cwd=scored, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(selected(scored / name)) == 4
    changed = ROOT / "slm.py"  # the last example is edited: its run does not go on
    edited = EXAMPLES[name].replace("t.loss - t.memory", "t.loss - 2 * t.memory")
    (copy / "slm.py").write_text(f"{changed.read_text()}\n\n{edited}")
    done = subprocess.run([sys.executable, *command], cwd=scored, capture_output=True, text=True)
    assert done.returncode == 2 and "(the code of its score)" in done.stderr


@pytest.mark.slow
def test_a_script_in_a_folder_of_ones_own(scored):
    (scored / "mine.py").write_text(SCRIPT)
    command = [sys.executable, "mine.py", *FLAGS.split(), "--score", "middle", "--out", "a"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "package")}
    done = subprocess.run(command, cwd=scored, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert selected(scored / "a") == [38, 76, 114, 152]
