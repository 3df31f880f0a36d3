"""The table of runs/demo.sh: every row over several seeds, with the spread, as Markdown.

python -m demo.table --seeds 21 22 23 24 25
"""

import argparse
import statistics

from common.errors import UserError, cli
from demo.chain import tokens_to_reach
from demo.folders import roots
from training.finished import steps, summary

ROWS = {
    "base": "base (where all start)",
    "clm": "CLM",
    "random": "random 60 %",
    "slm": "**SLM k 0.6**",
    "mixed1": "CLM, curated set mixed in once",
    "mixed8": "CLM, curated set mixed in eight times",
    "ref": "the reference itself",
    "clm-tuned": "CLM, then fine-tuned as the reference was",
    "slm-tuned": "SLM, then fine-tuned as the reference was",
}


def run_folder(name, seed):
    return roots(seed)[1] / name


def print_row(*cells):
    print("| " + " | ".join(cells) + " |")


def print_head(*cells):
    """A table's first row and the rule below it; the first column has no title."""
    print("| | " + " | ".join(cells) + " |")
    print("|---" * (len(cells) + 1) + "|")


def spread(values):
    """Mean and standard deviation over seeds, as text; a single seed has no deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def print_results(seeds):
    """Final validation loss / exact match of every run."""
    print_head(*[f"seed {seed}" for seed in seeds], "mean ± sd")
    for name, label in ROWS.items():
        losses = []
        matches = []
        for seed in seeds:
            done = summary(run_folder(name, seed), f"{name} of seed {seed}, made by runs/demo.sh")
            losses.append(done["val_loss"])
            matches.append(done["exact_match"])
            if None in (losses[-1], matches[-1]):
                raise UserError(
                    f"{name} of seed {seed}: has no validation loss or no exact match; "
                    f"runs/demo.sh makes them"
                )
        cells = [f"{loss:.3f} / {match:.3f}" for loss, match in zip(losses, matches)]
        print_row(label, *cells, f"{spread(losses)} / {spread(matches)}")


def loss_on_all(record):
    """A log record's validation loss; None where it was not measured."""
    return record.get("val_loss")


def loss_on_solutions(record):
    """The same over the tokens of correct solutions alone."""
    by_kind = record.get("val_loss_by_kind") or {}
    return by_kind.get("solution")


def times_fewer(name, seed, loss):
    """CLM's tokens over those after which a run stays at CLM's final loss or below, or None."""
    final = steps(run_folder("clm", seed))[-1]
    reached = tokens_to_reach(run_folder(name, seed), loss(final), loss)
    return final["tokens_seen"] / reached if reached else None


def shown(ratio):
    return f"{ratio:.1f}" if ratio else "never"


def print_ratios(seeds):
    """How many times fewer tokens than CLM a run needs. A run that never gets there counts as 0."""
    print_head(*[f"seed {seed}" for seed in seeds], "median")
    losses = {"all tokens": loss_on_all, "correct solutions only": loss_on_solutions}
    for name in ("slm", "random"):
        for tokens, loss in losses.items():
            ratios = [times_fewer(name, seed, loss) for seed in seeds]
            median = statistics.median(ratio or 0 for ratio in ratios)
            print_row(f"{ROWS[name]}, loss on {tokens}", *map(shown, ratios), shown(median))


def print_kept(seeds):
    """The share that SLM keeps of each kind of text, the most kept first."""
    print("| kind | kept |\n|---|---|")
    kept = {}
    for seed in seeds:
        last = steps(run_folder("slm", seed))[-100:]
        for kind in last[-1]["kept"]:
            shares = [record["kept"][kind] for record in last if kind in record["kept"]]
            kept.setdefault(kind, []).extend(shares)
    means = {kind: statistics.mean(shares) for kind, shares in kept.items()}
    for kind in sorted(means, key=means.get, reverse=True):
        print_row(kind, f"{means[kind]:.0%}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", required=True, help="seeds whose runs are finished"
    )
    seeds = parser.parse_args().seeds

    print("Validation loss / exact match on 1,000 problems:\n")
    print_results(seeds)
    print("\nTimes fewer tokens than CLM until a run stays at CLM's final validation loss:\n")
    print_ratios(seeds)
    print("\nShare kept of each kind by SLM, last 100 steps, mean over seeds:\n")
    print_kept(seeds)


if __name__ == "__main__":
    cli(main)
