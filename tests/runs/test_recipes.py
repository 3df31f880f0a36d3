"""runs/*.sh: each recipe is planned at full size, and run with tiny models on a local hub."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

import runs.real_text as real_text
from conftest import ROOT, SHARED
from data import TokenSet
from evaluation import pinned
from forking import python_fixture  # noqa: F401
from tools.plan.recipe import commands_of, stage_of
from tools.plan.stages import Plan

# recipe: student, K, tokens read, learning rate, as the paper has them (PAPER.md, "Settings")
EXPECTED = {
    "rho_math_1b": ("slm-k0.6", 0.6, 15e9, 8e-5),
    "rho_math_7b": ("slm-k0.7", 0.7, 15e9, 2e-5),
    "rho_general_1b": ("slm-k0.6", 0.6, 80e9, 1e-4),
    "weak_to_strong_7b": ("slm-k0.7", 0.7, 15e9, 2e-5),
    "self_reference_1b": ("slm-k0.6", 0.6, 5e9, 8e-5),
}
INTERPRETERS = ["rho_math_1b_interpreter", "rho_math_7b_interpreter"]


def flags_of(words):
    return {word: value for word, value in zip(words, words[1:]) if word.startswith("--")}


@pytest.mark.parametrize("k", ["paper", "1.0"])
@pytest.mark.parametrize("recipe", [*EXPECTED, *INTERPRETERS])
def test_planned_with_the_papers_numbers(recipe, k, monkeypatch):
    """What PLAN=1 prints goes through the stages' own parsers.

    Batch, tokens, rate and k are the paper's.
    """
    if k == "1.0":
        monkeypatch.setenv("K", "1.0")
    commands = commands_of(ROOT / "runs" / f"{recipe}.sh", 8)
    names = [stage_of(words)[0] for words in commands]
    assert names[0] == "prepare.py"
    assert "eval_math.py" in names
    if recipe in INTERPRETERS:
        train = next(flags_of(w) for w in commands if "train_ref.py" in w)
        assert (train["--lr"], train["--schedule"], train["--epochs"], train["--batch-size"]) == (
            "2e-5",
            "linear",
            "3",
            "128",
        )
        assert flags_of(commands[-1])["--mode"] == "tool"
        return
    student, paper_k, tokens, lr = EXPECTED[recipe]
    scored = "score.py" in names
    assert scored == (k == "paper")
    last = next((flags_of(w) for w in commands if "train_slm.py" in w), None) or next(
        flags_of(w) for w in commands if "train_ref.py" in w
    )
    assert float(last["--lr"]) == lr
    assert int(last["--batch-size"]) * int(last["--seq-len"]) == 2**20
    assert float(last.get("--k", 1)) == (paper_k if k == "paper" else 1.0)
    assert abs(int(last["--steps"]) * 2**20 - tokens) < 2**20


@pytest.mark.parametrize(
    "recipe, last", [("rho_math_1b.sh", "eval_math"), ("real_text.sh", "report")]
)
def test_pythons_folder_may_have_a_space(recipe, last, tmp_path):
    """Every stage is started by $PYTHON, here a script that notes its arguments."""
    python = tmp_path / "my python" / "python"
    python.parent.mkdir()
    python.write_text(
        f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/called
case "$*" in *local_hub*) echo "address" > out/tiny/hub/address; exec sleep 600 ;; esac
"""
    )
    python.chmod(0o755)
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "out/real").mkdir(parents=True)  # the stages would make it
    subprocess.run(
        ["bash", tmp_path / "runs" / recipe],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python), "SCALE": "tiny", "DATA": "data"},
        check=True,
        capture_output=True,
    )
    called = (tmp_path / "called").read_text().splitlines()
    assert any("prepare.py" in line for line in called)
    assert any("train_slm.py" in line for line in called)
    assert last in called[-1]


@pytest.mark.parametrize("recipe, arguments", [("demo.sh", "--jobs 1"), ("ablations.sh", "score")])
def test_a_stage_that_fails_ends_the_experiment(recipe, arguments, tmp_path):
    """What comes after it is not run, nor is another seed, and no table is printed."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    python = tmp_path / "python"  # stands for all stages: notes its arguments, and fails for one
    python.write_text(
        f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/called
case "$*" in *"--score random"*) echo "error: the reason" >&2; exit 2 ;; esac
"""
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "runs" / recipe, *arguments.split(), "--seeds", "1 2"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "error: the reason" in done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert "--score random" in called[-1]
    assert not any("seed2" in line or "--seed 2" in line for line in called)


def test_every_source_of_data_has_its_line_among_the_licences():
    """Those that recipes name (hf:...), those that are pinned, and those that tests download."""
    page = (ROOT / "docs/recipes.md").read_text()
    table = page.partition("## Whose data it is")[2].partition("\n## ")[0]
    named = set()
    for recipe in (ROOT / "runs").glob("*.sh"):
        named |= set(re.findall(r"hf:([\w.-]+/[\w.-]+)", recipe.read_text()))
    assert len(named) >= 8
    for address in (pinned.HARNESS, pinned.PROMPTPG):
        named.add("/".join(address.split("/")[:2]))
    for address in (real_text.GSM8K, real_text.STACKS):
        named.add("/".join(urlsplit(address).path.split("/")[1:3]))
    assert sorted(name for name in named if f"`{name}`" not in table) == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao"
)
def test_moments_from_start_to_end(python, tmp_path):
    """On a copy of the kit, for results go into it. A second call adds nothing."""
    left_out = shutil.ignore_patterns("out", "data", "tests", "figures", ".*", "__py*")
    shutil.copytree(ROOT, tmp_path / "kit", ignore=left_out)
    made = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", tmp_path / "kit/runs/moments.sh", "--seeds", "1", "--tiny"],
            env={
                **os.environ,
                "PATH": f"{python}:{os.environ['PATH']}",
                "TQDM_DISABLE": "1",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made.append(json.loads((tmp_path / "kit/results/moments-tiny.json").read_text())["runs"])
    assert made[0] == made[1]
    keys = {(run["method"], run["seed"], run["variant"]) for run in made[0]}
    forms = ("float32", "bfloat16", "int8")
    assert keys == {(method, 1, form) for method in ("slm", "clm") for form in forms}
    assert all(run["arguments"]["moments"] == run["variant"] for run in made[0])


@pytest.mark.slow
def test_every_stage_fits_the_machines_that_are_named():
    """1B on 8 GPUs of 80 GB, 7B on 8 and 32 of 80 GB."""
    for recipe, gpu, n_gpus in (
        ("rho_math_1b", "h100", 8),
        ("rho_math_7b", "h100", 8),
        ("rho_math_7b", "h100", 32),
    ):
        made = Plan(gpu, n_gpus)
        for words in commands_of(ROOT / "runs" / f"{recipe}.sh", n_gpus):
            made.add(words)
        assert [row["fits"] for row in made.rows if "fits" in row] == [True, True], recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(recipe, **environment): runs it; the folder of its results."""
    root = tmp_path_factory.mktemp("tiny")
    data = root / "shared"  # the scripts split DATA_DIR at spaces, which the checkout may have
    if SHARED.exists():
        data.symlink_to(SHARED)

    def run(recipe, **environment):
        env = {
            **os.environ,
            "SCALE": "tiny",
            "TINY": str(root),
            "PYTHON": sys.executable,
            "DATA_DIR": str(data),
            "TQDM_DISABLE": "1",
            **environment,
        }
        done = subprocess.run(
            ["bash", ROOT / "runs" / f"{recipe}.sh"],
            env=env,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return root / "out" / recipe

    return run


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the evaluation needs ../shared/data")
@pytest.mark.parametrize(
    "recipe, k", [(name, None) for name in EXPECTED] + [("rho_math_1b", "1.0")]
)
def test_runs_from_start_to_end(tiny, recipe, k):
    student, paper_k, *_ = EXPECTED[recipe]
    out = tiny(recipe, **({"K": k} if k else {}))
    name = f"slm-k{k}" if k else student
    run = next(
        path.parent for path in out.rglob("summary.json") if path.parent.name.startswith(name)
    )
    summary = json.loads((run / "summary.json").read_text())
    share = summary["tokens_selected"] / summary["tokens_seen"]
    wanted = float(k or paper_k)
    assert summary["tokens_seen"] > 16000
    assert abs(share - wanted) < 0.01 if recipe != "self_reference_1b" else 0.2 < share < wanted
    results = json.loads((run / "eval/results.json").read_text())
    assert "gsm8k" in json.dumps(results)
    if recipe == "rho_math_1b" and not k:  # finished: nothing is done again
        again = tiny(recipe)
        assert json.loads((again / run.relative_to(out) / "summary.json").read_text()) == summary


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the evaluation needs ../shared/data")
@pytest.mark.parametrize("recipe", INTERPRETERS)
def test_the_interpreters_run_from_start_to_end(tiny, recipe):
    out = tiny(recipe)
    run = next(out.iterdir())
    tokens = TokenSet(out.parents[1] / "data" / recipe / run.name)
    assert 0.1 < tokens.loss_mask.mean() < 0.9
    assert "gsm8k-tool" in json.loads((run / "eval/results.json").read_text())
