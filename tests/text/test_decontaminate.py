"""Planted problems are found however they are written, clean documents are left alone."""

import json
import random
import re
import time
import unicodedata

import pytest

import prepare
from common.errors import UserError
from conftest import SHARED
from data import TokenSet
from evaluation import tasks
from text.decontaminate import Decontaminator, words_of
from tools import decontaminate

WORDS = [
    a + b
    for a in "ba ke li mo nu pra qui sto tra wex".split()
    for b in "ma den fil gor hup jas tin vor".split()
]


def sentence(rng, n):
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "?"


def disguised(text, rng):
    """Other case, spacing and punctuation."""
    out = []
    for word in text.rstrip("?").split(" "):
        word = rng.choice([word.upper(), word.lower(), word.title(), f"**{word}**"])
        out.append(word + rng.choice([" ", "  ", "\n", ", ", " - ", "\t", "... "]))
    return "".join(out)


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(0)
    return [("a", i, sentence(rng, 8 + i % 40)) for i in range(1000)]


def plain_words(text):
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def brute_force(problems, text):
    """The definition, word by word."""
    words = " " + " ".join(plain_words(text)) + " "
    found = set()
    for task, number, question in problems:
        q = plain_words(question)
        runs = [q[i : i + 13] for i in range(max(1, len(q) - 12))]
        if any(f" {' '.join(run)} " in words for run in runs):
            found.add((task, number))
    return found


def test_words_are_runs_of_letters_and_digits_of_any_script():
    rng = random.Random(4)
    alphabet = "aB9_ .,-\n\t\x0b\x1c\x85\xa0«é߃ﬁ①²Ωж中\u0301\u200b\u2028–“”＿Ａİ𝐱😀١अ्"
    for text in [
        "",
        "x_1 ²",
        "Straße—STRASSE",
        *("".join(rng.choices(alphabet, k=30)) for _ in range(3000)),
    ]:
        assert [word.decode() for word in words_of(text)] == plain_words(text), ascii(text)


def test_every_planted_problem_is_found_and_nothing_else(problems):
    check, rng = Decontaminator(problems), random.Random(1)
    assert check.checked == {"a": 1000} and not check.uncheckable
    for problem in problems:
        before, after = sentence(rng, rng.randint(0, 60)), sentence(rng, rng.randint(0, 60))
        text = before + " " + disguised(problem[2], rng) + after
        assert check.problems_in(text) == {problem[:2]}
        assert not check.problems_in(before) and not check.problems_in(after)


def test_partial_copies_are_judged_as_by_brute_force(problems):
    check, rng = Decontaminator(problems), random.Random(2)
    judged = []
    for _, _, question in problems[::20]:
        words = question.rstrip("?").split()
        start, length = (
            rng.randint(0, 3),
            rng.randint(6, 16),
        )  # a piece of the problem, perhaps too short
        text = " ".join([sentence(rng, 9), *words[start : start + length], sentence(rng, 9)])
        assert check.problems_in(text) == brute_force(problems, text)
        judged.append(bool(check.problems_in(text)))
    assert 5 < sum(judged) < 45


def test_short_problems_are_reported_as_uncheckable():
    check = Decontaminator(
        [
            ("a", 0, "What is two plus two?"),
            ("a", 1, "one two three four five six seven eight"),
            ("b", 0, "seven $ _ $ words: are not; enough for this!"),
        ]
    )
    assert check.uncheckable == {"a": 1, "b": 1} and check.checked == {"a": 1}
    assert not check.problems_in("What is two plus two?") and check.problems_in(
        "ONE two three, four five six seven-eight"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_leaves_out_what_is_contaminated(
    problems, vocabulary, tmp_path, capsys, monkeypatch, workers
):
    planted = problems[:20]
    monkeypatch.setattr(
        tasks,
        "load",
        lambda name, data_dir, answers: [
            tasks.Example(i, text, "", "", "", {}) for _, i, text in planted
        ],
    )
    rng, texts = random.Random(3), []
    for i in range(200):
        texts.append(
            sentence(rng, 50) + (disguised(planted[i // 10][2], rng) if i % 10 == 0 else "")
        )
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    vocabulary.save(tmp_path / "v")
    flags = ["--source", str(path), "--tokenizer", str(tmp_path / "v"), "--workers", str(workers)]
    prepare.main([*flags, "--decontaminate", "gsm8k", "--out", str(tmp_path / "clean")])
    assert "20 contaminated ones" in capsys.readouterr().out
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps({"text": t}) + "\n" for i, t in enumerate(texts) if i % 10))
    prepare.main([*flags[:1], str(clean), *flags[2:], "--out", str(tmp_path / "wanted")])
    assert TokenSet(tmp_path / "clean").hash == TokenSet(tmp_path / "wanted").hash
    decontaminate.main(
        [
            "--source",
            str(path),
            "--tasks",
            "gsm8k",
            "--out",
            str(tmp_path / "out.jsonl"),
            "--report",
            str(tmp_path / "report.json"),
        ]
    )
    assert (tmp_path / "out.jsonl").read_text() == clean.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["documents"], report["contaminated"], report["problems_found"]) == (
        200,
        20,
        {"gsm8k": 20},
    )
    with pytest.raises(UserError, match="decontaminate was .*, is now null"):
        prepare.main([*flags, "--out", str(tmp_path / "clean")])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real test sets in ../shared/data")
def test_gsm8k_train_against_its_test_split_and_latex_against_all(capsys):
    """Real text: what is found stays what it was, and it is rare; the test split finds itself."""
    check = prepare.decontaminator_of(
        ["gsm8k", "math", "svamp", "asdiv", "mawps", "mathqa", "sat"], SHARED
    )

    def rows(path):
        return [json.loads(line) for line in open(SHARED / path)]

    test = [row["question"] for row in rows("eval/gsm8k.jsonl")]
    short = [len(words_of(q)) < 8 for q in test]
    found = [("gsm8k", i) in check.problems_in(q) for i, q in enumerate(test)]
    assert all(f or s for f, s in zip(found, short))
    gsm8k = Decontaminator([("gsm8k", i, q) for i, q in enumerate(test)])
    train = [
        gsm8k.problems_in(row["question"] + "\n" + row["answer"])
        for row in rows("corpus/gsm8k_train.jsonl")
    ]
    latex = [row["text"] for row in rows("corpus/stacks_project.jsonl")]
    started = time.process_time()
    hits = sum(bool(check.problems_in(text)) for text in latex)
    seconds = time.process_time() - started
    print(
        f"GSM8K train: {sum(map(bool, train))} of {len(train)} documents, "
        f"{len(set().union(*train))} of {len(test)} test problems; LaTeX: {hits} of {len(latex)}, "
        f"{sum(map(len, latex)) / seconds / 1e6:.1f} MB/s"
    )
    assert hits <= len(latex) / 1000 and sum(map(bool, train)) < len(train) / 50
