"""The tables of runs/demo.sh's main rows: base, reference, CLM, random and SLM, with intervals."""

import math
import statistics

from tools.compare import table
from tools.results.seeds import (
    MEASURES,
    estimate,
    interval,
    paired,
    runs_of,
    seeds_of,
    span,
    times_fewer,
)

METHODS = {
    "base": "base",
    "ref": "the reference itself",
    "clm": "CLM",
    "random": "random 60 %",
    "slm": "SLM k 0.6",
}
FIRST_SCREEN = {
    "clm": "CLM, every token",
    "random": "random 60 %",
    "slm": "**SLM, k = 0.6**",
    "ref": "the reference itself",
}


def complete(experiment):
    """The runs as `runs_of` has them, and the seeds that have every method of METHODS."""
    runs = runs_of(experiment, "")
    seeds = [s for s in seeds_of(experiment) if all((method, s) in runs for method in METHODS)]
    return runs, seeds


def by_seed(experiment):
    """A row for each method and measure: every seed, then the mean and its interval."""
    runs, seeds = complete(experiment)
    rows = [["", *(f"seed {seed}" for seed in seeds), "mean, 95 % interval"]]
    for key, (name, form) in MEASURES.items():
        for method, label in METHODS.items():
            values = [runs[method, seed].numbers[key] for seed in seeds]
            cells = [format(value, form) for value in values]
            rows.append([f"{label}, {name}", *cells, plain(*estimate(values), form)])
    return table(rows).splitlines()


def differences(experiment):
    """SLM less CLM, and less its reference, seed by seed."""
    runs, seeds = complete(experiment)
    rows = [["SLM less", *(f"seed {seed}" for seed in seeds), "mean, 95 % interval"]]
    for key, (name, form) in MEASURES.items():
        for method in ("clm", "ref"):
            values = [runs["slm", seed].numbers[key] for seed in seeds]
            base = [runs[method, seed].numbers[key] for seed in seeds]
            cells = [format(a - b, "+" + form) for a, b in zip(values, base, strict=True)]
            mean = interval(*paired(values, base), form)
            rows.append([f"{METHODS[method]}, {name}", *cells, mean])
    return table(rows).splitlines()


def first_screen(experiment):
    """README's table: a row for each method, means with their intervals."""
    runs, seeds = complete(experiment)
    rows = [["", "validation loss", "exact match", "times fewer tokens", "with all costs"]]
    fewer = dict(zip(("slm", "costs"), ratios_of(runs, seeds)))
    for method, label in FIRST_SCREEN.items():
        cells = [label]
        for key, form in (("val_loss", ".3f"), ("exact_match", ".0%")):
            values = [runs[method, seed].numbers[key] for seed in seeds]
            cells.append(plain(*estimate(values), form))
        for ratios in fewer.values() if method == "slm" else ():
            middle = statistics.median(ratio or 0.0 for ratio in ratios)
            cells.append(f"{middle:.1f} ({span(ratios, '.1f')})" if None not in ratios else "–")
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    return table(rows).splitlines()


def tokens(experiment):
    """How many times fewer tokens than CLM SLM reads until CLM's final loss.

    The second row adds what the reference costs: its training, and a pass of scoring over what CLM
    reads, at a third of a training step's cost.
    """
    runs, seeds = complete(experiment)
    rows = [["", *(f"seed {seed}" for seed in seeds), "median", "geometric mean, 95 % interval"]]
    alone, whole = ratios_of(runs, seeds)
    for label, ratios in (("SLM k 0.6", alone), ("its reference and scoring counted", whole)):
        cells = [format(ratio, ".1f") if ratio else "never" for ratio in ratios]
        median = statistics.median(ratio or 0.0 for ratio in ratios)
        rows.append([label, *cells, format(median, ".1f"), geometric(ratios)])
    return table(rows).splitlines()


def ratios_of(runs, seeds):
    """CLM's tokens over SLM's, by seed: those that the student reads, and with all costs."""
    alone = [times_fewer(runs["slm", seed], runs["clm", seed]) for seed in seeds]
    whole = []
    for seed, ratio in zip(seeds, alone, strict=True):
        read = runs["clm", seed].numbers["tokens_seen"]
        whole.append(read / (read / ratio + reference_cost(runs, seed)) if ratio else None)
    return alone, whole


def reference_cost(runs, seed):
    """In tokens: a reference's training, and scoring what CLM reads at a third of a step's cost."""
    read = runs["clm", seed].numbers["tokens_seen"]
    return runs["ref", seed].numbers["tokens_seen"] + read / 3


def geometric(ratios):
    """The geometric mean, and the interval that `estimate` gives of the logarithms."""
    if None in ratios:
        return "–"
    mean, half = estimate([math.log(ratio) for ratio in ratios])
    if half is None:
        return format(math.exp(mean), ".1f")
    return f"{math.exp(mean):.1f}, {math.exp(mean - half):.1f} to {math.exp(mean + half):.1f}"


def plain(mean, half, form):
    """A mean that is no difference, as "0.3012 ± 0.0030"."""
    return format(mean, form) if half is None else f"{format(mean, form)} ± {format(half, form)}"
