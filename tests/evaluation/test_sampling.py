"""Several samples of each problem: draws against the softmax, pass@k and maj@k by brute force."""

import itertools
import json
import random

import pytest
import torch
from test_eval_math import rows, write_problems
from test_generate import Numbers

import eval_math as E
from conftest import write_model
from evaluation import generate as G
from evaluation import reasoning, sampling
from evaluation.results import summarize
from evaluation.supervise import Result
from killed import killed
from model import Config, Transformer, initialise

# --------------------------------------------------------------------------------------------------
# draws


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_ids_are_drawn_by_the_softmax(temperature):
    """Numbers that are spread evenly over [0, 1) give each id its share of them."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, 7] = -torch.inf
    n = 20_000
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids = sampling.draw(logits.expand(n, -1), temperature, numbers)
    counts = torch.bincount(ids, minlength=40)
    shares = torch.softmax(logits[0].double() / temperature, 0)
    assert (counts - n * shares).abs().max() <= 1
    assert counts[7] == 0


def test_the_outermost_numbers_draw_ids_that_may_come():
    logits = torch.tensor([[-1e4, 0.0, 0.0, -1e4]])
    largest = 1 - 2.0**-32
    for number, wanted in ((0.0, 1), (largest, 2)):
        drawn = sampling.draw(logits, 1.0, torch.tensor([number], dtype=torch.float64))
        assert drawn.tolist() == [wanted]


def test_each_token_has_a_number_of_its_own():
    keys = itertools.product((0, 1), itertools.product(range(8), range(8)), range(50))
    numbers = [sampling.chance(*key) for key in keys]
    assert len(set(numbers)) > len(numbers) - 3
    assert min(numbers) >= 0 and max(numbers) < 1
    for tenth in range(10):
        share = sum(tenth / 10 <= x < (tenth + 1) / 10 for x in numbers) / len(numbers)
        assert abs(share - 0.1) < 0.02
    # what earlier results were made with
    assert sampling.chance(0, (3, 1), 20) == 0.36983233503997326


@pytest.fixture(scope="module")
def small():
    config = Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=[5, 17],
    )
    rng = random.Random(0)
    shared = [rng.randrange(20, 60) for _ in range(20)]
    prompts = {
        (i, sample): shared + [i + 20, *range(21, 21 + i)] for i in range(6) for sample in range(3)
    }
    return initialise(Transformer(config), 3), prompts


def sampled(model, prompts, prefix=(), seed=0, **options):
    decoder = G.Decoder(model, Numbers(), 40, prefix=prefix, temperature=1.0, seed=seed, **options)
    return {key: reply.text for key, reply in reasoning.chain_of_thought(decoder, prompts)}


def test_a_sample_does_not_depend_on_what_is_decoded_beside_it(small):
    """In a full batch, in a small one whose rows are put back, in another order, or alone."""
    model, prompts = small
    wanted = sampled(model, prompts, batch_tokens=20_000)
    assert len(set(wanted.values())) > 12
    backwards = dict(reversed(prompts.items()))
    prefix = prompts[0, 0][:20]
    assert sampled(model, backwards, batch_tokens=300) == wanted
    assert sampled(model, prompts, prefix, batch_tokens=300) == wanted
    for key in ((0, 0), (4, 2)):
        assert sampled(model, {key: prompts[key]}) == {key: wanted[key]}
    assert sampled(model, prompts, seed=1) != wanted


# --------------------------------------------------------------------------------------------------
# what is counted


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_choices(n):
    for right in itertools.product([False, True], repeat=n):
        for k in range(1, n + 1):
            chosen = list(itertools.combinations(right, k))
            assert sampling.pass_at(k, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_maj_at_k_has_no_bias():
    """Over all orders of the samples its mean is that of the vote of all ordered choices of k."""
    answers = ["7", "7", "", "8", "9"]
    right = [True, True, False, False, False]
    for k in (1, 2, 3, 5):
        orders = list(itertools.permutations(range(5)))
        means = [
            sampling.maj_at(k, [answers[i] for i in order], [right[i] for i in order])
            for order in orders
        ]
        votes = []
        for chosen in itertools.permutations(range(5), k):
            given = [answers[i] for i in chosen if answers[i]]
            most = max((given.count(answer) for answer in given), default=0)
            winner = next((answer for answer in given if given.count(answer) == most), None)
            votes.append(winner == "7")
        assert sum(means) / len(means) == pytest.approx(sum(votes) / len(votes))


def test_votes():
    assert sampling.vote(["8", "7", "", "7"]) == 1
    assert sampling.vote(["8", "7", "7", "8"]) == 0  # equally often: the first
    assert sampling.vote(["", "", "7"]) == 2  # no answer is no vote
    assert sampling.vote(["", ""]) is None
    assert sampling.sizes(1) == [1] and sampling.sizes(6) == [1, 2, 4, 6]
    assert sampling.sizes(8) == [1, 2, 4, 8]


def verdict(pred, right):
    return {"pred": pred, "published": right, "strict": False, "reason": ""}


def test_summary_by_hand():
    """Two problems of two samples: right twice, and right once in two answers."""
    verdicts = [verdict("7", True), verdict("7", True), verdict("1", False), verdict("2", True)]
    found = summarize(verdicts, samples=2)
    assert (found["n"], found["samples"], found["published"]) == (2, 2, 75.0)
    assert found["published_se"] == round(100 * (0.25**2 / 2) ** 0.5, 2)
    assert found["pass"]["1"]["published"] == found["maj"]["1"]["published"] == 75.0
    assert found["pass"]["2"]["published"] == 100.0
    assert found["maj"]["2"]["published"] == 50.0  # "1" came first
    assert found["strict"] == found["pass"]["2"]["strict"] == 0.0


# --------------------------------------------------------------------------------------------------
# the stage


@pytest.mark.slow
def test_samples_are_resumed_added_to_and_graded_again(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"] * 5)
    arguments = "--model run --temperature 1 --max-new-tokens 12 --device cpu"
    command = f"{arguments} --samples 4 --batch-tokens 600 --out killed"
    killed("call:evaluation.grading:Grader.add:8", f"eval_math.py {command}", tmp_path)
    assert stage(E, command)[0] == 0
    code, out, err = stage(E, f"{arguments} --samples 4 --out whole")
    assert code == 0 and "maj@4" in out and "pass@2" in out, err
    done = rows(tmp_path / "whole/test-t1.jsonl")
    assert [(row["idx"], row["sample"]) for row in done] == [
        (i, sample) for i in range(5) for sample in range(4)
    ]
    assert rows(tmp_path / "killed/test-t1.jsonl") == done
    texts = [row["text"] for row in done]
    assert len(set(texts)) > 15

    # two samples first, then two more: the first two are kept
    assert stage(E, f"{arguments} --samples 2 --out grown")[0] == 0
    assert stage(E, f"{arguments} --samples 4 --out grown")[0] == 0
    assert rows(tmp_path / "grown/test-t1.jsonl") == done
    code, _, err = stage(E, f"{arguments} --samples 3 --out grown")
    assert code == 2 and "--samples: got 3, grown has up to 4 of each problem of test-t1" in err

    # graded again, they must not take the place of a model's answers
    regrade = "--regrade whole/test-t1.jsonl --tasks data/demo/test.jsonl --temperature 1"
    code, _, err = stage(E, f"{regrade} --out grown")
    assert code == 2 and "--out grown: holds a model's own answers to test-t1" in err
    assert rows(tmp_path / "grown/test-t1.jsonl") == done

    entries = json.loads((tmp_path / "whole/results.json").read_text())
    regrade = "--regrade whole/test-t1.jsonl --tasks data/demo/test.jsonl --out again"
    assert stage(E, regrade)[0] == 0
    again = json.loads((tmp_path / "again/results.json").read_text())["test"]
    for key in ("n", "samples", "pass", "maj", "published"):
        assert again[key] == entries["test-t1"][key]
    assert (tmp_path / "again/test.jsonl").read_text() == (
        tmp_path / "whole/test-t1.jsonl"
    ).read_text()


def test_sampled_and_greedy_answers_stand_side_by_side(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7", "7"])
    arguments = "--model run --max-new-tokens 4 --out out"
    assert stage(E, f"{arguments} --temperature 0.5")[0] == 0
    assert stage(E, arguments)[0] == 0
    code, _, err = stage(E, f"{arguments} --temperature 0.5 --seed 1")
    assert code == 2 and "seed 0 -> 1" in err
    entries = json.loads((tmp_path / "out/results.json").read_text())
    assert list(entries) == ["test-t0.5", "test"]
    assert "temperature" not in entries["test"]["settings"]
    assert (
        rows(tmp_path / "out/test.jsonl")[0].keys()
        == rows(tmp_path / "out/test-t0.5.jsonl")[0].keys()
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--samples 4", "--samples: got 4 with --temperature 0, which makes them all equal"),
        ("--temperature -1", "--temperature: got -1, wanted 0 or more"),
        ("--temperature 0.001", "wanted 0 (greedy), or 0.01 to 100"),
        ("--samples 0 --temperature 1", "--samples"),
    ],
)
def test_what_cannot_be_sampled(stage, vocabulary, tmp_path, arguments, words):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"])
    code, _, err = stage(E, f"--model run {arguments}")
    assert code == 2 and words in err and err.count("\n") == 1


class Tired:
    """In the sandbox's place: every program prints 1."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, programs):
        return [Result("ok", "1", "", 0.0)]


class Writes(Numbers):
    """Ids read as letters; the lowest end a call of the model as a program does."""

    def push(self, i):
        return "```END" if i < 12 else f"{i} "


def test_with_tools_a_sample_is_the_same_in_any_batch(small, monkeypatch):
    monkeypatch.setattr(reasoning, "Sandbox", Tired)
    model, prompts = small

    def encode(text):
        begin, _, rest = text.partition("|")
        return prompts[int(begin), 0] + [20 + len(word) for word in rest.split()]

    def answers(batch_tokens, keys):
        decoder = G.Decoder(
            model,
            Writes(),
            25,
            stop=G.stop_strings(["END"]),
            temperature=1.0,
            batch_tokens=batch_tokens,
        )
        asked = {key: f"{key[0]}|" for key in keys}
        found = reasoning.with_tools(decoder, asked, encode)
        return {key: reply.text for key, reply in found}

    keys = [(i, sample) for i in range(4) for sample in range(2)]
    wanted = answers(20_000, keys)
    assert any("```output" in text for text in wanted.values())
    assert len(set(wanted.values())) == len(keys)
    assert answers(300, keys[::-1]) == wanted
