"""The demo's token sets: OUT/{base,corpus,curated,val}, all with one tokenizer, and OUT/test.jsonl.

    python prepare.py               # calls `prepare`

Each page is made and labelled in prepare's own workers, so any number of them writes the same data.
"""

import hashlib
import json
from functools import cache, partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from data import header_of
from demo import corpus
from demo.folders import roots
from hf.tokenizer import Tokenizer, train_bpe
from text.building import Settings, build
from text.pieces import Document
from text.sources import Source

VOCABULARY = 512
TRAIN_PAGES = 2000  # of the set `base`, that the tokenizer learns from
EVERY = 50  # a page in so many tells one generator from another


def prepare(out, seed, vocabulary, workers, overwrite):
    """Make the four sets and the test problems. `out` and `vocabulary`: None is the default.

    Raises UserError for sets that are made of something else.
    """
    root = Path(out or roots(seed)[0])
    vocabulary = vocabulary or VOCABULARY
    problems = test_problems()
    settings = Settings(workers=workers, overwrite=overwrite, seed=seed)
    tokenizer = partial(train_tokenizer, seed, vocabulary)
    for name, pages in corpus.PAGES.items():
        plan = plan_of(name, pages, seed, vocabulary)
        done = build(root / name, [pages_of(name, pages, seed)], plan, tokenizer, settings)
        if name == "base":
            tokenizer = Tokenizer.load(done.folder)
        if done.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"{done.folder}: its tokenizer is not that of {root}/base; "
                f"make all again with --overwrite"
            )
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    write_atomic(root / "test.jsonl", lines)
    print(f"{root}/test.jsonl: {len(problems):,} problems, none of them in the sets above")


def test_problems():
    """The corpus' test problems; asserts that none is of the train or val split."""
    splits = []
    for split in ("train", "val", "test"):
        splits.append({key for template in corpus.keys(split) for key in template})
    problems = corpus.test_problems()
    test_keys = {tuple(problem["key"]) for problem in problems}
    assert len(set.union(*splits)) == sum(map(len, splits)), "a problem is in two splits"
    assert test_keys <= splits[2], "a test problem is not of the test split"
    return problems


def train_tokenizer(seed, vocabulary):
    """A byte-level BPE of noisy pages."""
    pages = corpus.PAGES["base"]
    numbers = range(0, pages, max(1, pages // TRAIN_PAGES))
    return train_bpe((text_of(corpus.page("base", seed, i)) for i in numbers), vocabulary)


def text_of(spans):
    return "".join(text for text, _ in spans)


def plan_of(name, pages, seed, vocabulary):
    """What identifies a set; some of its text shows another generator."""
    return {
        "source": "demo",
        "set": name,
        "seed": seed,
        "pages": pages,
        "kinds": corpus.KINDS,
        "vocabulary": vocabulary,
        "text": hash_of_text(name, pages, seed),
    }


def hash_of_text(name, pages, seed):
    """The sha256 of every 50th page."""
    text = json.dumps([corpus.page(name, seed, i) for i in range(0, pages, EVERY)])
    return hashlib.sha256(text.encode()).hexdigest()


def are_of_this_text(root, seed):
    """Were the sets in `root` made by the generator as it is now? Very old ones do not say."""
    if not (root / "corpus/meta.json").exists():
        return False
    wanted = hash_of_text("corpus", corpus.PAGES["corpus"], seed)
    return header_of(root / "corpus").plan.get("text", wanted) == wanted


def pages_of(name, pages, seed):
    """A set's pages, as a source."""
    document = partial(labelled_page, name, seed)
    return Source("generated", name, pages, unit="page", labels=corpus.KINDS, document=document)


def labelled_page(name, seed, number, tokenizer):
    """A page as a Document: a token has the kind of the span that its first byte lies in."""
    spans = corpus.page(name, seed, number)
    text = text_of(spans)
    ids = tokenizer.encode(text)
    lengths = byte_lengths(tokenizer)[ids]
    starts = np.cumsum(lengths) - lengths
    ends = np.cumsum([len(text.encode()) for text, _ in spans])
    kinds = np.array([kind for _, kind in spans])
    kind = kinds[np.searchsorted(ends, starts, side="right")]
    return Document(ids, len(text.encode()), kind=np.append(kind, corpus.END_OF_TEXT))


@cache
def byte_lengths(tokenizer):
    """Bytes of each token, (n_vocab,)."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)])
