"""tools/explore without its page: losses, dynamics, curves, ablations, the suggestion for k."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import runs.ablations
from common.errors import UserError
from conftest import write_model
from data import STORED_FORMAT, TokenSet
from explored import env, explored_run  # noqa: F401  (the fixture `run`)
from hf import checkpoint
from tools.explore import __main__ as tools_explore
from tools.explore import dynamics
from tools.explore import runs as explore_run
from tools.explore.page import scope_shown
from tools.results import files


@pytest.fixture
def explore(stage):
    return lambda arguments: stage(tools_explore, arguments)


# ---- what the models say


def test_snapshots_and_their_losses(run, explore):
    data = TokenSet(run / "data")
    shutil.copytree(run / "slm/step-000004", run / "slm/step-best", dirs_exist_ok=True)
    found = explore_run.snapshots(run / "slm")
    shutil.rmtree(run / "slm/step-best")  # the user's own
    assert [(step, path.name) for step, path in found] == [
        (0, "base"),
        (4, "step-000004"),
        (8, "slm"),
    ]
    batches = [[3, 1], [0]]
    got = explore_run.look(found[1][1], data, batches, 32, env(), top=3)
    model = checkpoint.load(found[1][1])
    x, y, _ = data.batch([3, 1, 0], 32)
    log_p = model.logits(torch.from_numpy(x)).double().log_softmax(-1)
    assert np.allclose(
        got["loss"], -log_p.gather(-1, torch.from_numpy(y)[..., None])[..., 0].detach(), atol=1e-4
    )
    assert np.allclose(got["entropy"], -(log_p.exp() * log_p).sum(-1).detach(), atol=1e-4)
    assert np.array_equal(got["top_id"], log_p.topk(3).indices)
    assert np.allclose(got["top_p"], log_p.topk(3).values.exp().detach(), atol=1e-5)
    assert np.allclose(
        explore_run.look(found[1][1], data, batches, 32, env())["loss"], got["loss"], atol=1e-5
    )
    code, _, err = explore(f"dynamics --run {run} --data {run}/data --out x")
    assert code == 2
    assert "is not a run" in err
    assert err.count("\n") == 1


# ---- dynamics (section 2.1)


def test_every_synthetic_token_lands_in_its_class():
    x, rng = np.arange(11), np.random.RandomState(0)
    wave = 0.05 * np.sin(3 * x)
    known = {0: 3 - 0.2 * x, 1: 0.1 + wave, 2: 5 + wave, 3: 1 + 0.1 * x}
    category = np.repeat([0, 1, 2, 3], [26, 51, 11, 12])
    rng.shuffle(category)
    losses = np.stack([known[c] for c in category], 1) + 0.01 * rng.randn(11, 100)
    assert (dynamics.classify(losses) == category).all()
    assert dynamics.shares(category)["all"] == dynamics.PAPER  # 26, 51, 11, 12 %
    by_kind = dynamics.shares(category, (category == 2).astype(int), ["rest", "digits"])
    assert by_kind["digits"] == {"H→L": 0, "L→L": 0, "H→H": 1, "L→H": 0}


def test_the_change_is_the_fitted_lines_and_not_the_ends():
    rng = np.random.RandomState(1)
    losses = rng.rand(7, 500) * 2
    change = np.polyfit(np.arange(7), losses, 1)[0] * 6
    wanted = np.select([change < -0.2, change > 0.2, losses[-1] <= losses[-1].mean()], [0, 3, 1], 2)
    assert (dynamics.classify(losses) == wanted).all()
    assert len(set(wanted)) == 4
    late = np.array([[1, 1, 1, 1, 1, 0.7], [2] * 6]).T  # falls by 0.3 at the end, its line by 0.21
    early = np.array([[0.7, 1, 1, 1, 1, 0.7], [2] * 6]).T  # ends where it began
    assert list(dynamics.classify(late)) == [0, 2]
    assert list(dynamics.classify(early)) == [1, 2]
    with pytest.raises(UserError, match="at least 2"):
        dynamics.classify(losses[:1])


def test_dynamics_of_a_run(run, explore, tmp_path):
    code, out, err = explore(
        f"dynamics --run {run}/slm --data {run}/data --out {tmp_path}/d --tokens 500 --threads 1"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "d.json").read_text())
    data = TokenSet(run / "data")
    windows = np.array(explore_run.spaced(range(data.n_windows(32)), 15))
    valid = data.valid(windows, 32)
    models = [path for _, path in explore_run.snapshots(run / "slm")]
    losses = [explore_run.look(path, data, [windows], 32, env())["loss"][valid] for path in models]
    category = dynamics.classify(np.stack(losses))
    assert result["tokens"] == valid.sum()
    assert result["steps"] == [0, 4, 8]
    wanted = {c: (category == i).mean() for i, c in enumerate(dynamics.CATEGORIES)}
    assert result["shares"]["all"] == pytest.approx(wanted, abs=1e-3)
    assert set(result["shares"]) == {"all", "plain", "hostile"}
    assert "| the paper | 26% | 51% | 11% | 12% |" in out
    assert (tmp_path / "d.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "d.svg").read_text()
    code, _, err = explore(
        f"dynamics --run {run}/slm/step-000004 --data {run}/data --out {tmp_path}/d"
    )
    assert code == 2
    assert "is not a run" in err


# ---- curves


SUMMARY = {"val_loss": 2.0, "exact_match": None, "tokens_seen": 1, "tokens_selected": 1}
NOTE = {
    "format": STORED_FORMAT,
    "data": "-",
    "reference": "-",
    "seq_len": 50,
    "count": 90,
    "n_scored": 2,
    "checksums": {},
}


def write_log(folder, losses, tokens=100, **changes):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(
        json.dumps(
            {
                "k": 1.0,
                "steps": len(losses),
                "init": "x",
                "batch_size": 2,
                "micro_batch_size": 2,
                "seq_len": 50,
                "data": "d",
                "lr": 1e-3,
                "seed": 0,
                "inputs": {},
                **changes,
            }
        )
    )
    (folder / "log.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": i + 1,
                    "tokens_seen": tokens * (i + 1),
                    "loss": l,
                    "loss_selected": l,
                    "val_loss": l,
                    "kept": {"clean": 0.9, "noise": 0.1 * l},
                }
            )
            + "\n"
            for i, l in enumerate(losses)
        )
    )
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "val_loss": losses[-1],
                "exact_match": None,
                "tokens_seen": tokens * len(losses),
                "tokens_selected": 1,
            }
        )
    )
    return folder


def test_tokens_and_cost_to_reach_the_baseline(vocabulary, tmp_path, explore):
    clm = write_log(tmp_path / "clm", [4.0, 3.0, 2.5, 2.0])
    shared = {
        "k": 0.6,
        "score": "excess",
        "scope": "micro",
        "ref_loss": str(tmp_path / "ref_loss.bin"),
    }
    small = write_model(tmp_path / "ref", vocabulary, seed=3, num_hidden_layers=1)
    large = write_model(tmp_path / "model", vocabulary, seed=4, num_hidden_layers=2)
    (tmp_path / "ref/summary.json").write_text(json.dumps({**SUMMARY, "tokens_seen": 60}))
    (tmp_path / "ref_loss.json").write_text(json.dumps(NOTE))
    slm_run = write_log(
        tmp_path / "slm",
        [3.0, 1.0, 0.9, 0.8],
        **shared,
        inputs={"ref_loss": checkpoint.model_hash(tmp_path / "ref")},
    )
    never = write_log(tmp_path / "never", [4.0, 3.5, 3.0, 2.9], **{**shared, "score": "random"})
    shutil.copy(tmp_path / "model/config.json", slm_run)
    code, out, err = explore(
        f"curves --run CLM={clm} --run SLM={slm_run} --run random={never} --baseline CLM "
        f"--out {tmp_path}/c"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "c.json").read_text())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
    fixed = (
        (60 + 90 / 3) * sizes[0] / sizes[1]
    )  # the reference's training, and a third of it for scoring
    assert result["SLM"]["tokens_to_reach"] == [150]  # halfway from 3.0 after 100 to 1.0 after 200
    assert result["SLM"]["times_fewer_tokens"] == [round(400 / 150, 2)]
    assert result["SLM"]["fixed_cost"] == [round(fixed)]
    assert result["SLM"]["times_less_cost"] == [round(400 / (fixed + 150), 2)]
    assert result["random"]["fixed_cost"] == [0]
    assert result["random"]["tokens_to_reach"] == [None]
    assert "never" in out
    assert all(
        (tmp_path / f"c{name}").stat().st_size > 5000
        for name in (".png", ".svg", "-training.png", "-training.svg", "-kept.png", "-kept.svg")
    )
    (tmp_path / "ref/summary.json").unlink()
    code, _, err = explore(f"curves --run SLM={slm_run} --out {tmp_path}/c")
    assert code == 2
    assert "--reference" in err
    assert err.count("\n") == 1
    code, _, err = explore(f"curves --run CLM={clm} --baseline clm --out {tmp_path}/c")
    assert code == 2
    assert "wanted one of CLM" in err


# ---- ablations


def test_the_narrow_reference_sees_one_template(stage, tmp_path):
    code, _, err = stage(runs.ablations, f"narrow --seed 3 --out {tmp_path}/narrow.jsonl")
    assert code == 0, err
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "narrow.jsonl").read_text().splitlines()
    ]
    pattern = re.compile(
        r"Q: \w+ has (\d) \w+ and buys (\d) more\. Then \w+ takes (\d) away\. "
        r"How many \w+ are left\?\n"
        r"A: \1\+\2=(\d+)\n \4-\3=(\d+)\n #### \5\n"
    )
    found = [pattern.fullmatch(text) for text in texts]
    assert len(texts) == 800
    assert all(found)
    assert all(
        int(m[1]) + int(m[2]) == int(m[4]) and int(m[4]) - int(m[3]) == int(m[5]) for m in found
    )


def test_an_ablations_table(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(files, "FIGURES", tmp_path / "figures")
    for seed, losses, last in ((1, [3.0, 2.0, 1.5], 4.0), (3, [3.0, 2.0, 1.7], 5.0)):
        out = tmp_path / f"out/demo-seed{seed}/steps3"
        write_log(out / "clm", [4.0, 3.0, 2.0], seed=seed)
        write_log(out / "slm", losses, seed=seed)
        write_log(out / "random", [4.0, 3.5, last], seed=seed)
    code, out, err = stage(runs.ablations, "table --name score --seeds 1 3 --steps 3")
    assert code == 0, err
    rows = {}
    for line in out.splitlines():
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[label] = cells
    # Half of the interval: t(1) = 12.71 times the standard error, 0.1 and 0.5 (here and below).
    assert rows["excess"][:6] == ["2", "1.600", "-0.400 ± 1.271", "–", "–", "1.50"]
    assert rows["random"][:4] == ["2", "4.500", "+2.500 ± 6.355", "+2.900 ± 5.084"]
    assert rows["random"][5] == "never" and "both of these" not in rows
    assert "left out: " in out
    assert "demo-seed3/steps3/ref_and" in out
    assert (tmp_path / "figures/ablation-score-steps3.png").exists()
    assert {run.variant for run in files.load("ablations").runs} == {"steps3"}

    code, _, err = stage(runs.ablations, "table --name k --seeds 9")
    assert code == 2
    assert "none of the runs is finished" in err


def test_the_price_of_a_reference_counts_its_base_where_it_has_its_own(vocabulary, tmp_path):
    shared = write_log(tmp_path / "base", [3.0] * 10)
    own = write_log(tmp_path / "small-base", [3.0] * 4)  # has read 400 tokens
    student = write_log(tmp_path / "slm", [2.0] * 9, init=str(shared))
    for start, name, width in ((shared, "ref", 32), (own, "small", 16)):
        reference = write_log(tmp_path / name, [2.5] * 3, init=str(start))  # 300
        write_model(reference, vocabulary, hidden_size=width)
    write_model(student, vocabulary, hidden_size=32)

    whole = runs.ablations.price_of(student, tmp_path / "ref", 900)
    assert whole["parameters"] == whole["reference_parameters"]
    assert whole["extra_tokens"] == 300 + 900 / 3
    small = runs.ablations.price_of(student, tmp_path / "small", 900)
    share = small["reference_parameters"] / whole["parameters"]
    assert small["extra_tokens"] == pytest.approx((400 + 300 + 900 / 3) * share)


def test_a_scope_that_the_page_does_not_know_is_said(capsys):
    assert [scope_shown(scope) for scope in ("batch", "sequence", None)] == [
        "batch",
        "sequence",
        "micro",
    ]
    assert capsys.readouterr().out == ""
    assert scope_shown("set") == "micro"
    assert "ranked its whole corpus at once" in capsys.readouterr().out
