"""The check of docs/curated.md for what a curated set and a corpus share, as it stands there."""

import json
import re
import shlex

from conftest import ROOT
from tools import decontaminate

PAGE = (ROOT / "docs/curated.md").read_text()
SHARED = "we show that each bounded sequence of reals has a subsequence that converges to a limit"


def lines_of(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_overlap_of_a_corpus_with_the_curated_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = "of all the proofs in this book the next one is the one that most readers like best"
    lines_of(tmp_path / "curated.jsonl", [other, SHARED])
    lines_of(tmp_path / "corpus.jsonl", ["another page", f"Today {SHARED}. Tomorrow more."])
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    command = re.search(
        r"python -m tools.decontaminate (--source corpus.*?overlap.json)", PAGE, re.S
    )
    words = shlex.split(
        command[1].replace("\\\n", "").replace("corpus-*.jsonl.zst", "corpus.jsonl")
    )
    decontaminate.main(words)
    assert (tmp_path / "corpus-clean.jsonl").read_text() == '{"text": "another page"}\n'
    report = json.loads((tmp_path / "overlap.json").read_text())
    assert report["contaminated"] == 1
    assert report["finds"][0]["problems"] == [["curated-problems.jsonl", 1]]
