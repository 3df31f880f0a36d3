"""The narrow reference of runs/ablations.sh: its problems, and what it drops."""

import argparse
import json
import random
import statistics

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np

from common.files import write_atomic
from data import TokenSet
from demo import corpus
from demo.folders import roots
from hf.tokenizer import Tokenizer
from text.writing import TokenSetWriter
from tools.explore.runs import batched, look
from training.finished import steps

NARROW = 0  # the one template that the narrow reference has seen
SEQ_LEN = 128  # the demo's
PAGES = 40  # of each template
RUNS = {  # run: its reference, the templates that this has seen
    "slm": ("ref", corpus.COVERED),
    "slm-narrow": ("narrow", (NARROW,)),
}


def write_narrow(args):
    """As many clean solved problems as the curated set has, all of template NARROW."""
    rng = random.Random(f"narrow {args.seed}")
    lines = []
    for _ in range(corpus.PAGES["curated"]):
        text = problem_text(rng, "train", NARROW)
        lines.append(json.dumps({"text": text}) + "\n")
    write_atomic(args.out, "".join(lines))


def problem_text(rng, split, template):
    """A clean solved problem of a template."""
    key = rng.choice(corpus.keys(split)[template])
    return "".join(text for text, _ in corpus.problem_page(rng, key))


def show_templates(seeds, folder_of):
    """A table of the templates: what each of RUNS keeps of their problems, and how many it solves.

    Kept: of clean solved problems, the share of tokens whose excess at the start lies above the
    cut-off that the run had in its last 100 steps. folder_of(name, seed): a run's folder.
    """
    env = Env(argparse.Namespace(device="cpu", dtype="float32", threads=1))
    kept = {run: [] for run in RUNS}  # for each seed the templates' shares
    right = {run: [] for run in RUNS}
    for seed in seeds:
        sets, out = roots(seed)
        data = by_template(sets, PAGES, seed)
        windows = np.arange(data.n_windows(SEQ_LEN))
        valid = data.valid(windows, SEQ_LEN)
        labels = data.labels(windows, SEQ_LEN)
        batches = batched(windows, 32)
        start = look(out / "base", data, batches, SEQ_LEN, env)["loss"]
        for run, (reference, _) in RUNS.items():
            folder = folder_of(run, seed)
            excess = start - look(out / reference, data, batches, SEQ_LEN, env)["loss"]
            cut = statistics.mean(r["threshold"] for r in steps(folder)[-100:])
            above = [
                (excess[valid & (labels == t)] >= cut).mean() for t in range(len(corpus.TEMPLATES))
            ]
            kept[run].append(above)
            right[run].append(solved(folder, sets))
    print("\n| template | of 6: seen | kept | right | of 1: seen | kept | right |")
    print("|---|---|---|---|---|---|---|")
    for t, (text, *_) in enumerate(corpus.TEMPLATES):
        cells = [text]
        for run, (_, seen) in RUNS.items():
            cells.append("yes" if t in seen else "no")
            cells.append(f"{np.mean([shares[t] for shares in kept[run]]):.0%}")
            cells.append(f"{np.mean([shares[t] for shares in right[run]]):.2f}")
        print(f"| {' | '.join(cells)} |")


def solved(folder, sets):
    """The share of test problems of each template that a run solves; nan if it is not evaluated."""
    tests = lines_of(sets / "test.jsonl")
    answers = []
    if (folder / "eval" / "test.jsonl").exists():
        answers = lines_of(folder / "eval" / "test.jsonl")
    shares = []
    for t in range(len(corpus.TEMPLATES)):
        right = [a["published"] for a, test in zip(answers, tests) if test["template"] == t]
        shares.append(np.mean(right) if right else np.nan)
    return shares


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_template(sets, pages, seed):
    """A token set of clean problems, each token labelled with its template."""
    folder = sets / "by-template"
    if (folder / "meta.json").exists():
        return TokenSet(folder)
    tokenizer = Tokenizer.load(sets / "base")
    writer = TokenSetWriter(folder, tokenizer.n_vocab, ("tokens", "kind"))
    rng = random.Random(f"by template {seed}")
    for t in range(len(corpus.TEMPLATES)):
        for _ in range(pages):
            ids = np.append(tokenizer.encode(problem_text(rng, "val", t)), tokenizer.eos_id)
            writer.append(tokens=ids, kind=np.full(len(ids), t))
    tokenizer.save(folder)
    return writer.finish(
        tokenizer=tokenizer.hash,
        sources=[],
        seed=seed,
        kinds=[f"template {t}" for t in range(len(corpus.TEMPLATES))],
    )
