"""What runs/ablations.sh needs beside the stages: an ablation's table and figure.

python -m runs.ablations table --name score --seeds 41 42 43
python -m runs.ablations narrow --seed 41 --out data/demo-seed41/narrow.jsonl
"""

import argparse
from dataclasses import replace
from pathlib import Path

import common.device  # noqa: F401  first: it sets how torch's threads wait

from common.errors import UserError, cli
from demo.folders import roots
from runs.narrow import show_templates, write_narrow
from tools.explore.figures import save_figure
from tools.explore.lines import parameters
from tools.results import files
from tools.results.ablations import (
    LOSSES,
    REFERENCES,
    ROWS,
    SHARES,
    SMALLER,
    losses_and_shares,
    price,
)
from tools.results.collect import collected, share_kept
from tools.results.figures import FIGURES, ablation, ablation_of_k, write
from training import finished

NAME = "ablations"
STEPS = 1200  # the demo's students
# Whose reference's price is counted.
PRICED = {"slm": "ref"} | {f"slm-weak-{size}": f"weak-{size}" for size in SMALLER}


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
    add("--figures", default=files.FIGURES, help="folder for the figure")
    add = commands.add_parser("narrow", help="curated problems of one template only").add_argument
    add("--seed", type=int, default=0, help="the demo's seed")
    add("--out", required=True, help="where they go (FILE.jsonl)")
    args = parser.parse_args()
    {"table": show, "narrow": write_narrow}[args.command](args)


def show(args):
    """Add the runs to results/ablations.json; print the table, draw the figure, name what lacks."""
    variant = "" if args.steps == STEPS else f"steps{args.steps}"
    experiment = files.load_or_new(NAME, "bash runs/ablations.sh all")
    missing, added = [], False
    for method in ROWS[args.name].values():
        for seed in args.seeds:
            folder = folder_of(method, seed, args.steps)
            if finished.is_finished(folder):
                files.add(experiment, record(folder, method, seed, variant))
                added = True
            else:
                missing.append(str(folder))
    if not added:
        raise UserError(
            f"--seeds: none of the runs is finished; make them with runs/ablations.sh {args.name}"
        )
    files.save(experiment)
    print("\n".join(losses_and_shares(experiment, args.name, variant)))
    if args.name == "weak":
        print("\n".join(["", *price(experiment, variant)]))
    out = Path(args.figures) / f"ablation-{args.name}"
    if f"ablation-{args.name}" in FIGURES and not variant:
        write(f"ablation-{args.name}", out)
    else:
        draw = ablation_of_k if args.name == "k" else ablation(args.name)
        save_figure(draw(experiment, variant), f"{out}-{variant}" if variant else out)
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


def record(folder, method, seed, variant):
    """A finished run for results/, with its loss on each kind of text and what it kept of it."""
    run = collected(folder, method, variant)
    log = finished.steps(folder)
    losses = log[-1].get("val_loss_by_kind", {})
    numbers = {f"loss_{kind}": losses.get(kind) for kind in LOSSES}
    numbers |= {f"kept_{kind}": share_kept(log, kind) for kind in SHARES}
    numbers["share"] = run.numbers["tokens_selected"] / run.numbers["tokens_seen"]
    out = roots(seed)[1]
    if method in PRICED and (out / PRICED[method]).exists():
        numbers |= price_of(folder, out / PRICED[method], run.numbers["tokens_seen"])
    return replace(run, numbers=run.numbers | numbers)


def price_of(student, reference, read):
    """What a reference costs, in tokens of training the student: 6 N FLOPs each, N its parameters.

    Its training, and scoring what the student reads at 2 N_ref FLOPs a token. Where it did not
    start from the student's own base, its base's training, too.
    """
    saved = finished.arguments(reference)
    tokens = finished.summary(reference)["tokens_seen"] + read / 3
    if saved["init"] != finished.arguments(student)["init"]:
        tokens += finished.summary(saved["init"])["tokens_seen"]
    own, its = parameters(student), parameters(reference)
    return {
        "parameters": own,
        "reference_parameters": its,
        "extra_tokens": tokens * its / own,
    }


if __name__ == "__main__":
    cli(main)
