"""Results as files and tables, and regrading against the Rho-1 authors' own released verdicts."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common.errors import UserError  # noqa: E402
from evaluation import results  # noqa: E402
from evaluation.answers import extract, normalize  # noqa: E402
from evaluation.results import markdown, regrade, table  # noqa: E402

SHARED = ROOT.parent / "shared"
PUBLISHED = SHARED / "data" / "published"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason=f"needs the authors' released outputs: {PUBLISHED}"
)

# --------------------------------------------------------------------------------------------------
# files and tables


def test_regrade_own_file_gives_the_same_again(tmp_path):
    rows = [
        {"gt": "18", "text": "The answer is 18."},
        {"gt": "7500", "text": "The answer is 75."},
        {"gt": "4", "text": "The answer is 5."},
        {"gt": "4", "text": ""},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = regrade(
        tmp_path / "in.jsonl", "gsm8k", tmp_path / "out", settings={"mode": "cot", "model": "M"}
    )
    entry = results["gsm8k"]
    assert (entry["n"], entry["published"], entry["strict"], entry["failed"]) == (4, 50.0, 25.0, 0)
    assert entry["published_se"] == pytest.approx(
        100 * statistics.pstdev([1, 1, 0, 0]) / math.sqrt(4), abs=0.01
    )
    lines = [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").read_text().splitlines()]
    assert [
        (line["idx"], line["pred"], line["gt"], line["published"], line["strict"]) for line in lines
    ] == [
        (0, "18", "18", True, True),
        (1, "75", "7500", True, False),
        (2, "5", "4", False, False),
        (3, "", "4", False, False),
    ]
    first = (tmp_path / "out/gsm8k.jsonl").read_bytes()
    again = regrade(tmp_path / "out/gsm8k.jsonl", "gsm8k", tmp_path / "out", name="again")
    assert (tmp_path / "out/again.jsonl").read_bytes() == first
    assert (
        set(again)
        == {"gsm8k", "again"}
        == set(json.loads((tmp_path / "out/results.json").read_text()))
    )


def test_broken_files_are_users_errors(tmp_path):
    file = tmp_path / "in.jsonl"
    for content, message in (
        ('{"gt": "1", "text": "1"}\n{"gt": "1", "te\n', r"in\.jsonl, line 2: got broken JSON"),
        ("[1]\n", r"in\.jsonl, line 1: got broken JSON \(a list"),
        ('{"text": "1"}\n', r"in\.jsonl, sample 1: got fields text, wanted gt and text"),
        ('{"gt": "1", "code": []}\n', r"in\.jsonl, sample 1"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            regrade(file, "gsm8k", tmp_path / "out")
    with pytest.raises(UserError, match="absent.jsonl"):
        regrade(tmp_path / "absent.jsonl", "gsm8k", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_file_s_verdicts_are_not_lost(tmp_path):
    for name, text in (("a", "#### 1"), ("b", "#### 2")):
        row = {"gt": "1", "text": text, "pred": ["1"], "score": [True]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    regrade(tmp_path / "a.jsonl", "gsm8k", out)
    assert regrade(tmp_path / "a.jsonl", "gsm8k", out)["gsm8k"]["published"] == 100
    with pytest.raises(
        UserError, match=r"holds the verdicts on .*a\.jsonl as gsm8k; .*--overwrite"
    ):
        regrade(tmp_path / "b.jsonl", "gsm8k", out)
    row = {"gt": "1", "text": "#### 2"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    assert regrade(tmp_path / "b.jsonl", "gsm8k", out, overwrite=True)["gsm8k"]["published"] == 0
    assert not (out / "gsm8k.differences.jsonl").exists()  # it was of the other file


def test_a_problem_keeps_its_number(tmp_path):
    """A file of a part of the problems, in another order."""
    lines = [{"idx": idx, "gt": "1", "text": f"#### {idx}"} for idx in (9, 1, 5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    regrade(tmp_path / "in.jsonl", "gsm8k", tmp_path / "out")
    done = [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").read_text().splitlines()]
    assert [(line["idx"], line["published"]) for line in done] == [
        (9, False),
        (1, True),
        (5, False),
    ]


def test_several_generations_in_a_line_are_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"gt": "1", "code": ["#### 1", "#### 2"]}\n')
    with pytest.raises(UserError, match="sample 1: got 2 generations in a line, wanted one"):
        regrade(tmp_path / "in.jsonl", "gsm8k", tmp_path / "out")


def test_a_line_with_an_empty_verdict_has_none(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"gt": "1", "text": "#### 1", "pred": [], "score": []}\n')
    assert regrade(tmp_path / "in.jsonl", "gsm8k", tmp_path / "out")["gsm8k"]["n"] == 1


def test_a_file_of_the_user_s_is_never_overwritten(tmp_path):
    """A file with the task's name that is no file of results, such as the problems themselves."""
    (tmp_path / "in.jsonl").write_text('{"gt": "1", "text": "#### 1"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "x", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl: exists, and this kit did not write it"):
        regrade(tmp_path / "in.jsonl", "data/test.jsonl", tmp_path)
    assert "question" in (tmp_path / "test.jsonl").read_text()
    entry = regrade(tmp_path / "in.jsonl", "data/test.jsonl", tmp_path / "out")["test"]
    assert (entry["task"], entry["strict"]) == ("test", 100.0)


def entry(task, published, mode):
    return {
        "task": task,
        "n": 500,
        "failed": 3,
        "settings": {"mode": mode, "model": "out/slm"},
        "published": published,
        "published_se": 2.0,
        "strict": published - 1,
        "strict_se": 2.0,
    }


def test_tables_hold_our_numbers_beside_the_paper_s():
    given = {"math": entry("math", 16.0, "cot"), "gsm8k": entry("gsm8k", 30.0, "cot")}
    screen = table(given)
    assert "16.0 ±  2.0" in screen and "29.0 ±  2.0" in screen
    assert re.search(r"mean +23\.0 +22\.0", screen)
    text = markdown(given)
    assert (
        "| model | math | gsm8k |" in text
        and "| out/slm, published | **16.0** ± 2.0 | **30.0** ± 2.0 |" in text
    )
    assert "| Rho-1-Math-1B (30B selected), as published | 15.6 | 36.2 |" in text
    assert "mode cot, model out/slm" in text and "Interpreter" not in text
    nine = {name: entry(name, 30.0 + i, "cot") for i, name in enumerate(results.COLUMNS)}
    text = markdown({**nine, "gsm_hard": entry("gsm_hard", 1.0, "cot")})
    assert " | gsm_hard | average of the nine |" in text
    assert (
        "| **1.0** ± 2.0 | **34.0** |" in text and "| 28.1 |  | 38.1 |" in text
    )  # as in the paper
    assert re.search(r"mean of 2 +23\.0", table({**given, "own": entry("own", 90.0, "cot")}))
    tool = markdown({"math": entry("math", 16.0, "tool")})
    assert (
        "| Rho-1-Math-1B-Interpreter, as published | 40.6 |" in tool and "30B selected" not in tool
    )


@pytest.mark.skipif(
    not (SHARED / "PAPER.md").exists(), reason="needs the paper's tables in shared/PAPER.md"
)
def test_paper_rows_are_the_paper_s():
    paper = (SHARED / "PAPER.md").read_text(encoding="utf-8")
    for row in results.PAPER["cot"].values():
        assert "| " + " | ".join(map(str, row)) + " |" in paper
    for gsm8k, math_ in results.PAPER["tool"].values():
        assert f" {gsm8k} / {math_}" in paper


# --------------------------------------------------------------------------------------------------
# the authors' released generations

RELEASED = [
    ("rho-math-1b-v0.1", "gsm8k", "gsm8k", 36.2, 99.5),
    ("rho-math-1b-v0.1", "minerva_math", "math", 15.8, 99.0),
    ("rho-math-1b-interpreter-v0.1", "gsm8k", "gsm8k", 58.4, 99.5),
    ("rho-math-1b-interpreter-v0.1", "minerva_math", "math", 40.2, 99.0),
]

# Answers that pass by the published rules and not strictly, each looked at: docs/evaluation.md.
REFUSED = {
    ("rho-math-1b-v0.1", "gsm8k"): {328: "0.02", 413: "2500", 951: "3"},
    ("rho-math-1b-v0.1", "math"): {474: "3"},
    ("rho-math-1b-interpreter-v0.1", "gsm8k"): {199: "75", 594: "4200"},
    ("rho-math-1b-interpreter-v0.1", "math"): {307: r"(-\infty,0)"},
}


@needs_published
@pytest.mark.parametrize("model, folder, task, _, __", RELEASED)
def test_released_answers_are_extracted(model, folder, task, _, __):
    """Extraction alone, no algebra: the very string, or an equal number, in at least 99%."""
    rows = [
        json.loads(line)
        for line in next((PUBLISHED / model / folder).glob("*.jsonl")).open(encoding="utf-8")
    ]
    same = [normalize(extract(row["code"][0])) == normalize(row["pred"][0]) for row in rows]
    assert len(rows) == {"gsm8k": 1319, "math": 500}[task] and sum(same) / len(rows) >= 0.99


@needs_published
@pytest.mark.slow
@pytest.mark.parametrize("model, folder, task, accuracy, agreement", RELEASED)
def test_released_generations_get_the_authors_verdicts(
    tmp_path, model, folder, task, accuracy, agreement
):
    file = next((PUBLISHED / model / folder).glob("*.jsonl"))
    entry = regrade(file, task, tmp_path)[task]
    print(
        f"\n{model}, {task}: published {entry['published']}, strict {entry['strict']}; "
        f"the authors' verdict in {entry['agree_score']}%, their answer in {entry['agree_pred']}%"
    )
    assert entry["published"] == pytest.approx(accuracy, abs=0.4)
    assert entry["agree_score"] >= agreement and entry["agree_pred"] >= agreement
    lines = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").open()]
    assert len(lines) == entry["n"] == {"gsm8k": 1319, "math": 500}[task]
    assert all(line["published"] or not line["strict"] for line in lines)
    refused = {line["idx"]: line["pred"] for line in lines if line["published"] > line["strict"]}
    assert refused == REFUSED[model, task]
    differences = [json.loads(line) for line in (tmp_path / f"{task}.differences.jsonl").open()]
    assert all(line["reason"] for line in differences)
    other = sum(line["published"] != line["their_score"] for line in differences)
    assert other == round(entry["n"] * (100 - entry["agree_score"]) / 100)
