"""What runs/ablations.sh needs beside the stages: the narrow reference's problems; an ablation's table and figure.

python -m runs.ablations table --name score --seeds 31 32 33
python -m runs.ablations narrow --seed 31 --out data/demo-seed31/narrow.jsonl
"""

import argparse
import json
import random
import statistics
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np

from common.errors import UserError, cli
from common.files import read_json, write_atomic
from data import TokenSet, TokenSetWriter
from demo import corpus
from demo.chain import records, roots, tokens_to_reach
from hf.tokenizer import Tokenizer
from tools.explore import pick_k
from tools.explore import runs as explore_run

NARROW = 0  # the one template that the narrow reference has seen
ROWS = {  # label: folder of the run
    "k": {
        "0.3": "slm-k0.3",
        "0.4": "slm-k0.4",
        "0.5": "slm-k0.5",
        "0.6": "slm",
        "0.7": "slm-k0.7",
        "0.8": "slm-k0.8",
        "0.9": "slm-k0.9",
        "1.0 (CLM)": "clm",
    },
    "score": {
        "excess": "slm",
        "reference's loss, lowest": "ref_loss",
        "reference's entropy, lowest": "ref_entropy",
        "both of these": "ref_and",
        "either of these": "ref_or",
        "student's loss, highest": "loss",
        "random": "random",
        "CLM": "clm",
    },
    "self": {
        "curated reference, excess": "slm",
        "self-reference, excess": "self-excess",
        "self-reference, its loss": "self-ref_loss",
        "self-reference, its loss and entropy": "self-ref_and",
        "CLM": "clm",
    },
    "weak": {
        "reference of 271k": "slm",
        "reference of 80k": "slm-weak",
        "CLM": "clm",
        "(the reference of 271k itself)": "ref",
        "(the reference of 80k itself)": "weak",
    },
    "narrow": {
        "reference of 6 templates": "slm",
        "reference of 1 template": "slm-narrow",
        "CLM": "clm",
        "(the reference of 6 itself)": "ref",
        "(the reference of 1 itself)": "narrow",
    },
    "scope": {
        "micro-batch of 8 = the batch": "slm",
        "window": "slm-sequence",
        "micro-batch of 2": "slm-micro2",
        "batch, in micro-batches of 2": "slm-batch",
        "CLM": "clm",
    },
    "stale": {
        "fresh reference": "slm",
        "stale reference": "slm-stale",
        "CLM": "clm",
        "(the stale reference itself)": "stale",
    },
}
REFERENCES = ("ref", "weak", "narrow", "stale")
LOSSES = ("problem", "solution", "end_of_text")  # kinds whose loss the tables show
SHOWN = (
    "solution",
    "problem",
    "wrong_digits",
    "id_hash",
    "chatter",
)  # kinds whose share kept they show


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="a table and a figure of finished runs")
    table.add_argument("--name", required=True, choices=list(ROWS), help="which ablation")
    table.add_argument(
        "--seeds", type=int, nargs="+", required=True, help="seeds whose runs are finished"
    )
    table.add_argument("--steps", type=int, default=1200, help="of the students")
    table.add_argument("--figures", default="figures", help="folder for the figure")
    narrow = commands.add_parser("narrow", help="curated problems of one template only")
    narrow.add_argument("--seed", type=int, default=0, help="the demo's seed")
    narrow.add_argument("--out", required=True, help="where they go (FILE.jsonl)")
    args = parser.parse_args()
    {"table": show, "narrow": write_narrow}[args.command](args)


def write_narrow(args):
    """As many clean solved problems as the curated set has, all of template NARROW."""
    rng = random.Random(f"narrow {args.seed}")
    pages = (
        corpus.problem_page(rng, rng.choice(corpus.keys("train")[NARROW]))
        for _ in range(corpus.PAGES["curated"])
    )
    write_atomic(
        args.out,
        "".join(json.dumps({"text": "".join(text for text, _ in page)}) + "\n" for page in pages),
    )


def show(args):
    folders = {
        label: [folder_of(name, seed, args.steps) for seed in args.seeds]
        for label, name in ROWS[args.name].items()
    }
    missing = [str(f) for row in folders.values() for f in row if not (f / "summary.json").exists()]
    rows = {
        label: [measured(f, folder_of("clm", seed, args.steps)) for f, seed in zip(row, args.seeds)]
        for label, row in folders.items()
        if not set(map(str, row)) & set(missing)
    }
    if not rows:
        raise UserError(
            f"--seeds: none of the runs is finished; make them with runs/ablations.sh {args.name}"
        )
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{args.name}, {args.steps} steps, seeds {seeds}: mean (lowest to highest)\n")
    print(
        "| | validation loss | exact match | times fewer tokens than CLM | "
        + " | ".join(f"loss: {k}" for k in LOSSES)
        + " | share kept | "
        + " | ".join(f"of {k}" for k in SHOWN)
        + " |"
    )
    print("|---|" + "---|" * (4 + len(LOSSES) + len(SHOWN)))
    for label, runs in rows.items():
        cells = [
            spread([r[key] for r in runs], form)
            for key, form in (
                ("val_loss", "{:.3f}"),
                ("exact_match", "{:.3f}"),
                ("times", "{:.1f}"),
            )
        ]
        cells += [
            spread([r["loss"].get(kind) for r in runs], "{:.3f}", mean_only=True) for kind in LOSSES
        ]
        cells.append(spread([r["share"] for r in runs], "{:.2f}", mean_only=True))
        cells += [
            spread([r["kept"].get(kind) for r in runs], "{:.0%}", mean_only=True) for kind in SHOWN
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    if args.name == "k":
        draw_k(args, rows, show_suggestions(args, rows))
    else:
        draw(args, rows)
    if missing:
        print(f"not finished, and left out: {', '.join(missing)}")
    elif args.name == "narrow":
        show_templates(args.seeds, args.steps)


def folder_of(name, seed, steps):
    """A reference or a run of runs/ablations.sh; shorter students than the demo's have a folder of their own."""
    out = roots(seed)[1]
    return out / name if name in REFERENCES or steps == 1200 else out / f"steps{steps}" / name


def measured(folder, clm):
    """What the table says of a run."""
    summary, log, end = read_json(folder / "summary.json", "run"), records(folder), records(clm)[-1]
    is_student = folder.name not in REFERENCES
    reached = tokens_to_reach(folder, end["val_loss"]) if is_student and folder != clm else None
    last = [r["kept"] for r in log[-100:] if r.get("kept")] if is_student else []
    return {
        "val_loss": summary["val_loss"],
        "exact_match": summary["exact_match"],
        "loss": log[-1].get("val_loss_by_kind", {}),
        "times": end["tokens_seen"] / reached if reached else None,
        "share": summary["tokens_selected"] / summary["tokens_seen"] if is_student else None,
        "kept": {
            kind: statistics.mean(r[kind] for r in last if kind in r) for kind in set().union(*last)
        },
    }


def spread(values, form, mean_only=False):
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = form.format(statistics.mean(known))
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)} seeds)"
    elif len(known) > 1 and not mean_only:
        text += f" ({form.format(min(known))} to {form.format(max(known))})"
    return text


def draw(args, rows):
    """Loss and exact match of each row: a dot for each seed, a bar at their mean."""
    plot = explore_run.plotting()
    figure, axes = plot.subplots(1, 2, figsize=(8, 0.8 + 0.28 * len(rows)), sharey=True)
    for axis, key, label in zip(
        axes, ("val_loss", "exact_match"), ("validation loss, nats", "exact match")
    ):
        for y, (name, runs) in enumerate(rows.items()):
            values = [r[key] for r in runs if r[key] is not None]
            if values:
                colour = explore_run.COLOURS[0 if y == 0 else 1 if "CLM" in name else 2]
                axis.plot(values, [y] * len(values), "o", color=colour, markersize=4.5, alpha=0.75)
                axis.plot(
                    [statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.5
                )
        axis.set(xlabel=label)
    if all(r["exact_match"] is None for name, runs in rows.items() if name[0] != "(" for r in runs):
        axes[1].set_visible(False)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[0].set_title(args.name, loc="left", fontsize=9)
    explore_run.save_figure(figure, Path(args.figures) / f"ablation-{args.name}")


def show_suggestions(args, rows):
    """What tools.explore pick-k says for each seed, and what it is worth there; returns the suggestions."""
    env = Env(argparse.Namespace(device="cpu", dtype="float32", threads=1))
    ks = [float(label.split()[0]) for label in rows]
    suggested = []
    print(
        "\n| seed | pick-k says | loss there, between its neighbours | at 0.6 | best of the sweep |\n|---|---|---|---|---|"
    )
    for i, seed in enumerate(args.seeds):
        sets, out = roots(seed)
        excess, valid, _ = pick_k.sample(
            out / "ref_loss.bin", TokenSet(sets / "corpus"), str(out / "base"), 400, env
        )
        losses = [runs[i]["val_loss"] for runs in rows.values()]
        suggested.append(pick_k.suggestion(excess[valid]))
        there, fixed, best = (
            np.interp(suggested[-1], ks, losses),
            np.interp(0.6, ks, losses),
            int(np.argmin(losses)),
        )
        print(
            f"| {seed} | {suggested[-1]:.2f} | {there:.3f} | {fixed:.3f} | {losses[best]:.3f} (k {ks[best]:g}) |"
        )
    return suggested


def draw_k(args, rows, suggested):
    """Loss and exact match against k: each seed, their mean, and the range of what pick-k suggests."""
    plot = explore_run.plotting()
    ks = [float(label.split()[0]) for label in rows]
    figure, axes = plot.subplots(1, 2, figsize=(8, 3))
    for axis, key, label in zip(
        axes, ("val_loss", "exact_match"), ("validation loss, nats", "exact match")
    ):
        values = np.array([[r[key] for r in runs] for runs in rows.values()], float)  # (k, seeds)
        axis.plot(ks, values, color=explore_run.COLOURS[7], linewidth=0.8)
        axis.plot(ks, values.mean(1), "o-", color=explore_run.COLOURS[0], label="mean over seeds")
        axis.axvspan(
            min(suggested) - 0.003,
            max(suggested) + 0.003,
            color=explore_run.COLOURS[5],
            alpha=0.35,
            linewidth=0,
            label="suggested by pick-k",
        )
        axis.set(xlabel="k (1.0: CLM)", ylabel=label)
    axes[0].legend()
    explore_run.save_figure(figure, Path(args.figures) / "ablation-k")


# ---------------------------------------------------------------------------------------------------------------------
# what a narrow reference drops


def show_templates(seeds, steps, pages=40):
    """Of clean solved problems of each template, the share of tokens whose excess at the start lies above the cut-off
    that the run had in its last 100 steps; and exact match by template."""
    env = Env(argparse.Namespace(device="cpu", dtype="float32", threads=1))
    kept, right = {}, {}
    for seed in seeds:
        sets, out = roots(seed)
        data = by_template(sets, pages, seed)
        windows = np.arange(data.n_windows(128))
        valid, labels = data.valid(windows, 128), data.labels(windows, 128)
        batches = explore_run.batched(windows, 32)
        start = explore_run.look(out / "base", data, batches, 128, env)["loss"]
        for reference, run in (("ref", "slm"), ("narrow", "slm-narrow")):
            excess = start - explore_run.look(out / reference, data, batches, 128, env)["loss"]
            folder = folder_of(run, seed, steps)
            cut = statistics.mean(r["threshold"] for r in records(folder)[-100:])
            answers = folder / "eval" / "test.jsonl"
            answers = (
                [json.loads(line) for line in answers.read_text().splitlines()]
                if answers.exists()
                else []
            )
            tests = [json.loads(line) for line in (sets / "test.jsonl").read_text().splitlines()]
            for t in range(len(corpus.TEMPLATES)):
                kept.setdefault((run, t), []).append((excess[valid & (labels == t)] >= cut).mean())
                right.setdefault((run, t), []).append(
                    np.mean(
                        [a["published"] for a, test in zip(answers, tests) if test["template"] == t]
                        or [np.nan]
                    )
                )
    print(
        "\n| template | of 6: seen | kept | right | of 1: seen | kept | right |\n|---|---|---|---|---|---|---|"
    )
    for t, (text, *_) in enumerate(corpus.TEMPLATES):
        cells = [
            cell
            for run, seen in (("slm", t in corpus.COVERED), ("slm-narrow", t == NARROW))
            for cell in (
                "yes" if seen else "no",
                f"{np.mean(kept[run, t]):.0%}",
                f"{np.mean(right[run, t]):.2f}",
            )
        ]
        print(f"| {text} | {' | '.join(cells)} |")


def by_template(sets, pages, seed):
    """A token set of clean problems, each token labelled with its template."""
    if (sets / "by-template" / "meta.json").exists():
        return TokenSet(sets / "by-template")
    tokenizer = Tokenizer.load(sets / "base")
    writer = TokenSetWriter(sets / "by-template", tokenizer.n_vocab, ("tokens", "kind"))
    rng = random.Random(f"by template {seed}")
    for t in range(len(corpus.TEMPLATES)):
        for _ in range(pages):
            text = "".join(
                text for text, _ in corpus.problem_page(rng, rng.choice(corpus.keys("val")[t]))
            )
            ids = np.append(tokenizer.encode(text), tokenizer.eos_id)
            writer.append(tokens=ids, kind=np.full(len(ids), t))
    tokenizer.save(sets / "by-template")
    return writer.finish(
        tokenizer=tokenizer.hash,
        sources=[],
        seed=seed,
        kinds=[f"template {t}" for t in range(len(corpus.TEMPLATES))],
    )


if __name__ == "__main__":
    cli(main)
