"""Extraction, normalisation and verdicts against the protocol, and what a hostile answer may do."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from evaluation import worker as worker_file  # noqa: E402
from evaluation.answers import after_hashes, end_of_hashes, extract, normalize  # noqa: E402
from evaluation.grading import grade, grade_many, judge, verdict  # noqa: E402
from evaluation.worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def worker():
    """One process for all comparisons of this file."""
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize(
    "text, answer",
    [
        (
            "The final answer is $5$. I hope it is correct. The final answer is $6$. I hope",
            "5",
        ),  # the first one
        (r"so $\boxed{1}$ and then $\boxed{\frac{1}{2}}$ is it", r"\frac{1}{2}"),  # the last one
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
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is (b)", "B"),
        ("The right choice is C.", "C"),
        ("Final Answer: The final answer is (D).", "D"),
        ("The answer is (A).\n\nProblem:\nThe answer is (E)", "A"),
        ("I think (B)", ""),
        ("Problem: The answer is (E)", ""),
    ],
)
def test_extract_choice(text, letter):
    assert extract(text, choice=True) == letter


@pytest.mark.parametrize(
    "answer, normal",
    [
        (" 12.000. ", "12"),
        ("18.90", "18.90"),
        (".5", "0.5"),
        ("x = .5", "0.5"),
        (r"10,\!080", "10,080"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac1{72}", r"\frac{1}{72}"),
        (r"\frac{270}7", r"\frac{270}7"),
        ("-3/4", r"\frac{-3}{4}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\{1, 2\}", "{1,2}"),
        (r"90^\circ", "90"),
        (r"76^{\circ}", "76"),
        (r"\$32,\!348", "32,348"),
        ("$36", "36"),
        (r"5.4 \text{ cents}", "5.4"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{ten}", "ten"),
        ("twenty-five", "25"),
        ("three hundred and four", "304"),
        ("two thousand", "2000"),
        ("20 \\%", "20"),
        ("20%", "20"),
        ("k = 7", "7"),
        ("ab = 7", "7"),
        ("abc=7", "abc=7"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("40 minutes", "40"),
        ("3 hours", "3"),
        ("5 square feet", "5"),
        ("65 mph", "65"),
        ("hours", "hours"),
        ("12 apples", "12"),
        ("2+3j", "2+3i"),
        (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{array}{cc} 1 & 2 \end{array}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        ("(-infinity, 3)", r"(-\infty,3)"),
        (r"(-\infty, 3)", r"(-\infty,3)"),
        (r"\mathbf{v}", "{v}"),
        (r"864 \mbox{ inches}^2", "864^2"),
        ("3 and 4", "34"),
        ("a\nb", "ab"),
        ("", ""),
    ],
)
def test_normalize(answer, normal):
    assert normalize(answer) == normal


@pytest.mark.parametrize(
    "pred, gt, published, strict",
    [
        ("18", "18", True, True),
        ("40,000", "40000", True, True),
        ("18.0009", "18", True, False),  # within 1e-4, but a whole number was asked for
        ("18.01", "18", False, False),
        ("3.14160", "3.14159", True, True),
        ("75", "7500", True, False),  # percent leniency, both ways
        ("0.02", "2", True, False),
        ("1,2", "12", True, False),  # only thousands have commas
        (r"\frac{1}{2}", "0.5", True, True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True, True),
        (r"\sqrt{8}", r"2\sqrt{2}", True, True),
        (r"\sqrt{8}", r"2\sqrt{3}", False, False),
        ("1000(26)", "26000", True, True),
        ("(x+1)^2", "x^2+2x+1", True, True),
        ("b+a", "a+b", True, True),
        ("(1,2)", "(1,2)", True, True),
        (r"(0.5,2)", r"(\frac{1}{2},2)", True, True),
        ("[3,4)", "(3,4)", True, False),  # brackets of one kind for another
        (r"(-\infty,0)", r"(-\infty,0]", True, False),
        ("(1,2)", "(2,1)", False, False),
        ("(1,2,3)", "(1,2)", False, False),
        (r"\begin{pmatrix}0.5\\2\end{pmatrix}", r"\begin{pmatrix}1/2\\2\end{pmatrix}", True, True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}", False, False),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False),
        ("5x-7y=-4", "5x-7y+4=0", True, True),
        ("7y-5x=4", "5x-7y+4=0", True, True),  # the difference with the other sign
        ("5x-7y=4", "5x-7y+4=0", False, False),
        ("80+150=230", "230", False, False),
        ("2(x+1)", "2x+1", True, False),  # brackets dropped
        ("(C)", "C", True, True),
        ("Navin", "vaniN", False, False),  # a word, not a product of five letters
        ("52", "52_8", True, False),  # another number base
        (
            r"\sqrt{19}",
            normalize(r"1 \pm \sqrt{19}"),
            True,
            False,
        ),  # the truth lost its sign as a unit (pm)
        ("1", "1,-2", False, False),  # passed in the authors' run, in error
        ("", "5", False, False),
    ],
)
def test_equality(worker, pred, gt, published, strict):
    assert judge(worker, pred, gt) == (published, strict, "")


def test_choice_tasks_compare_letters():
    assert grade("mathqa", "... Therefore the answer is (b).", "B") == ("B", True, True)
    assert grade("sat", "The choice is (B)", "A") == ("B", False, False)
    assert grade("mmlu_stem", "The answer is correct", "C") == (
        "C",
        True,
        False,
    )  # the harness takes the word's c
    assert grade("mmlu_stem", "I do not know", "C") == ("", False, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "}{",
        r"\boxed{",
        r"\boxed{\frac{\frac{",
        "\\",
        "\x00",
        "\ud800 1",
        b"\xff\xfe\x80",
        None,
        "7" * 100_000,
        r"\boxed{" + "x+" * 50_000 + "}",
        "{" * 100_000,
        "\n" * 100_000,
        r"\boxed{\frac{1}{0}}",
        r"\boxed{1e999999999}",
        r"\boxed{nan}",
    ],
)
def test_any_text_gets_a_verdict(text):
    assert grade("math", text, r"\frac{3}{7}", seconds=4)[1:] == (False, False)


@pytest.mark.slow
def test_exploding_answers_are_cut_off_and_all_samples_accounted_for():
    nested = r"\sqrt{" * 60 + "2" + "}" * 60
    answers = ["9**9**9", r"\frac{1}{2}", "9^{9^{9}}", "1000000!!", nested, "0.5"]
    results = grade_many(
        "math", [(rf"\boxed{{{answer}}}", "1/2") for answer in answers], workers=2, seconds=0.5
    )
    assert [result["published"] for result in results] == [False, True, False, False, False, True]
    assert results[2]["reason"].startswith(
        ("no verdict within 0.5 s", "worker died", "not comparable")
    )


def test_a_worker_that_dies_or_hangs_costs_one_sample():
    with Worker() as worker:
        assert worker.compare("x+x", "2x", seconds=20) == (True, "")
        worker.process.kill()
        worker.process.wait()
        died = f"worker died (exit code {-signal.SIGKILL})"
        assert worker.compare("x+x", "2x", seconds=20) == (False, died)
        assert worker.compare("x+x", "2x", seconds=20) == (True, "")
        if Path("/proc/self/limits").exists():
            limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
            memory = int(re.search(r"Max address space +(\d+)", limits)[1])
            assert memory == worker_file.MEMORY
        os.kill(worker.process.pid, signal.SIGSTOP)
        assert worker.compare("x+x", "2x", seconds=0.02) == (False, "no verdict within 0.02 s")


@pytest.mark.parametrize(
    "text, pred, cut",
    [
        (" 3+4=7\n #### 7\nQ: Tom", "7", 15),
        ("#### -12 apples\n9", "-12", 16),
        ("#### 7", "7", None),
        ("#### 1,250\n", "1250", 11),
        ("#### 2.50.\n", "2.50", 11),
        ("####\n7\n", "", 5),
        ("7\n7\n", "", None),
        ("", "", None),
        ("#### x\n#### 5\n", "", 7),
    ],
)
def test_the_answer_behind_hashes(text, pred, cut):
    """Of a file of one's own: where its text ends as its letters come, and what it answers."""
    cuts = [end_of_hashes(text[:n], 1) for n in range(1, len(text) + 1)]
    assert next((at for at in cuts if at is not None), None) == cut
    assert after_hashes(text[:cut]) == pred
    for gt in ("7", 7, "1,250"):
        found = verdict(None, "own.jsonl", text[:cut], gt)
        right = pred != "" and pred == str(gt).replace(",", "")
        assert (found["pred"], found["published"], found["strict"]) == (pred, right, right)
        assert found["reason"] == ("" if pred else "no answer found")
