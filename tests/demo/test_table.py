"""The table of runs/demo.sh, over seeds whose runs are made up."""

import json

import pytest

from demo import table


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two seeds: SLM reaches CLM's last loss in half of its tokens, the random choice never."""
    monkeypatch.chdir(tmp_path)
    curves = {"clm": (3.0, 1.0), "slm": (1.0, 0.5), "random": (3.0, 2.0)}
    for seed, folder in ((0, "out/demo"), (5, "out/demo-seed5")):
        for name in table.ROWS:
            run = tmp_path / folder / name
            run.mkdir(parents=True)
            summary = {"val_loss": 0.3 + seed / 10, "exact_match": 0.25}
            summary |= {"tokens_seen": 200, "tokens_selected": 120}
            (run / "summary.json").write_text(json.dumps(summary))
            lines = [
                {
                    "tokens_seen": 100 * i,
                    "val_loss": loss,
                    "val_loss_by_kind": {"solution": loss / 2},
                    "kept": {"typo": 0.1, "solution": 0.8},
                }
                for i, loss in enumerate(curves.get(name, (2.0, 1.0)), 1)
            ]
            (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_ratios_and_shares(runs, stage):
    code, out, err = stage(table, "--seeds 0 5")
    assert code == 0, err
    assert "| | seed 0 | seed 5 | mean ± sd |\n|---|---|---|---|\n" in out
    assert "| CLM | 0.300 / 0.250 | 0.800 / 0.250 | 0.550 ± 0.354 / 0.250 ± 0.000 |" in out
    assert "| **SLM k 0.6**, loss on all tokens | 2.0 | 2.0 | 2.0 |" in out
    assert "| **SLM k 0.6**, loss on correct solutions only | 2.0 | 2.0 | 2.0 |" in out
    assert "| random 60 %, loss on all tokens | never | never | never |" in out
    assert out.endswith("| kind | kept |\n|---|---|\n| solution | 80% |\n| typo | 10% |\n")


def test_a_missing_run_is_named(runs, stage):
    code, _, err = stage(table, "--seeds 0 4")
    assert code == 2
    assert "base of seed 4, made by runs/demo.sh" in err
