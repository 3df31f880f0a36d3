"""The demo's sets: the same every time, labelled by spans, and no problem in two splits."""

import json
import re

from prepared import demo_fixture, documents, same_files  # noqa: F401 (a fixture)

from common.command_line import SEED
from data import TokenSet
from demo import corpus
from hf.tokenizer import Tokenizer


def test_demo_is_the_same_every_time_and_another_with_another_seed(demo):
    for name in ("base", "corpus", "curated", "val"):
        assert same_files(demo / name, demo.parent / "b" / name)
        assert TokenSet(demo / name, verify=True).vocab_size == 512
        assert (
            TokenSet(demo / name).tokenizer_hash
            == TokenSet(demo / "base").tokenizer_hash
            == Tokenizer.load(demo / name).hash
        )
    other = TokenSet(demo.parent / "c" / "corpus")
    assert TokenSet(demo / "corpus").hash not in (TokenSet(demo / "base").hash, other.hash)
    assert (demo / "test.jsonl").read_bytes() == (demo.parent / "b" / "test.jsonl").read_bytes()


def test_demo_kinds_label_the_span_of_each_tokens_first_byte(demo):
    tokenizer = Tokenizer.load(demo / "base")
    for name in ("base", "corpus", "curated", "val"):
        tokens, at = TokenSet(demo / name), 0
        assert tokens.kinds == corpus.KINDS
        for i, ids in enumerate(documents(tokens)):
            spans = corpus.page(name, SEED, i)
            assert tokenizer.decode(ids) == "".join(text for text, _ in spans)
            labels = [kind for text, kind in spans for _ in text.encode()]
            first = 0
            for token in ids:
                assert tokens.kind[at] == labels[first]
                first, at = first + len(tokenizer.token_bytes(token)), at + 1
            assert first == len(labels) and tokens.kinds[tokens.kind[at]] == "end_of_text"
            at += 1
        assert i == tokens.meta["sources"][0]["documents"] - 1


def test_demo_problems_of_val_and_test_stand_in_no_training_page(demo):
    """The problems are read back from the text: template by its words, numbers by their places."""
    patterns = []
    for template, *_ in corpus.TEMPLATES:
        pattern = re.sub(r"\\{([nmo])\\}", r"\\w+", re.escape(template))
        patterns.append(re.compile("Q: " + re.sub(r"\\{([abc])\\}", r"(?P<\1>\\d+)", pattern)))

    def problems(texts):
        return {
            (t, m["a"], m["b"], m["c"])
            for text in texts
            for t, p in enumerate(patterns)
            if (m := p.search(text))
        }

    tokenizer, found = Tokenizer.load(demo / "base"), {}
    for name in ("base", "corpus", "curated", "val"):
        found[name] = problems(map(tokenizer.decode, documents(TokenSet(demo / name))))
    tests = [json.loads(line) for line in (demo / "test.jsonl").read_text().splitlines()]
    found["test"] = problems(p["question"] for p in tests)
    assert len(found["test"]) == len(tests) == 1000 and len(found["val"]) == 300
    assert len(found["base"]) > 100 and len(found["corpus"]) > 100 and len(found["curated"]) > 30
    train = found["base"] | found["corpus"] | found["curated"]
    assert (
        not train & found["val"] and not train & found["test"] and not found["val"] & found["test"]
    )
    assert {t for t, *_ in found["curated"]} <= set(corpus.COVERED)
