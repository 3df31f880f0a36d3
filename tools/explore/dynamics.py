"""Token dynamics (section 2.1 and appendix D of the paper): `python -m tools.explore dynamics`.

The loss of a token at each of a run's snapshots x = 0..n is fitted by a line, l = a x + b; the
change is a n. Below -0.2 the token is H→L (learnt), above 0.2 L→H (unlearnt). Of the others those
whose last loss is at most the mean last loss are L→L (known all along), the rest H→H (never
learnt).
"""

import json

from common.device import Env

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from data import TokenSet
from hf.tokenizer import Tokenizer
from tools.explore.figures import COLOURS, DASHES, plotting, save_figure
from tools.explore.runs import batched, look, snapshots, spaced
from tools.explore.spelling import spell
from training.finished import arguments

CATEGORIES = ["H→L", "L→L", "H→H", "L→H"]
PAPER = {"H→L": 0.26, "L→L": 0.51, "H→H": 0.11, "L→H": 0.12}  # TinyLlama on OpenWebMath
CHANGE = 0.2  # nats
CONTEXT = 12  # tokens shown before an example


def classify(losses):
    """The category of each token, (tokens,) indices into CATEGORIES, from its losses in nats,
    (snapshots, tokens).

    Raises UserError for fewer than two snapshots, through which there is no line.
    """
    if len(losses) < 2:
        raise UserError(
            f"--run: got {len(losses)} snapshot, wanted at least 2; train with --snapshots 12, say"
        )
    losses = np.asarray(losses, np.float64)
    x = np.arange(len(losses)) - (len(losses) - 1) / 2  # mean 0: the slope is x·l / x·x
    change = (x @ losses) / (x @ x) * (len(losses) - 1)
    last = losses[-1]
    return np.select([change < -CHANGE, change > CHANGE, last <= last.mean()], [0, 3, 1], 2)


def shares(category, kind=None, kinds=None):
    """{"all" and each kind: {category: share}} of the tokens."""
    groups = {"all": np.ones(len(category), bool)}
    for i, name in enumerate(kinds or ()):
        if (kind == i).any():
            groups[name] = kind == i
    out = {}
    for group, inside in groups.items():
        found = category[inside]
        out[group] = {
            name: round(float((found == i).mean()), 4) for i, name in enumerate(CATEGORIES)
        }
    return out


def main(args):
    env = Env(args)
    saved = arguments(args.run)
    data = TokenSet(args.data)
    seq_len = saved["seq_len"]
    if args.tokens < 1 or args.examples < 0:
        raise UserError(
            f"--tokens {args.tokens} --examples {args.examples}: wanted at least 1, and 0 or more"
        )
    models = snapshots(args.run)
    if len(models) < 2:
        raise UserError(
            f"--run: {args.run} has {len(models)} snapshot, wanted at least 2; "
            f"train with --snapshots 12"
        )
    n = data.n_windows(seq_len)
    windows = np.array(spaced(range(n), max(1, min(n, args.tokens // seq_len))))
    valid = data.valid(windows, seq_len)
    batches = batched(windows, 32)
    mask = saved.get("document_mask", False)
    losses = []
    for _, folder in models:
        seen = look(folder, data, batches, seq_len, env, document_mask=mask)
        losses.append(seen["loss"][valid])
    losses = np.stack(losses)  # (snapshots, tokens)
    category = classify(losses)
    labels = data.labels(windows, seq_len)
    labels = None if labels is None else labels[valid]
    # Where each of the tokens stands: position p is the target of column (p - 1) % T of its window.
    rows, columns = np.nonzero(valid)
    positions = windows[rows] * seq_len + 1 + columns
    result = {
        "run": args.run,
        "data": args.data,
        "tokens": len(category),
        "steps": [step for step, _ in models],
        "shares": shares(category, labels, data.kinds),
        "paper": PAPER,
        "mean_loss": mean_losses(losses, category),
        "examples": examples(data, positions, losses, category, args.examples),
    }
    show_table(result)
    draw(result, args.out)
    write_atomic(f"{args.out}.json", json.dumps(result, ensure_ascii=False, indent=1))
    print(f"{args.out}.json")


def mean_losses(losses, category):
    """{category: its mean loss at each snapshot, in nats; None where it has no tokens}."""
    out = {}
    for i, name in enumerate(CATEGORIES):
        members = losses[:, category == i]
        out[name] = None
        if members.size:
            out[name] = [round(float(loss), 4) for loss in members.mean(1)]
    return out


def examples(data, positions, losses, category, n):
    """{category: n tokens drawn at random (seed 0)}.

    Each is [text before it, token, first loss, last loss].
    """
    tokenizer = Tokenizer.load(data.folder)
    out = {name: [] for name in CATEGORIES}
    for i, name in enumerate(CATEGORIES):
        members = np.flatnonzero(category == i)
        if not len(members):
            continue
        drawn = np.random.RandomState(0).choice(members, min(n, len(members)), replace=False)
        for token in drawn:
            position = int(positions[token])
            ids = data.tokens[max(0, position - CONTEXT) : position + 1]
            *before, text = spell([tokenizer.token_bytes(int(t)) for t in ids])
            first, last = (round(float(loss), 2) for loss in losses[[0, -1], token])
            out[name].append(["".join(before), text, first, last])
    return out


def show_table(result):
    print(
        f"{result['run']} on {result['tokens']:,} tokens of {result['data']}, "
        f"{len(result['steps'])} snapshots\n"
    )
    print("| | " + " | ".join(CATEGORIES) + " |\n|---|" + "---|" * len(CATEGORIES))
    for name, row in {**result["shares"], "the paper": PAPER}.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.0%}" for c in CATEGORIES) + " |")
    for name, rows in result["examples"].items():
        print(f"\n{name}:")
        for before, token, first, last in rows:
            print(f"  {before + '[' + token + ']'!r}  {first} -> {last}")
    print()


def draw(result, out):
    """Mean loss of each category over the run; each category's share of each kind of token."""
    plot = plotting()
    groups = ["the paper", *result["shares"]]
    figure, axes = plot.subplots(1, 2, figsize=(9.5, 1.3 + 0.27 * max(len(groups), 7)))
    draw_losses(axes[0], result)
    draw_shares(axes[1], {"the paper": PAPER, **result["shares"]})
    figure.subplots_adjust(wspace=0.42)
    save_figure(figure, out)


def draw_losses(axis, result):
    for i, name in enumerate(CATEGORIES):
        if not result["mean_loss"][name]:
            continue
        axis.plot(
            result["steps"],
            result["mean_loss"][name],
            color=COLOURS[i],
            linestyle=DASHES[i],
            marker="os^D"[i],
            markersize=3.5,
            label=f"{name}  {result['shares']['all'][name]:.0%} (paper {PAPER[name]:.0%})",
        )
    axis.set(xlabel="optimiser steps", ylabel="mean loss, nats", ylim=(0, None))
    axis.legend(fontsize=8)


def draw_shares(axis, shares):
    start = np.zeros(len(shares))
    for i, name in enumerate(CATEGORIES):
        widths = np.array([row[name] for row in shares.values()])
        axis.barh(
            list(shares),
            widths,
            left=start,
            color=COLOURS[i],
            hatch=["", "//", "xx", ".."][i],
            edgecolor="white",
            linewidth=0.5,
            label=name,
        )
        start += widths
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of the tokens")
    axis.grid(False)
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
