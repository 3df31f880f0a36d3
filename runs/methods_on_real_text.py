"""What runs/methods_on_real_text.sh needs beside the stages: the runs' flags, and their table.

python -m runs.methods_on_real_text flags --out out/pays --name clean --references clm twice
python -m runs.methods_on_real_text table --data data/pays --out out/pays --seeds 0 1 2
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from common.device import Env  # noqa: F401  first: it sets how torch's threads wait

import methods  # noqa: F401  more scores, by name
import slm
from common.errors import UserError, cli
from runs import when_it_pays
from runs.methods import REFERENCE, passes_of, published
from tools.results import files
from tools.results import methods as methods_tables

NAME = "methods-real-text"
RATE = "2e-3"  # the learning rate of all students of runs/when_it_pays.sh
K = "0.6"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    flags = commands.add_parser("flags", help="a line for each run of a method")
    flags.add_argument("--name", required=True, help="the method")
    flags.add_argument("--references", nargs="+", required=True, help="as when_it_pays.sh has them")
    table = commands.add_parser("table", help="add the finished runs to results, print the table")
    table.add_argument("--data", type=Path, required=True, help="folder of the token sets")
    table.add_argument("--seeds", type=int, nargs="+", required=True)
    for command in (flags, table):
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
        command.add_argument("--rate", type=rate, default=RATE, help="learning rate of all runs")
    args = parser.parse_args()
    {"flags": show_flags, "table": show_table}[args.command](args)


def rate(text):
    """An argument type: a learning rate as folders and results are named after it."""
    if not re.fullmatch(r"[1-9]e-[1-9]", text):
        raise argparse.ArgumentTypeError(f"got {text}, wanted one such as 5e-4")
    return text


def show_flags(args):
    known = ("clm", *slm.SCORES)
    if args.name not in known:
        raise UserError(f"no method is called {args.name}; known: {', '.join(known)}")
    for folder, flags in flags_of(args.name, args.references, args.out, args.rate).items():
        print(folder, flags)


def flags_of(name, references, out, rate=RATE):
    """{folder: flags} of a method, as published: a run for each reference that it looks at."""
    folder = out / within(rate) / f"method-{name}"
    flags = published(name, rate)
    needs = set() if name == "clm" else set(slm.SCORES[name].needs)
    if "base_loss" in needs:
        flags += f" --base-loss {out}/base_loss.bin"
    if not needs & REFERENCE:
        return {str(folder): flags}
    found = {}
    for reference in references:
        found[f"{folder}-{reference}"] = f"{flags} --ref-loss {out}/{reference}_ref_loss.bin"
    return found


def within(rate):
    """The folder of the runs of a rate, in that of all runs."""
    return "" if rate == RATE else f"rate{rate}"


def show_table(args):
    name = NAME if args.rate == RATE else f"{NAME}-{args.rate}"
    experiment = files.load_or_new(name, "bash runs/methods_on_real_text.sh")
    for run in Methods(args.data, args.out, args.seeds).all(args.rate):
        files.add(experiment, run)
    files.save(experiment)
    print("\n".join(methods_tables.on_real_text(experiment)))


class Methods(when_it_pays.Runs):
    """The finished runs in a folder, as records for results/; a variant is a reference's name."""

    def all(self, rate=RATE):
        found = []
        for name in ("clm", *slm.SCORES):
            folder = Path(within(rate)) / f"method-{name}"
            found += self.priced(name, folder, "")
            for reference in when_it_pays.REFERENCES:
                found += self.priced(name, f"{folder}-{reference}", reference)
        if rate == RATE:  # the runs of when_it_pays.sh itself
            found += self.priced("clm", "clm", "")
            for reference in when_it_pays.REFERENCES:
                found += self.priced("excess", f"slm-{reference}-k{K}", reference)
        return found

    def priced(self, name, folder, reference):
        """The seeds' runs of a method, each with what it costs beside training."""
        passes = passes_of(name)
        cost = passes * self.corpus / 3
        runs = self.by_seed(name, folder, reference)
        if runs and reference:
            # `cost` has one pass of scoring with the reference in it.
            trained = self.cost(reference, self.out / f"ref-{reference}")
            cost = trained + (passes - 1) * self.corpus / 3
        numbers = {"passes": passes, "extra_tokens": cost}
        return [replace(run, numbers=run.numbers | numbers) for run in runs]


if __name__ == "__main__":
    cli(main)
