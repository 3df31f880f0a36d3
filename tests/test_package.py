"""slm_kit: the kit from a fork's own folder, whose files have the kit's names."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

import score
import slm
import train_slm
from conftest import ROOT, write_model, write_set
from hf import checkpoint

SETTINGS = (
    "--k 0.5 --data set --init start --ref-loss ref_loss.bin "
    "--steps 3 --seq-len 16 --batch-size 2 --device cpu"
)

# A fork's script: a score of its own, and the kit's trainer.
MINE = """
import data
import model
import score
from common import note

from slm_kit import slm, train_slm
from slm_kit.common.errors import cli
from slm_kit.data import TokenSet
from slm_kit.training.optimizer import lr_at


def middle(t):
    excess = t.loss - t.ref_loss
    return -(excess - excess.median()).abs()


slm.SCORES["middle"] = slm.Score(middle, needs=("loss", "ref_loss"))

if __name__ == "__main__":
    assert data.OURS == model.OURS == score.OURS == note.OURS == "of the fork"
    assert TokenSet("set").n_windows(16) > 0
    assert lr_at.__module__ == "slm_kit.training.optimizer"
    cli(train_slm.main)
"""

# Everything loads, under slm_kit's name only; tracebacks and sources name the right lines.
EVERYTHING = """
import importlib
import inspect
import sys

import data
import slm_kit

for name in sys.argv[1:]:
    importlib.import_module("slm_kit." + name)
ours = slm_kit.FILES | slm_kit.ROOMS
taken = {name for name in sys.modules if name.split(".")[0] in ours}
assert taken == {"data"}, taken
assert sys.modules["data"].OURS

for name, module in sys.modules.items():
    if name.startswith("slm_kit."):
        for value in vars(module).values():
            if inspect.ismodule(value):
                assert value.__name__.split(".")[0] not in ours, (name, value)

from slm_kit import score, slm
from slm_kit.common.errors import UserError

assert score.slm is slm
assert inspect.getsource(slm.excess).startswith("def excess(t):")
try:
    slm.excess(slm.Tokens())
except UserError as error:
    line = error.__traceback__.tb_next.tb_lineno
with open(slm.__file__) as file:
    assert "t.loss - t.ref_loss" in file.readlines()[line - 1]
"""


@pytest.fixture
def fork(tmp_path, vocabulary):
    """A fork's folder: files with the kit's names, and arrays to train on."""
    for name in ("data.py", "model.py", "score.py", "common/note.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("OURS = 'of the fork'\n")
    (tmp_path / "mine.py").write_text(MINE)
    write_set(tmp_path / "set", vocabulary, 600)
    write_model(tmp_path / "start", vocabulary)
    write_model(tmp_path / "reference", vocabulary, seed=1)
    return tmp_path


def python(arguments, folder, path=ROOT / "package", executable=sys.executable):
    """Run Python in a folder, with nothing of the kit to be found but what stands in `path`."""
    return subprocess.run(
        [executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def train_mine(fork, arguments, **options):
    done = python(["mine.py", *SETTINGS.split(), *arguments.split()], fork, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (fork / "out/log.jsonl").read_text().splitlines()]


def score_reference(stage):
    code, _, err = stage(
        score, "--model reference --data set --out ref_loss.bin --seq-len 16 --device cpu"
    )
    assert code == 0, err


def middle(t):
    excess = t.loss - t.ref_loss
    return -(excess - excess.median()).abs()


@pytest.mark.slow
def test_a_fork_trains_with_a_score_of_its_own_and_as_the_kit_would(stage, fork, monkeypatch):
    score_reference(stage)
    records = train_mine(fork, "--score middle --out out")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["tokens_selected"] for record in records] == [16, 32, 48]

    mine = slm.Score(middle, needs=("loss", "ref_loss"))
    monkeypatch.setitem(slm.SCORES, "middle", mine)
    code, _, err = stage(train_slm, f"{SETTINGS} --score middle --out kit")
    assert code == 0, err
    assert checkpoint.model_hash(fork / "out") == checkpoint.model_hash(fork / "kit")


@pytest.mark.parametrize(
    "short, long",
    [
        ("import slm", "import slm_kit.slm as slm"),
        ("import os, slm as s", "import os, slm_kit.slm as s"),
        ("import demo.chain", "import slm_kit.demo.chain, slm_kit.demo as demo"),
        ("import demo.chain as c", "import slm_kit.demo.chain as c"),
        ("from data import TokenSet", "from slm_kit.data import TokenSet"),
        ("from hf.config import x as y", "from slm_kit.hf.config import x as y"),
        ("from . import data", "from . import data"),
        ("import datasets.data", "import datasets.data"),
    ],
)
def test_imports_of_the_kits_files_are_renamed(short, long, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "package")
    import slm_kit

    assert ast.unparse(slm_kit.OneName().visit(ast.parse(short))) == long


@pytest.mark.slow
def test_every_file_loads_by_its_long_name_alone(fork):
    rooms = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tools"]
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.glob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in names]
    (fork / "everything.py").write_text(EVERYTHING)
    done = python(["everything.py", *names], fork)
    assert done.returncode == 0, done.stderr
    # and the caches of the same files under their short names are left alone
    for file in files:
        written = file.read_bytes().count(b"slm_kit.")  # in a docstring
        for cache in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            assert cache.read_bytes().count(b"slm_kit.") <= written, cache


def test_worker_processes_and_a_stage_as_a_module(fork):
    (fork / "a.txt").write_text("Tom has 3 apples.\n")
    (fork / "b.jsonl").write_text(json.dumps({"text": "Buys 4 more."}) + "\n")
    command = (
        "-m slm_kit.prepare --source a.txt b.jsonl --tokenizer set --out made{0} --workers {0}"
    )
    for workers in (1, 2):
        done = python(command.format(workers).split(), fork)
        assert done.returncode == 0, done.stderr
    assert (fork / "made1/tokens.bin").read_bytes() == (fork / "made2/tokens.bin").read_bytes()


@pytest.mark.slow
def test_an_installed_checkout_in_a_folder_with_spaces(stage, fork, tmp_path_factory):
    away = tmp_path_factory.mktemp("installed")
    kit = away / "the kit"
    ignored = shutil.ignore_patterns(".*", "data", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, kit, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", away / "venv"],
        check=True,
    )
    executable = away / "venv/bin/python"
    # torch and pip are this environment's, which may itself be a virtual one
    (site,) = (away / "venv/lib").glob("python*/site-packages")
    (site / "this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "install", "-q", "-e", str(kit), "--no-deps", "--no-build-isolation"]
    done = python(install, away, path="", executable=executable)
    assert done.returncode == 0, done.stderr

    score_reference(stage)
    records = train_mine(fork, "--score middle --out out", path="", executable=executable)
    assert len(records) == 3
