"""Token dynamics (section 2.1 and appendix D of the paper): `python -m tools.explore dynamics`.

The loss of a token at each of a run's snapshots x = 0..n is fitted by a line, l = a x + b; the change is a n. Below
-0.2 the token is H→L (learnt), above 0.2 L→H (unlearnt); of the others those whose last loss is at most the mean
last loss are L→L (known all along), the rest H→H (never learnt).
"""

import json

from common.device import Env

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from data import TokenSet
from hf.tokenizer import Tokenizer
from tools.explore import runs as explore_run
from tools.explore.page import spell

CATEGORIES = ["H→L", "L→L", "H→H", "L→H"]
PAPER = {"H→L": 0.26, "L→L": 0.51, "H→H": 0.11, "L→H": 0.12}  # TinyLlama on OpenWebMath
CHANGE = 0.2  # nats


def classify(losses):
    """The category of each token, (tokens,) indices into CATEGORIES, from its losses (snapshots, tokens) in nats.
    Raises UserError for fewer than two snapshots, through which there is no line."""
    if len(losses) < 2:
        raise UserError(
            f"--run: got {len(losses)} snapshot, wanted at least 2; train with --snapshots 12, say"
        )
    losses = np.asarray(losses, np.float64)
    x = np.arange(len(losses)) - (len(losses) - 1) / 2
    change = (x @ losses) / (x @ x) * (len(losses) - 1)
    flat = np.where(losses[-1] <= losses[-1].mean(), 1, 2)
    return np.where(change < -CHANGE, 0, np.where(change > CHANGE, 3, flat))


def shares(category, kind=None, kinds=None):
    """{"all" and each kind: {category: share}} of the tokens."""
    groups = {"all": np.ones(len(category), bool)}
    if kinds:
        groups.update({name: kind == i for i, name in enumerate(kinds) if (kind == i).any()})
    return {
        name: {c: round(float((category[inside] == i).mean()), 4) for i, c in enumerate(CATEGORIES)}
        for name, inside in groups.items()
    }


def main(args):
    env = Env(args)
    saved = explore_run.run_arguments(args.run)
    data, T = TokenSet(args.data), saved["seq_len"]
    if args.tokens < 1 or args.examples < 0:
        raise UserError(
            f"--tokens {args.tokens} --examples {args.examples}: wanted at least 1, and 0 or more"
        )
    models = explore_run.snapshots(args.run)
    if len(models) < 2:
        raise UserError(
            f"--run: {args.run} has {len(models)} snapshot, wanted at least 2; train with --snapshots 12"
        )
    n = data.n_windows(T)
    windows = np.array(explore_run.spaced(range(n), max(1, min(n, args.tokens // T))))
    batches, valid = explore_run.batched(windows, 32), data.valid(windows, T)
    losses = np.stack(
        [explore_run.look(folder, data, batches, T, env)["loss"][valid] for _, folder in models]
    )
    category = classify(losses)
    labels = data.labels(windows, T)
    labels = None if labels is None else labels[valid]
    result = {
        "run": args.run,
        "data": args.data,
        "tokens": len(category),
        "steps": [step for step, _ in models],
        "shares": shares(category, labels, data.kinds),
        "paper": PAPER,
        "mean_loss": {
            c: [round(float(l), 4) for l in losses[:, category == i].mean(1)]
            if (category == i).any()
            else None
            for i, c in enumerate(CATEGORIES)
        },
        "examples": examples(data, windows, valid, losses, category, T, args.examples),
    }
    table(result)
    draw(result, args.out)
    write_atomic(f"{args.out}.json", json.dumps(result, ensure_ascii=False, indent=1))
    print(f"{args.out}.json")


def examples(data, windows, valid, losses, category, T, n, before=12):
    """{category: n tokens drawn at random (seed 0), each [text before it, token, first loss, last loss]}."""
    tokenizer, at = Tokenizer.load(data.folder), np.argwhere(valid)
    out = {}
    for i, name in enumerate(CATEGORIES):
        members = np.flatnonzero(category == i)
        out[name] = []
        for m in (
            np.random.RandomState(0).choice(members, min(n, len(members)), replace=False)
            if len(members)
            else []
        ):
            row, column = at[m]
            position = int(windows[row]) * T + 1 + int(column)
            ids = data.tokens[max(0, position - before) : position + 1]
            texts = spell([tokenizer.token_bytes(int(t)) for t in ids])
            out[name].append(
                ["".join(texts[:-1]), texts[-1], *(round(float(l), 2) for l in losses[[0, -1], m])]
            )
    return out


def table(result):
    print(
        f"{result['run']} on {result['tokens']:,} tokens of {result['data']}, {len(result['steps'])} snapshots\n"
    )
    print("| | " + " | ".join(CATEGORIES) + " |\n|---|" + "---|" * len(CATEGORIES))
    for name, row in {**result["shares"], "the paper": PAPER}.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.0%}" for c in CATEGORIES) + " |")
    for name, rows in result["examples"].items():
        print(f"\n{name}:")
        for context, token, first, last in rows:
            print(f"  {(context + '[' + token + ']')!r}  {first} -> {last}")
    print()


def draw(result, out):
    plot = explore_run.plotting()
    kinds = [name for name in result["shares"] if name != "all"]
    rows = ["the paper", "all", *kinds]
    figure, (left, right) = plot.subplots(1, 2, figsize=(9.5, 1.3 + 0.27 * max(len(rows), 7)))
    for i, name in enumerate(CATEGORIES):
        if result["mean_loss"][name]:
            left.plot(
                result["steps"],
                result["mean_loss"][name],
                color=explore_run.COLOURS[i],
                linestyle=explore_run.DASHES[i],
                marker="os^D"[i],
                markersize=3.5,
                label=f"{name}  {result['shares']['all'][name]:.0%} (paper {PAPER[name]:.0%})",
            )
    left.set(xlabel="optimiser steps", ylabel="mean loss, nats", ylim=(0, None))
    left.legend(fontsize=8)
    start = np.zeros(len(rows))
    for i, name in enumerate(CATEGORIES):
        widths = np.array([PAPER[name]] + [result["shares"][row][name] for row in rows[1:]])
        right.barh(
            rows,
            widths,
            left=start,
            color=explore_run.COLOURS[i],
            hatch=["", "//", "xx", ".."][i],
            edgecolor="white",
            linewidth=0.5,
            label=name,
        )
        start += widths
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="share of the tokens")
    right.grid(False)
    right.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
    figure.subplots_adjust(wspace=0.42)
    explore_run.save_figure(figure, out)
