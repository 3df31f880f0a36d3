"""The strict verdict on a list of pairs that were judged by hand, and on hostile answers."""

import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from evaluation import answers  # noqa: E402
from evaluation.grading import choice_verdict, own_verdict, verdict  # noqa: E402
from evaluation.reading import Reading, read, split_answers, tidy  # noqa: E402
from evaluation.reasoning import program_of, result_text  # noqa: E402
from evaluation.sandbox import Result  # noqa: E402
from evaluation.strict import quick  # noqa: E402
from evaluation.tasks import Example  # noqa: E402
from evaluation.worker import Worker  # noqa: E402

# --------------------------------------------------------------------------------------------------
# the list


def read_list():
    """{heading: [(given as, answer, truth, verdict, why)]} of the hand-made list."""
    groups = {}
    before = ""
    for line in (Path(__file__).parent / "adversarial.tsv").read_text("utf-8").splitlines():
        if line.startswith("# ") and not before:
            groups[line[2:]] = []
        elif line and not line.startswith("#"):
            groups[list(groups)[-1]].append(tuple(line.split("\t")))
        before = line
    return {heading: pairs for heading, pairs in groups.items() if pairs}


PAIRS = read_list()


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def as_a_model_says_it(given, answer):
    """(task, text)"""
    task, _, prose = given.partition(" ")
    task = "own.jsonl" if task == "own" else task
    if prose:
        return task, answer.replace("\\n", "\n")
    if task == "math":
        return task, rf"\boxed{{{answer}}}"
    return task, f"The answer is {answer}."


def test_the_list_bounds_strictness_on_both_sides():
    pairs = [pair for pairs in PAIRS.values() for pair in pairs]
    assert len(pairs) == len(set(pairs)) >= 600
    assert len({pair[:3] for pair in pairs}) == len(pairs), "a pair with two verdicts"
    count = Counter(verdict for *_, verdict, _ in pairs)
    assert set(count) == {"right", "wrong", "missed"}
    assert min(count["right"], count["wrong"]) > len(pairs) / 3 > 30 > count["missed"]


@pytest.mark.parametrize("heading", PAIRS)
def test_verdicts_by_hand(worker, heading):
    """Nothing wrong passes, nothing right is lost, and what is missed is missed."""
    others = []
    for given, answer, truth, by_hand, why in PAIRS[heading]:
        found = verdict(worker, *as_a_model_says_it(given, answer), truth, seconds=30)
        assert found["published"] or not found["strict"], "strict is laxer than published"
        if found["strict"] != (by_hand == "right"):
            others.append(f"{answer} for {truth}: {by_hand} ({why}), strict {found['strict']}")
    assert not others, "\n".join(others)


def test_the_truth_counts_as_it_was_written():
    """A test set's truth loses its unit on the way to `gt`; the strict verdict sees it still."""
    example = Example(0, "", "", truth_raw="2 km", gt="2", raw={})
    for answer, right in (("2 km", True), ("2", True), ("2 cm", False)):
        text = f"The answer is {answer}."
        assert verdict(None, "gsm8k", text, example.gt)["strict"]
        found = verdict(None, "gsm8k", text, example.gt, truth=example.truth_raw)
        assert (found["published"], found["strict"], found["truth"]) == (True, right, "2 km")


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize(
    "text, name, body, unit, remark",
    [
        (r"x = 12\text{ cm}^2", "x", "12", ("cm^2",), ""),
        ("12 square cm", "", "12", ("cm^2",), ""),
        ("60 miles per hour", "", "60", ("mile", "hour"), ""),
        ("60 mph", "", "60", ("mile", "hour"), ""),
        ("10% loss", "", "10", ("%",), "loss"),
        (r"\$5", "", "5", ("dollar",), ""),
        ("-$5", "", "-5", ("dollar",), ""),
        (r"90^{\circ}", "", "90", ("degree",), ""),
        ("7:30 p.m.", "", "7:30", ("pm",), ""),
        ("2s + t", "", "2s + t", (), ""),
        ("s + 4 m", "", "s + 4 m", (), ""),
        ("5 million", "", "5 million", (), ""),
        ("f(x)=2x", "f(x)", "2x", (), ""),
        ("80+150=230", "", "80+150=230", (), ""),
    ],
)
def test_read(text, name, body, unit, remark):
    assert read(tidy(text)) == Reading(tidy(text), name, body, unit, remark)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("3 and 4", ["3", "4"]),
        ("1, 2, and 3", ["1", "2", "3"]),
        ("1,250", ["1250"]),
        ("1, 250", ["1", "250"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        (r"\{1,2\}", [r"\{1,2\}"]),
        ("two hundred and five", ["two hundred and five"]),
    ],
)
def test_split_answers(text, parts):
    assert split_answers(text) == parts


# --------------------------------------------------------------------------------------------------
# hostile answers

PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} , . ; : and or = \pm \cup \begin{pmatrix} \end{pmatrix} & \\ "
    r"1 2 12 0 000 x y a s m cm % $ ^ _ - + / * ' \circ two hundred million 1e5 e400 \text{ \left "
    "\\ | ! ° ² ٣ € square per am x= \\log_ #### answer choice is ( a) \ud800 \0"
).split(" ") + [" ", "\n", "  "]


def grade_in_this_process(text, truth):
    """All that happens to a text outside the worker, whose process may die of it."""
    quick(answers.as_written(text), truth)
    quick(truth, text)
    quick(text, text)
    choice_verdict(text, "A")
    own_verdict(text, truth)
    answers.normalize(answers.extract(text))
    answers.end_of_hashes(text, len(text))
    result_text(Result("ok", text, "", 0))
    program_of(text)


def test_no_mixture_of_pieces_raises():
    rng = random.Random(0)
    for _ in range(600):
        text = "".join(rng.choices(PIECES, k=rng.choice([1, 2, 3, 5, 8, 12, 40, 200])))
        truth = "".join(rng.choices(PIECES, k=rng.choice([1, 2, 3, 5, 8])))
        grade_in_this_process(text, rng.choice([truth, text[: len(text) // 2]]))


@pytest.mark.parametrize(
    "unit",
    "# $ { } ( ) [ \\ , . 1 - _ ^ = ' % ° ` boxed{ \\frac{ \\sqrt{ \\text{ \\begin{pmatrix} 1, 1. "
    "#### x= ** ```python\n ```output\n".split(" ")
    + [" ", "\n", "#### ", "a b ", "two ", "answer is a ", "answer is (", "final answer is $"],
)
def test_time_grows_with_the_length(unit):
    """32 times the length takes about 32 times as long; a quadratic pattern takes 1,024 times.

    Processor time, the better of two runs. The bound is ten times the linear growth.
    """

    def seconds(n):
        text = (unit * n)[:n]
        runs = []
        for _ in range(2):
            before = time.process_time()
            for end in ("", "\n"):
                grade_in_this_process(text + end, "5")
            runs.append(time.process_time() - before)
        return min(runs)

    assert seconds(16_000) < 320 * max(seconds(500), 1e-3)


def check_verdicts(worker, answer):
    """Wrong beside a plain truth, wrong for it, and right beside itself."""
    assert not verdict(worker, "math", rf"\boxed{{{answer}}}", "5", seconds=1)["strict"]
    assert not verdict(worker, "math", r"\boxed{5}", answer, seconds=1)["strict"]
    found = verdict(worker, "gsm8k", f"The answer is {answer}", answer, seconds=1)
    assert found["published"] and found["strict"]


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        "1e400000000",
        "7" * 5_000,
        "7" * 900,
        "(" * 100_000,
        "{" * 100_000,
        "1,2," * 240 + "1",
        "one hundred" + " hundred" * 110,
    ],
)
def test_hostile_answers_get_a_verdict(worker, answer):
    check_verdicts(worker, answer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9}}",
        r"10^{10^{10}}",
        r"\frac{1}{10^{999999}}",
        r"\sqrt{" * 100 + "2" + "}" * 100,
        r"\frac{" * 140,
        "(" * 499 + "1" + ")" * 499,
        "(1," * 240 + "1" + ")" * 240,
        "1" + "!" * 50,
    ],
)
def test_exploding_answers_get_a_verdict(worker, answer):
    """Each of them takes or kills a worker process."""
    check_verdicts(worker, answer)


def test_a_truth_that_python_does_not_print():
    """An int of more than 4,300 digits has no str()."""
    assert not verdict(None, "gsm8k", "The answer is 5", 10**5_000)["strict"]
