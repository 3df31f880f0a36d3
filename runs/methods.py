"""What runs/methods.sh needs beside the stages: variants, the choice among them, table and figure.

python -m runs.methods names
python -m runs.methods table --names clm excess dft --seeds 71 72 73 --steps 1200
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from common.device import Env  # noqa: F401  first: it sets how torch's threads wait

import methods  # noqa: F401  more scores, by name
import slm
from common.errors import UserError, cli
from common.files import write_atomic
from demo.chain import roots
from tools.explore.lines import PASSES
from tools.results import figures, files
from tools.results.collect import collected, share_kept
from tools.results.methods import KINDS
from tools.results.tables import render
from training import finished

KNOBS = {  # a method's one number, and three values of it; the published one is among them
    "mile": ("gamma", (0.5, 1, 2)),
    "profit": ("tau", (0.03, 0.1, 0.3)),
    "memft": ("tau", (0.3, 0.5, 0.7)),
    "ent": ("tau", (1.2, 1.3, 1.4)),
    "eaft": ("power", (0.5, 1, 2)),
    "soft_excess": ("floor", (0.25, 0.5, 0.75)),
    "sigmoid_excess": ("tau", (0.3, 1, 3)),
    "longce": ("most", (2, 5, 10)),
}
SHARES = (0.4, 0.6, 0.8)  # k, the knob of those that rank
NAME = "methods"
REFERENCE = {"ref_loss", "ref_entropy"}  # what a reference gives


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("names", help="of all methods")
    for name in ("variants", "choose", "chosen", "table"):
        add = commands.add_parser(name).add_argument
        add("--name", help="a method, or clm")
        add("--names", nargs="+", help="methods, and clm")
        add("--rates", nargs="+", default=["1e-3"], help="learning rates")
        add("--seeds", type=int, nargs="*", help="seeds whose runs are finished")
        add("--steps", type=int, default=1200, help="of the students")
        add("--out", default="out/methods.json", help="what was chosen")
        add("--figures", default="figures", help="folder of the figure")
    args = parser.parse_args()
    globals()[f"show_{args.command}"](args)


def variants(name, rates):
    """{folder: flags} of a method's variants."""
    found = {}
    for rate in rates:
        for knob in knobs_of(name):
            text = knob.replace("--set ", "").replace("--k ", "k").replace("=", "")
            folder = "-".join(part for part in (name, text, rate) if part)
            score = "--k 1.0" if name == "clm" else f"--score {name}"
            found[folder] = f"{score} {knob} --lr {rate}".replace("  ", " ")
    return found


def knobs_of(name):
    """The flags for each value of a method's knob; one empty text where it has none."""
    if name == "clm":
        return [""]
    if name in KNOBS:
        knob, values = KNOBS[name]
        return [f"--set {knob}={value:g}" for value in values]
    if isinstance(slm.SCORES[name], slm.Weight):
        return [""]
    return [f"--k {k}" for k in SHARES]


def folder_of(name, seed, steps):
    return roots(seed)[1] / f"methods{steps}" / name


def show_names(args):
    print(*slm.SCORES)


def show_variants(args):
    for folder, flags in variants(args.name, args.rates).items():
        print(folder, flags)


def published(name, rate):
    """The flags of a method as its paper has it: its knob's default, or k = 0.6."""
    if name == "clm":
        return f"--k 1.0 --lr {rate}"
    weighs = isinstance(slm.SCORES[name], slm.Weight)
    return f"--score {name} {'' if weighs else '--k 0.6 '}--lr {rate}"


def show_choose(args):
    """Of each method's variants the one with the lowest mean validation loss.

    Without seeds: each as published, at the first of the rates.
    """
    chosen = {}
    for name in args.names:
        losses = {}
        if not args.seeds:
            chosen[name] = {"flags": published(name, args.rates[0]), "losses": losses}
            continue
        for folder, flags in variants(name, args.rates).items():
            runs = [folder_of(f"tune/{folder}", seed, args.steps) for seed in args.seeds]
            losses[flags] = statistics.mean(finished.summary(run)["val_loss"] for run in runs)
        best = min(losses, key=losses.get)
        chosen[name] = {"flags": best, "losses": losses}
        print(f"{name}: {best}")
    write_atomic(args.out, json.dumps(chosen, indent=1))


def show_chosen(args):
    chosen = json.loads(Path(args.out).read_text())
    if args.name not in chosen:
        raise UserError(
            f"{args.out}: has no {args.name}; delete it, runs/methods.sh makes it again"
        )
    print(chosen[args.name]["flags"])


# --------------------------------------------------------------------------------------------------
# results, table and figure


def show_table(args):
    """Add the runs to results/methods.json; print its tables and draw the figure."""
    experiment = files.load_or_new(NAME, "bash runs/methods.sh")
    for name in args.names:
        for seed in args.seeds:
            files.add(experiment, record(name, seed, args.steps))
    files.save(experiment)
    for table in (NAME, f"{NAME} kept"):
        print("\n".join([*render(table, experiment), ""]))
    figures.write(NAME, Path(args.figures) / NAME)


def record(name, seed, steps):
    """A finished run for results/, with what it kept of each kind of text and what it costs."""
    folder = folder_of(name, seed, steps)
    run = collected(folder, name)
    log = finished.steps(folder)
    shares = {f"kept_{kind}": share_kept(log, kind) for kind in KINDS}
    costs = {"passes": passes_of(name), "extra_tokens": extra_tokens(name, folder, seed)}
    return replace(run, numbers=run.numbers | shares | costs)


def passes_of(name):
    """Forward passes over the corpus beside training, by models of the student's size."""
    needs = set() if name == "clm" else set(slm.SCORES[name].needs)
    stored = sum(passes for field, passes in PASSES.items() if field in needs)
    return stored + bool(needs & REFERENCE)


def extra_tokens(name, folder, seed):
    """In tokens of training: a third of the corpus for each pass, and the reference's training."""
    saved = finished.arguments(folder)
    tokens = passes_of(name) * saved["steps"] * saved["batch_size"] * saved["seq_len"] / 3
    if name != "clm" and REFERENCE & set(slm.SCORES[name].needs):
        tokens += finished.summary(roots(seed)[1] / "ref")["tokens_seen"]
    return tokens


if __name__ == "__main__":
    cli(main)
