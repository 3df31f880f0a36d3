"""The demo's text: it never changes, its splits share no problem, its labels reach no training."""

import hashlib
import random

import numpy as np

import train_slm
from conftest import write_model, write_set
from demo import corpus
from hf import checkpoint


def test_the_text_is_the_same_to_the_byte():
    """All the results of README and docs stand on this text."""
    pages = hashlib.sha256()
    for name in corpus.PAGES:
        for seed in (0, 7):
            for i in range(300):
                pages.update(repr(corpus.page(name, seed, i)).encode())
    assert pages.hexdigest() == "9b7c9f092c016841fa10e440928c5ded86d168638b03de5f67cf68c93e836861"

    tests = hashlib.sha256(repr(corpus.test_problems()).encode())
    assert tests.hexdigest() == "d5a74b221b712915d702c8bc5c5420e89ada7714f3b5134ec46b8de5be72bb88"


def test_no_problem_is_in_two_splits():
    train, val, test = (
        {key for template in corpus.keys(split) for key in template}
        for split in ("train", "val", "test")
    )
    assert not train & val
    assert not train & test
    assert not val & test

    problems = {tuple(problem["key"]) for problem in corpus.test_problems(1000)}
    assert len(problems) == 1000
    assert problems <= test


def test_only_the_digits_that_differ_are_labelled_wrong():
    spans = corpus.wrong_number(28, 25, corpus.SOLUTION)
    assert spans == [("2", corpus.SOLUTION), ("5", corpus.WRONG_DIGITS)]
    assert corpus.wrong_number(28, 31, corpus.SOLUTION) == [("31", corpus.WRONG_DIGITS)]
    assert corpus.wrong_number(2, 28, corpus.SOLUTION) == [("28", corpus.WRONG_DIGITS)]
    spans = corpus.wrong_number(123, 12, corpus.SOLUTION)
    assert spans == [("1", corpus.SOLUTION), ("2", corpus.WRONG_DIGITS)]


def test_after_a_misprint_the_steps_follow_from_what_is_written():
    rng = random.Random(0)
    for _ in range(200):
        key = rng.choice(rng.choice(corpus.keys("train")))
        text = "".join(span for span, _ in corpus.solution(rng, key, wrong=True))
        step1, step2, answer, _ = text.split("\n")
        written = step1.split("=")[1]
        assert step2.startswith((f" {written}+", f" {written}-"))
        assert answer.startswith(" #### ")
        assert text != "".join(span for span, _ in corpus.solution(rng, key, wrong=False))


def test_labels_do_not_reach_training(stage, vocabulary, tmp_path):
    """The same run with labels and without them ends in the same weights."""
    write_model(tmp_path / "m", vocabulary)
    write_set(tmp_path / "with", vocabulary, 600, kind=np.arange(600) % 2)
    write_set(tmp_path / "without", vocabulary, 600)
    hashes = []
    for name in ("with", "without"):
        code, _, err = stage(
            train_slm,
            f"--k 0.5 --score loss --data {name} --init m --steps 3 --seq-len 16 --batch-size 2 "
            f"--device cpu --out o-{name}",
        )
        assert code == 0, err
        hashes.append(checkpoint.model_hash(tmp_path / f"o-{name}"))
    assert hashes[0] == hashes[1]
