"""Extraction, normalisation and verdicts against the protocol and against the Rho-1 authors' own released verdicts."""

import json
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import grading  # noqa: E402
from grading import ask, extract, grade, grade_many, judge, markdown, normalize, regrade, table  # noqa: E402
from runtime import UserError  # noqa: E402

SHARED = ROOT.parent / "shared"
PUBLISHED = SHARED / "data" / "published"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"needs the authors' released outputs: {PUBLISHED}")


@pytest.fixture(scope="module")
def slot():
    """One worker process for all comparisons of this file."""
    slot = [None]
    yield slot
    if slot[0]:
        grading.stop_worker(slot[0])


@pytest.mark.parametrize("text, answer", [
    ("The final answer is $5$. I hope it is correct. The final answer is $6$. I hope", "5"),          # the first one
    (r"so $\boxed{1}$ and then $\boxed{\frac{1}{2}}$ is it", r"\frac{1}{2}"),                           # the last one
    (r"we box $\boxed 7$ here", "7"),
    (r"\boxed{\text{never closed", r"\text{never closed"),
    ("The answer is 3.\nNo, the answer is 4.", "4"),
    ("Final Answer: The final answer is 72. I hope it is correct.", "72. I hope it is correct"),
    ("Final Answer: The final answer is $-2 + 7i.$", "$-2 + 7i$"),
    ("They paid $1,250 and got -3.5 back", "-3.5"),
    ("in total 1,234,567 of them", "1234567"),
    ("no digits at all", ""),
    ("The answer is: 12/", " 12"),
    ("The answer is 1,\n    2", "1,2"),
])
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize("text, letter", [
    ("The answer is (b)", "B"), ("The right choice is C.", "C"), ("Final Answer: The final answer is (D).", "D"),
    ("The answer is (A).\n\nProblem:\nThe answer is (E)", "A"), ("I think (B)", ""), ("Problem: The answer is (E)", ""),
])
def test_extract_choice(text, letter):
    assert extract(text, choice=True) == letter


@pytest.mark.parametrize("answer, normal", [
    (" 12.000. ", "12"), ("18.90", "18.90"), (".5", "0.5"), ("x = .5", "0.5"), (r"10,\!080", "10,080"),
    (r"\dfrac12", r"\frac{1}{2}"), (r"\tfrac1{72}", r"\frac{1}{72}"), (r"\frac{270}7", r"\frac{270}7"),
    ("-3/4", r"\frac{-3}{4}"), (r"11\sqrt2", r"11\sqrt{2}"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\{1, 2\}", "{1,2}"), (r"90^\circ", "90"), (r"76^{\circ}", "76"), (r"\$32,\!348", "32,348"), ("$36", "36"),
    (r"5.4 \text{ cents}", "5.4"), (r"\text{Evelyn}", "Evelyn"), (r"\text{ten}", "ten"), ("twenty-five", "25"),
    ("three hundred and four", "304"), ("two thousand", "2000"), ("20 \\%", "20"), ("20%", "20"), ("k = 7", "7"),
    ("ab = 7", "7"), ("abc=7", "abc=7"), ("x \\in [-2,7]", "[-2,7]"), ("40 minutes", "40"), ("3 hours", "3"),
    ("5 square feet", "5"), ("65 mph", "65"), ("hours", "hours"), ("12 apples", "12"), ("2+3j", "2+3i"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{array}{cc} 1 & 2 \end{array}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("(-infinity, 3)", r"(-\infty,3)"), (r"(-\infty, 3)", r"(-\infty,3)"), (r"\mathbf{v}", "{v}"),
    (r"864 \mbox{ inches}^2", "864^2"), ("3 and 4", "34"), ("a\nb", "ab"), ("", ""),
])
def test_normalize(answer, normal):
    assert normalize(answer) == normal


@pytest.mark.parametrize("pred, gt, published, strict", [
    ("18", "18", True, True),
    ("40,000", "40000", True, True),
    ("18.0009", "18", True, False),               # within 1e-4, but a whole number was asked for
    ("18.01", "18", False, False),
    ("3.14160", "3.14159", True, True),
    ("75", "7500", True, False),                  # percent leniency, both ways
    ("0.02", "2", True, False),
    ("1,2", "12", True, False),                   # only thousands have commas
    (r"\frac{1}{2}", "0.5", True, True),
    (r"\frac{2}{4}", r"\frac{1}{2}", True, True),
    (r"\sqrt{8}", r"2\sqrt{2}", True, True),
    (r"\sqrt{8}", r"2\sqrt{3}", False, False),
    ("1000(26)", "26000", True, True),
    ("(x+1)^2", "x^2+2x+1", True, True),
    ("b+a", "a+b", True, True),
    ("(1,2)", "(1,2)", True, True),
    (r"(0.5,2)", r"(\frac{1}{2},2)", True, True),
    ("[3,4)", "(3,4)", True, False),              # brackets of one kind for another
    (r"(-\infty,0)", r"(-\infty,0]", True, False),
    ("(1,2)", "(2,1)", False, False),
    ("(1,2,3)", "(1,2)", False, False),
    (r"\begin{pmatrix}0.5\\2\end{pmatrix}", r"\begin{pmatrix}1/2\\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}", False, False),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False),
    ("5x-7y=-4", "5x-7y+4=0", True, True),
    ("7y-5x=4", "5x-7y+4=0", True, True),         # the difference with the other sign
    ("5x-7y=4", "5x-7y+4=0", False, False),
    ("80+150=230", "230", False, False),
    ("2(x+1)", "2x+1", True, False),              # brackets dropped
    ("(C)", "C", True, True),
    ("Navin", "vaniN", False, False),             # a word, not a product of five letters
    ("52", "52_8", True, False),                  # another number base
    (r"\sqrt{19}", normalize(r"1 \pm \sqrt{19}"), True, False),  # the truth lost its sign as a unit (pm)
    ("1", "1,-2", False, False),                  # passed in the authors' run, in error
    ("", "5", False, False),
])
def test_equality(slot, pred, gt, published, strict):
    assert judge(slot, pred, gt) == (published, strict, "")


def test_choice_tasks_compare_letters():
    assert grade("mathqa", "... Therefore the answer is (b).", "B") == ("B", True, True)
    assert grade("sat", "The choice is (B)", "A") == ("B", False, False)
    assert grade("mmlu_stem", "The answer is correct", "C") == ("C", True, False)  # the harness takes the word's c
    assert grade("mmlu_stem", "I do not know", "C") == ("", False, False)


@pytest.mark.parametrize("text", [
    "", "}{", r"\boxed{", r"\boxed{\frac{\frac{", "\\", "\x00", "\ud800 1", b"\xff\xfe\x80", None, "7" * 100_000,
    r"\boxed{" + "x+" * 50_000 + "}", "{" * 100_000, "\n" * 100_000, r"\boxed{\frac{1}{0}}", r"\boxed{1e999999999}",
    r"\boxed{nan}"])
def test_any_text_gets_a_verdict(text):
    start = time.time()
    assert grade("math", text, r"\frac{3}{7}", seconds=4)[1:] == (False, False)
    assert time.time() - start < 60


def test_exploding_answers_are_cut_off_and_all_samples_accounted_for():
    nested = r"\sqrt{" * 60 + "2" + "}" * 60
    answers = ["9**9**9", r"\frac{1}{2}", "9^{9^{9}}", "1000000!!", nested, "0.5"]
    start = time.time()
    results = grade_many("math", [(rf"\boxed{{{answer}}}", "1/2") for answer in answers], workers=2, seconds=2)
    assert [result["published"] for result in results] == [False, True, False, False, False, True]
    assert results[2]["reason"].startswith(("no verdict within 2 s", "worker died", "not comparable"))
    assert time.time() - start < 180


def test_a_worker_that_dies_or_hangs_costs_one_sample():
    slot = [None]
    try:
        assert ask(slot, "x+x", "2x", False, 20) == (True, "")
        slot[0].kill()
        slot[0].wait()
        assert ask(slot, "x+x", "2x", False, 20) == (False, f"worker died (exit code {-signal.SIGKILL})")
        assert ask(slot, "x+x", "2x", False, 20) == (True, "")
        if Path("/proc/self/limits").exists():
            limits = Path(f"/proc/{slot[0].pid}/limits").read_text()
            assert int(re.search(r"Max address space +(\d+)", limits)[1]) == grading.MEMORY
        os.kill(slot[0].pid, signal.SIGSTOP)
        start = time.time()
        assert ask(slot, "x+x", "2x", False, 1) == (False, "no verdict within 1 s")
        assert time.time() - start < 30
    finally:
        if slot[0]:
            grading.stop_worker(slot[0])


# ---------------------------------------------------------------------------------------------------------------------
# files and tables

def test_regrade_own_file_gives_the_same_again(tmp_path):
    rows = [{"gt": "18", "text": "The answer is 18."}, {"gt": "7500", "text": "The answer is 75."},
            {"gt": "4", "text": "The answer is 5."}, {"gt": "4", "text": ""}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = regrade(tmp_path / "in.jsonl", "gsm8k", tmp_path / "out", settings={"mode": "cot", "model": "M"})
    entry = results["gsm8k"]
    assert (entry["n"], entry["published"], entry["strict"], entry["failed"]) == (4, 50.0, 25.0, 0)
    assert entry["published_se"] == pytest.approx(100 * statistics.pstdev([1, 1, 0, 0]) / math.sqrt(4), abs=0.01)
    lines = [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").read_text().splitlines()]
    assert [(line["idx"], line["pred"], line["gt"], line["published"], line["strict"]) for line in lines] == [
        (0, "18", "18", True, True), (1, "75", "7500", True, False), (2, "5", "4", False, False),
        (3, "", "4", False, False)]
    first = (tmp_path / "out/gsm8k.jsonl").read_bytes()
    again = regrade(tmp_path / "out/gsm8k.jsonl", "gsm8k", tmp_path / "out", name="again")
    assert (tmp_path / "out/again.jsonl").read_bytes() == first
    assert set(again) == {"gsm8k", "again"} == set(json.loads((tmp_path / "out/results.json").read_text()))


def test_broken_files_are_users_errors(tmp_path):
    file = tmp_path / "in.jsonl"
    for content, message in (('{"gt": "1", "text": "1"}\n{"gt": "1", "te\n', r"in\.jsonl, line 2: got broken JSON"),
                             ('[1]\n', r"in\.jsonl, line 1: got broken JSON \(a list"),
                             ('{"text": "1"}\n', r"in\.jsonl, sample 1: got fields text, wanted gt and text"),
                             ('{"gt": "1", "code": []}\n', r"in\.jsonl, sample 1")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            regrade(file, "gsm8k", tmp_path / "out")
    with pytest.raises(UserError, match="absent.jsonl"):
        regrade(tmp_path / "absent.jsonl", "gsm8k", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def entry(task, published, mode):
    return {"task": task, "n": 500, "failed": 3, "settings": {"mode": mode, "model": "out/slm"},
            "published": published, "published_se": 2.0, "strict": published - 1, "strict_se": 2.0}


def test_tables_hold_our_numbers_beside_the_paper_s():
    results = {"math": entry("math", 16.0, "cot"), "gsm8k": entry("gsm8k", 30.0, "cot")}
    screen = table(results)
    assert "16.0 ±  2.0" in screen and "29.0 ±  2.0" in screen
    assert re.search(r"mean +23\.0 +22\.0", screen)
    text = markdown(results, label="ours")
    assert "| model | math | gsm8k |" in text and "| ours, published | **16.0** ± 2.0 | **30.0** ± 2.0 |" in text
    assert "| Rho-1-Math-1B (30B selected), as published | 15.6 | 36.2 |" in text
    assert "mode cot, model out/slm" in text and "Interpreter" not in text
    tool = markdown({"math": entry("math", 16.0, "tool")})
    assert "| Rho-1-Math-1B-Interpreter, as published | 40.6 |" in tool and "30B selected" not in tool


@pytest.mark.skipif(not (SHARED / "PAPER.md").exists(), reason="needs the paper's tables in shared/PAPER.md")
def test_paper_rows_are_the_paper_s():
    paper = (SHARED / "PAPER.md").read_text(encoding="utf-8")
    for row in grading.PAPER["cot"].values():
        assert "| " + " | ".join(map(str, row)) + " |" in paper
    for gsm8k, math_ in grading.PAPER["tool"].values():
        assert f" {gsm8k} / {math_}" in paper


# ---------------------------------------------------------------------------------------------------------------------
# the authors' released generations

RELEASED = [("rho-math-1b-v0.1", "gsm8k", "gsm8k", 36.2, 99.5),
            ("rho-math-1b-v0.1", "minerva_math", "math", 15.8, 99.0),
            ("rho-math-1b-interpreter-v0.1", "gsm8k", "gsm8k", 58.4, 99.5),
            ("rho-math-1b-interpreter-v0.1", "minerva_math", "math", 40.2, 99.0)]


@needs_published
@pytest.mark.parametrize("model, folder, task, _, __", RELEASED)
def test_released_answers_are_extracted(model, folder, task, _, __):
    """Extraction alone, all samples, no algebra: the very string, or an equal number, in at least 99%."""
    rows = [json.loads(line) for line in next((PUBLISHED / model / folder).glob("*.jsonl")).open(encoding="utf-8")]
    same = [normalize(extract(row["code"][0])) == normalize(row["pred"][0]) for row in rows]
    assert len(rows) == {"gsm8k": 1319, "math": 500}[task] and sum(same) / len(rows) >= 0.99


@needs_published
@pytest.mark.slow
@pytest.mark.parametrize("model, folder, task, accuracy, agreement", RELEASED)
def test_released_generations_get_the_authors_verdicts(tmp_path, model, folder, task, accuracy, agreement):
    file = next((PUBLISHED / model / folder).glob("*.jsonl"))
    entry = regrade(file, task, tmp_path)[task]
    assert entry["published"] == pytest.approx(accuracy, abs=0.4)
    assert entry["agree_score"] >= agreement and entry["agree_pred"] >= agreement
    lines = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").open()]
    assert len(lines) == entry["n"] == {"gsm8k": 1319, "math": 500}[task]
    assert all(line["published"] or not line["strict"] for line in lines)
    differences = [json.loads(line) for line in (tmp_path / f"{task}.differences.jsonl").open()]
    assert all(line["reason"] for line in differences)
    other = sum(line["published"] != line["their_score"] for line in differences)
    assert other == round(entry["n"] * (100 - entry["agree_score"]) / 100)
