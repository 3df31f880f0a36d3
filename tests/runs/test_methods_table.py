"""runs/methods.sh: every variant is a command that train_slm.py takes; and a shrunken run."""

import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

import slm
import train_slm
from conftest import ROOT, write_set
from forking import python_fixture  # noqa: F401
from runs import methods as table


@pytest.mark.parametrize("name", ["clm", *slm.SCORES])
def test_every_variant_is_what_the_trainer_takes(name):
    found = table.at_rates(name, ["5e-4", "1e-3"])
    assert len(found) == 2
    knobs = table.at_knobs(name, "1e-3")
    assert len(knobs) == (0 if name in ("clm", "dft", "deft") else 2)
    assert not found.keys() & knobs.keys()
    for folder, flags in (found | knobs).items():
        args = train_slm.arguments(flags.split())
        assert args.score == ("excess" if name == "clm" else name) and "/" not in folder
        assert (args.k == 1) == (name == "clm" or isinstance(slm.SCORES[name], slm.Weight))
    for knob, values in table.KNOBS.values():
        assert len(values) == 3 and knob.isidentifier()


def test_published_values_are_among_the_knobs():
    """A knob's default, which is the paper's where it names one, is always tried."""
    for name, (knob, values) in table.KNOBS.items():
        defaults = slm.SCORES[name].function.__defaults__
        assert defaults[0] in values, (name, knob)


def test_without_a_search_each_is_as_published(tmp_path, monkeypatch, capsys):
    """TUNE_SEEDS= : nothing is compared, and nothing counts as tuned."""
    monkeypatch.setattr(table.files, "FOLDER", tmp_path)
    args = SimpleNamespace(names=["clm", "excess", "mile"], seeds=[], rates=["1e-3", "2e-3"])
    args.out, args.steps, args.stage = tmp_path / "choices.json", 1200, "rates"
    table.show_choose(args)
    args.stage = "knobs"
    table.show_choose(args)
    choices = json.loads(args.out.read_text())
    assert choices["mile"]["flags"] == "--score mile --lr 1e-3"
    assert choices["excess"]["folder"] == "excess-1e-3" and not choices["excess"]["losses"]
    assert not list(tmp_path.glob("*search*"))


@pytest.mark.slow
def test_shrunken(python, vocabulary, tmp_path):
    """Three methods on little data: tuned, trained, in a table and a figure."""
    for seed, name in enumerate(("base", "curated", "corpus", "val")):
        folder = tmp_path / "data/demo-seed71" / name
        kind = np.arange(5000) % 2
        write_set(folder, vocabulary, seed=seed, kind=kind, kinds=("solution", "wrong_digits"))
    small = {
        "STEPS": "6",
        "BASE_STEPS": "6",
        "REF_STEPS": "6",
        "EVALUATE": "0",
        "RATES": "1e-3",
        "TUNE_SEEDS": "71",
        "SEEDS": "71",
        "WHERE": str(tmp_path),
        "KIT_RESULTS": str(tmp_path / "results"),
        "KIT": str(ROOT),
        "PATH": f"{python}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "runs/methods.sh"), "mile longce document"]
    done = subprocess.run(command, env=os.environ | small, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    passes = {row[0]: row[-1] for row in rows if len(row) == 9 and row[0] != "method"}
    assert passes == {"CLM": "0", "mile": "0", "longce": "2", "document": "2"}
    made = json.loads((tmp_path / "results/methods-tuned.json").read_text())["runs"]
    assert {run["method"] for run in made} == {"clm", "mile", "longce", "document"}
    assert all(run["numbers"]["kept_solution"] > 0 for run in made if run["method"] != "clm")
    assert (tmp_path / "results/figures/methods-tuned.png").stat().st_size > 10_000
    chosen = json.loads((tmp_path / "out/methods.json").read_text())
    assert set(chosen) == {"clm", "mile", "longce", "document"}
    losses = chosen["mile"]["losses"]
    assert len(losses) == 3 and losses[chosen["mile"]["folder"]] == min(losses.values())
    tried = json.loads((tmp_path / "results/methods-search.json").read_text())["runs"]
    assert len(tried) == 1 + 3 * 3  # CLM has no knob
