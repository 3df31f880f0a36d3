"""What runs/methods.sh needs beside the stages: variants, the choice among them, table and figure.

python -m runs.methods names
python -m runs.methods table --names clm excess dft --seeds 71 72 73 --steps 1200
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from common.device import Env  # noqa: F401  first: it sets how torch's threads wait

import methods  # noqa: F401  more scores, by name
import slm
from common.errors import UserError, cli
from common.files import write_atomic
from demo.folders import roots
from tools.explore.lines import PASSES
from tools.results import figures, files
from tools.results.collect import collected, share_kept
from tools.results.methods import KINDS, base_of, loss_of
from tools.results.tables import TABLES, render
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
K = 0.6  # the published one
# In results/: as published, the search, and what it chose on fresh seeds.
NAME, SEARCH, TUNED = "methods", "methods-search", "methods-tuned"
COMMAND = "bash runs/methods.sh"
PUBLISHED_RATE = "2e-3"  # of all in NAME: the demo's students'
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
        add("--stage", choices=("rates", "knobs"), default="rates", help="of the search")
        add("--seeds", type=int, nargs="*", help="seeds whose runs are finished")
        add("--steps", type=int, default=1200, help="of the students")
        add("--out", default="out/methods.json", help="what was chosen")
        add("--figures", default=files.FIGURES, help="folder of the figure")
    args = parser.parse_args()
    {
        "names": show_names,
        "variants": show_variants,
        "choose": show_choose,
        "chosen": show_chosen,
        "table": show_table,
    }[args.command](args)


def at_rates(name, rates):
    """{folder: flags} of a method as published, at each rate."""
    return {f"{name}-{rate}": published(name, rate) for rate in rates}


def at_knobs(name, rate):
    """{folder: flags} of a method's other values of its knob, at one rate. Some have no knob."""
    if name in KNOBS:
        knob, values = KNOBS[name]
        default = slm.SCORES[name].function.__defaults__[0]
        changed = {
            f"{knob}{value:g}": f"--set {knob}={value:g}" for value in values if value != default
        }
    elif name == "clm" or isinstance(slm.SCORES[name], slm.Weight):
        return {}
    else:
        changed = {f"k{k}": f"--k {k}" for k in SHARES if k != K}
    return {
        f"{name}-{text}-{rate}": f"--score {name} {flags} --lr {rate}"
        for text, flags in changed.items()
    }


def published(name, rate):
    """The flags of a method as its paper has it: its knob's default, or k = 0.6."""
    if name == "clm":
        return f"--k 1.0 --lr {rate}"
    weighs = isinstance(slm.SCORES[name], slm.Weight)
    return f"--score {name} {'' if weighs else f'--k {K} '}--lr {rate}"


def rate_of(flags):
    """The learning rate, which stands last in a variant's flags."""
    return flags.split()[-1]


def folder_of(name, seed, steps):
    return roots(seed)[1] / f"methods{steps}" / name


def show_names(args):
    print(*slm.SCORES)


def show_variants(args):
    """A line for each variant of a stage of the search: its folder, and its flags."""
    for folder, flags in tried(args, args.name).items():
        print(folder, flags)


def tried(args, name):
    """{folder: flags} of a stage: the method at each rate, then its knob at the best of them."""
    if args.stage == "rates":
        return at_rates(name, args.rates)
    return at_knobs(name, rate_of(choices_of(args)[name]["flags"]))


def show_choose(args):
    """Of each method's variants so far the one with the lowest mean validation loss.

    Without seeds: each as published, at the first of the rates.
    """
    choices = {} if args.stage == "rates" else choices_of(args)
    search = files.load_or_new(SEARCH, COMMAND)
    for name in args.names:
        choice = choices.setdefault(name, {"losses": {}})
        for folder, flags in tried(args, name).items():
            runs = []
            for seed in args.seeds:
                runs.append(collected(folder_of(folder, seed, args.steps), name, folder))
                files.add(search, runs[-1])
            if not runs:
                choice.setdefault("folder", folder)
                choice.setdefault("flags", flags)
                continue
            loss = loss_of(runs)
            if loss < min(choice["losses"].values(), default=math.inf):
                choice |= {"folder": folder, "flags": flags}
            choice["losses"][folder] = loss
    if args.seeds:
        files.save(search)
    write_atomic(args.out, json.dumps(choices, indent=1))


def show_chosen(args):
    """A method's folder and flags."""
    choice = choices_of(args)[args.name]
    print(choice["folder"], choice["flags"])


def choices_of(args):
    """What was chosen so far. Raises UserError where a method is missing."""
    choices = json.loads(Path(args.out).read_text())
    for name in args.names or [args.name]:
        if name not in choices:
            raise UserError(f"{args.out}: has no {name}; delete it, runs/methods.sh makes it again")
    return choices


# --------------------------------------------------------------------------------------------------
# results, table and figure


def show_table(args):
    """Add the runs to results/; print their tables and draw the figure."""
    choices = choices_of(args)
    searched = any(choice["losses"] for choice in choices.values())
    rate = rate_of(choices[args.names[0]]["flags"])
    if searched:
        made, command = TUNED, COMMAND
    else:
        made = NAME if rate == PUBLISHED_RATE else f"{NAME}-{rate}"
        command = f"TUNE_SEEDS= RATES={rate} {COMMAND}"
    experiment = files.load_or_new(made, command)
    for name in args.names:
        for seed in args.seeds:
            folder = folder_of(choices[name]["folder"], seed, args.steps)
            files.add(experiment, told_apart(record(name, seed, folder), experiment))
    files.save(experiment)
    for table in (made, f"{made} kept"):
        if table in TABLES:
            print("\n".join([*render(table, experiment), ""]))
    if made in figures.FIGURES:
        figures.write(made, Path(args.figures) / made)


def told_apart(run, experiment):
    """CLM from another base than before, such as another processor's: that one's is kept, too."""
    for known in experiment.runs:
        same = (known.method, known.seed, known.variant) == (run.method, run.seed, "")
        if run.method == "clm" and same and base_of(known) != base_of(run):
            return replace(run, variant=run.inputs["init"][:8])
    return run


def record(name, seed, folder):
    """A finished run for results/, with what it kept of each kind of text and what it costs."""
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
