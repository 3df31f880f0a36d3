"""README's commands for a text of one's own, in order, on a tiny model and a few documents."""

import importlib
import json
import shlex

import pytest
import zstandard

from conftest import ROOT, write_model

HEADING = "## Continue TinyLlama on your own text"
# What makes them small; each is still the flag that README gives.
SMALL = {"2048": "16", "512": "8", "64": "8", "0.01": "0.25"}


def commands():
    """[words] of each command in the first block below the heading."""
    section = (ROOT / "README.md").read_text().partition(HEADING)[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_the_commands_in_their_order(stage, vocabulary, tmp_path, monkeypatch):
    write_model(tmp_path / "tiny", vocabulary)
    lines = []
    for n in range(48):
        lines.append(json.dumps({"text": f"Tom has {n} apples and buys {n + 4} more. " * 2}) + "\n")
    (tmp_path / "curated.jsonl").write_text("".join(lines[:16]))
    corpus = zstandard.compress("".join(lines).encode())
    (tmp_path / "corpus-0.jsonl.zst").write_bytes(corpus)
    problem = json.dumps({"question": "3+4", "answer": "7"})
    (tmp_path / "own.jsonl").write_text(problem + "\n")
    found = commands()
    assert len(found) == 8
    for python, *words in found:
        assert python == "python"
        text = " ".join(SMALL.get(word, word) for word in words)
        text = text.replace("TinyLlama/TinyLlama_v1.1", "tiny").replace("corpus-*", "corpus-0")
        text = text.replace("--tasks gsm8k math", "--tasks own.jsonl --max-new-tokens 4")
        name, _, rest = text.removeprefix("-m ").partition(" ")
        code, out, err = stage(importlib.import_module(name.removesuffix(".py")), rest)
        assert code == 0, f"{text}\n{err}"
    for run in ("slm", "clm"):
        assert json.loads((tmp_path / f"out/{run}/summary.json").read_text())["val_loss"] > 0
    assert json.loads((tmp_path / "out/clm/args.json").read_text())["k"] == 1
    assert (tmp_path / "out/slm-eval").is_dir()
    assert "clm" in out and "slm" in out  # the table of tools.compare
