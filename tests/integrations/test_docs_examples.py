"""The examples of docs/integrations.md, run as they stand there."""

import json
import re

import pytest

import score
from conftest import ROOT, write_model, write_set

PAGE = ROOT / "docs/integrations.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def prepared(vocabulary, tmp_path, monkeypatch):
    """The files that the examples name."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "my-model", vocabulary, seed=1)
    write_model(tmp_path / "my-reference", vocabulary, seed=2)
    write_set(tmp_path / "data/web", vocabulary, 600)
    monkeypatch.setattr("sys.argv", ["score.py", *SCORE.split()])
    score.main()
    texts = [{"text": f"Tom has {i} apples."} for i in range(8)]
    pairs = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(8)]
    for name, rows in (("train.jsonl", texts), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


SCORE = "--model my-reference --data data/web --out out/ref_loss.bin --seq-len 16"


def test_there_are_four():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("number", range(4))
def test_it_runs(prepared, number):
    code = EXAMPLES[number]
    for package in re.findall(r"^from (datasets|trl)\b", code, re.MULTILINE):
        pytest.importorskip(package, reason="not installed")
    # The checkout may be installed as slm_kit; here its files go by their own names.
    exec(compile(code.replace("slm_kit.", ""), PAGE.name, "exec"), {})
