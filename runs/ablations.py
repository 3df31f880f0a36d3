"""What runs/ablations.sh needs beside the stages: an ablation's table and figure.

python -m runs.ablations table --name score --seeds 31 32 33
python -m runs.ablations narrow --seed 31 --out data/demo-seed31/narrow.jsonl
"""

import argparse
import statistics
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np

from common.errors import UserError, cli
from data import TokenSet
from demo.chain import roots, tokens_to_reach
from runs.narrow import show_templates, write_narrow
from tools.explore import pick_k
from tools.explore.figures import COLOURS, plotting, save_figure
from training import finished

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
SHOWN = ("solution", "problem", "wrong_digits", "id_hash", "chatter")  # whose share kept they show
STEPS = 1200  # the demo's students
MEASURES = {"val_loss": "validation loss, nats", "exact_match": "exact match"}  # of the figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("table", help="a table and a figure of finished runs").add_argument
    add("--name", required=True, choices=list(ROWS), help="which ablation")
    add("--seeds", type=int, nargs="+", required=True, help="seeds whose runs are finished")
    add("--steps", type=int, default=STEPS, help="of the students")
    add("--figures", default="figures", help="folder for the figure")
    add = commands.add_parser("narrow", help="curated problems of one template only").add_argument
    add("--seed", type=int, default=0, help="the demo's seed")
    add("--out", required=True, help="where they go (FILE.jsonl)")
    args = parser.parse_args()
    {"table": show, "narrow": write_narrow}[args.command](args)


def show(args):
    """The table, the figure, and what is special to the ablation; runs that lack are named."""
    rows, missing = {}, []
    for label, name in ROWS[args.name].items():
        folders = [folder_of(name, seed, args.steps) for seed in args.seeds]
        unfinished = [str(f) for f in folders if not (f / "summary.json").exists()]
        missing += unfinished
        if not unfinished:
            baselines = [folder_of("clm", seed, args.steps) for seed in args.seeds]
            rows[label] = [measured(run, clm) for run, clm in zip(folders, baselines)]
    if not rows:
        raise UserError(
            f"--seeds: none of the runs is finished; make them with runs/ablations.sh {args.name}"
        )
    show_table(args, rows)
    if args.name == "k":
        draw_k(args, rows, show_suggestions(args, rows))
    else:
        draw(args, rows)
    if missing:
        print(f"not finished, and left out: {', '.join(missing)}")
    elif args.name == "narrow":
        show_templates(args.seeds, lambda name, seed: folder_of(name, seed, args.steps))


def folder_of(name, seed, steps):
    """A reference or a run of runs/ablations.sh.

    Shorter students than the demo's have a folder of their own.
    """
    out = roots(seed)[1]
    if name in REFERENCES or steps == STEPS:
        return out / name
    return out / f"steps{steps}" / name


def measured(folder, clm):
    """What the table says of a run; clm: the folder of the baseline with its seed."""
    summary = finished.summary(folder)
    log = finished.steps(folder)
    end = finished.steps(clm)[-1]
    row = {
        "val_loss": summary["val_loss"],
        "exact_match": summary["exact_match"],
        "loss": log[-1].get("val_loss_by_kind", {}),
        "times": None,
        "share": None,
        "kept": {},
    }
    if folder.name in REFERENCES:
        return row
    row["share"] = summary["tokens_selected"] / summary["tokens_seen"]
    row["kept"] = mean_shares([r["kept"] for r in log[-100:] if r.get("kept")])
    reached = None if folder == clm else tokens_to_reach(folder, end["val_loss"])
    if reached:
        row["times"] = end["tokens_seen"] / reached
    return row


def mean_shares(kept):
    """{kind: mean share} of log records' {kind: share}."""
    shares = {}
    for record in kept:
        for kind, share in record.items():
            shares.setdefault(kind, []).append(share)
    return {kind: statistics.mean(values) for kind, values in shares.items()}


# --------------------------------------------------------------------------------------------------
# tables


def show_table(args, rows):
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{args.name}, {args.steps} steps, seeds {seeds}: mean (lowest to highest)\n")
    head = [
        "",
        "validation loss",
        "exact match",
        "times fewer tokens than CLM",
        *(f"loss: {kind}" for kind in LOSSES),
        "share kept",
        *(f"of {kind}" for kind in SHOWN),
    ]
    print(f"|{' | '.join(head)} |")
    print("|" + "---|" * len(head))
    for label, runs in rows.items():
        print(f"| {' | '.join([label, *cells_of(runs)])} |")


def cells_of(runs):
    """A row of the table, without its label; runs: `measured` of each seed."""
    cells = [
        spread([r["val_loss"] for r in runs], "{:.3f}"),
        spread([r["exact_match"] for r in runs], "{:.3f}"),
        spread([r["times"] for r in runs], "{:.1f}"),
    ]
    for kind in LOSSES:
        cells.append(spread([r["loss"].get(kind) for r in runs], "{:.3f}", mean_only=True))
    cells.append(spread([r["share"] for r in runs], "{:.2f}", mean_only=True))
    for kind in SHOWN:
        cells.append(spread([r["kept"].get(kind) for r in runs], "{:.0%}", mean_only=True))
    return cells


def spread(values, form, mean_only=False):
    """The seeds' mean, and how far they lie apart; a dash where no seed has a value."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = form.format(statistics.mean(known))
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)} seeds)"
    elif len(known) > 1 and not mean_only:
        text += f" ({form.format(min(known))} to {form.format(max(known))})"
    return text


def show_suggestions(args, rows):
    """What tools.explore pick-k says for each seed, and what it is worth there.

    Returns the suggestions.
    """
    env = Env(argparse.Namespace(device="cpu", dtype="float32", threads=1))
    ks = [k_of(label) for label in rows]
    suggested = []
    print(
        "\n| seed | pick-k says | loss there, between its neighbours | at 0.6 | best of the sweep |"
    )
    print("|---|---|---|---|---|")
    for i, seed in enumerate(args.seeds):
        sets, out = roots(seed)
        data = TokenSet(sets / "corpus")
        excess, valid, _ = pick_k.sample(out / "ref_loss.bin", data, str(out / "base"), 400, env)
        k = pick_k.suggestion(excess[valid])
        suggested.append(k)
        losses = [runs[i]["val_loss"] for runs in rows.values()]
        best = int(np.argmin(losses))
        print(
            f"| {seed} | {k:.2f} | {np.interp(k, ks, losses):.3f} "
            f"| {np.interp(0.6, ks, losses):.3f} | {losses[best]:.3f} (k {ks[best]:g}) |"
        )
    return suggested


def k_of(label):
    return float(label.split()[0])


# --------------------------------------------------------------------------------------------------
# figures


def draw(args, rows):
    """Loss and exact match of each row: a dot for each seed, a bar at their mean."""
    plot = plotting()
    figure, axes = plot.subplots(1, 2, figsize=(8, 0.8 + 0.28 * len(rows)), sharey=True)
    for axis, (key, title) in zip(axes, MEASURES.items()):
        for y, (label, runs) in enumerate(rows.items()):
            values = [r[key] for r in runs if r[key] is not None]
            if not values:
                continue
            colour = colour_of(y, label)
            mean = statistics.mean(values)
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=4.5, alpha=0.75)
            axis.plot([mean, mean], [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
        axis.set(xlabel=title)
    students = [runs for label, runs in rows.items() if not label.startswith("(")]
    if all(r["exact_match"] is None for runs in students for r in runs):
        axes[1].set_visible(False)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[0].set_title(args.name, loc="left", fontsize=9)
    save_figure(figure, Path(args.figures) / f"ablation-{args.name}")


def colour_of(row, label):
    """The method itself, plain training, and all else."""
    if row == 0:
        return COLOURS[0]
    return COLOURS[1] if "CLM" in label else COLOURS[2]


def draw_k(args, rows, suggested):
    """Loss and exact match against k: each seed, their mean, the range of what pick-k suggests."""
    plot = plotting()
    ks = [k_of(label) for label in rows]
    figure, axes = plot.subplots(1, 2, figsize=(8, 3))
    for axis, (key, title) in zip(axes, MEASURES.items()):
        values = np.array([[r[key] for r in runs] for runs in rows.values()], float)  # (k, seeds)
        axis.plot(ks, values, color=COLOURS[7], linewidth=0.8)
        axis.plot(ks, values.mean(1), "o-", color=COLOURS[0], label="mean over seeds")
        axis.axvspan(
            min(suggested) - 0.003,
            max(suggested) + 0.003,
            color=COLOURS[5],
            alpha=0.35,
            linewidth=0,
            label="suggested by pick-k",
        )
        axis.set(xlabel="k (1.0: CLM)", ylabel=title)
    axes[0].legend()
    save_figure(figure, Path(args.figures) / "ablation-k")


if __name__ == "__main__":
    cli(main)
