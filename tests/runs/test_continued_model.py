"""runs/real_model: which text goes where, its table, what it plans, and the recipe run small."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

import runs.real_model as real_model
from common.errors import UserError
from conftest import ROOT, SHARED
from forking import python_fixture  # noqa: F401
from tools.plan.recipe import commands_of
from tools.plan.stages import Plan
from tools.results import files
from tools.results.tables import render

PROBLEMS = [(f"How much is {i} + {i}?", f"{i}+{i}={2 * i}\n#### {2 * i}") for i in range(200)]
LATEX = [f"\\section{{Rings {i}}} Let $R$ be a ring." for i in range(40)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def asked(tmp_path):
    """Arguments of `sets`; the two public files and a test split stand in tmp_path/copy."""
    copy = tmp_path / "copy"
    problems = [{"question": q, "answer": a} for q, a in PROBLEMS]
    write_rows(copy / "corpus/gsm8k_train.jsonl", problems)
    write_rows(copy / "corpus/stacks_project.jsonl", [{"text": text} for text in LATEX])
    write_rows(copy / "eval/gsm8k.jsonl", [{"question": "A test?", "answer": "#### 1"}])
    return SimpleNamespace(
        out=tmp_path / "sets", data=copy / "corpus", text=None, data_dir=copy, made=False
    )


def texts(folder, name):
    return [json.loads(line)["text"] for line in open(folder / f"{name}.jsonl")]


def test_everything_is_in_one_set(asked):
    real_model.write_sets(asked)
    sets = {name: texts(asked.out, name) for name in ("corpus", "curated", "val", "test")}
    assert sets.pop("test") == ["A test?\n#### 1"]
    everything = [text for part in sets.values() for text in part]
    assert sorted(everything) == sorted([f"{q}\n{a}" for q, a in PROBLEMS] + LATEX)
    assert {name: len(part) for name, part in sets.items()} == {
        "corpus": 100 + 40,
        "curated": 90,
        "val": 10,
    }
    assert set(LATEX) < set(sets["corpus"])


def test_text_of_ones_own(asked, tmp_path):
    asked.text = tmp_path / "own"
    for name in ("corpus", "val"):
        write_rows(asked.text / f"{name}.jsonl", [{"text": f"my {name}"}])
    with pytest.raises(UserError, match="holds no curated.jsonl"):
        real_model.write_sets(asked)
    write_rows(asked.text / "curated.jsonl", [{"content": "x"}])
    with pytest.raises(UserError, match='has the fields content, wanted a "text"'):
        real_model.write_sets(asked)
    write_rows(asked.text / "curated.jsonl", [{"text": "my curated"}])
    real_model.write_sets(asked)
    assert texts(asked.out, "corpus") == ["my corpus"]
    assert texts(asked.out, "curated") == ["my curated"]


def test_without_data_the_files_are_named(asked, tmp_path):
    asked.data = tmp_path
    with pytest.raises(UserError, match="holds no gsm8k_train.jsonl"):
        real_model.write_sets(asked)


def run_of(method, curve, loss, accuracy, scored=None):
    numbers = {"val_loss": curve[-1][1], "tokens_seen": curve[-1][0], "scored_tokens": scored}
    numbers |= {"gsm8k_loss": loss, "gsm8k_accuracy": accuracy}
    arguments = {"k": 0.7} if method == "slm" else {}
    return files.Run(method, 0, "small", numbers, curve, arguments, {}, {})


def test_the_table_by_hand():
    experiment = files.Experiment("real-model", "bash runs/real_model.sh")
    for run in (
        run_of("base", [[0, 3.0]], 3.25, 1.5),
        run_of("ref", [[0, 3.0], [500, 1.5]], 1.75, 4.0),
        run_of("clm", [[0, 3.0], [1000, 2.5], [2000, 2.0]], 2.25, 2.0),
        run_of("slm", [[0, 3.0], [1000, 1.75], [2000, 1.625]], 1.875, 3.0, scored=6000),
    ):
        files.add(experiment, run)
    lines = [line for line in render("real-model", experiment) if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]]
    assert rows == [
        ["before", "0", "3.000", "3.250", "1.5", "0", "–", "–"],
        ["the reference itself", "0", "1.500", "1.750", "4.0", "500", "–", "–"],
        ["CLM", "0", "2.000", "2.250", "2.0", "2,000", "2,000", "2,000"],
        # From 3.0 to 1.75 in 1,000 tokens: 2.0 after 800; the reference 500, scoring 6,000 / 3.
        ["SLM, k 0.7", "0", "1.625", "1.875", "3.0", "2,000", "800", "3,300"],
    ]


@pytest.mark.slow
def test_it_is_planned_for_half_an_hour_of_a_small_gpu(tmp_path):
    """The stages' own parsers take every command; at an MFU of 15 % with time left to evaluate."""
    commands = commands_of(ROOT / "runs/real_model.sh", 1)
    small, large = (Plan(gpu, 1, mfu=0.15) for gpu in ("4090", "h100"))
    for plan in (small, large):
        for words in commands:
            plan.add(words)
    trained = [row for row in small.rows if "fits" in row]
    assert len(trained) == 1 + 3 + 2
    assert all(row["fits"] for row in trained)
    assert sum(row["hours"] for row in large.rows) < 0.4


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the evaluation needs ../shared/data")
def test_runs_from_start_to_end_and_takes_up_what_is_done(python, tmp_path):
    environment = {
        **os.environ,
        "SCALE": "tiny",
        "TINY": str(tmp_path),
        "PYTHON": str(python / "python"),
        "DATA_DIR": str(SHARED),
        "TQDM_DISABLE": "1",
    }

    def recipe():
        done = subprocess.run(
            ["bash", ROOT / "runs/real_model.sh"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    before = set((ROOT / "results").glob("*"))
    first = recipe()
    out = tmp_path / "out/real_model"
    table = (out / "report.md").read_text()
    assert table in first
    for label in ("before", "the reference itself", "CLM", "random tokens, k 0.6", "SLM, k 0.6"):
        row = next(line for line in table.splitlines() if f" {label} |" in line)
        losses = [float(cell) for cell in row.split("|")[4:6]]
        assert all(5 < loss < 8 for loss in losses), row  # near ln 501
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert len(finished) == 6
    stored = json.loads((out / "results/real-model.json").read_text())
    assert len(stored["runs"]) == 7
    assert recipe().endswith(table)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert set((ROOT / "results").glob("*")) == before, "a small run wrote into the repository"
