"""What is read off an experiment's runs: by seed, along a curve, as a difference."""

import statistics

from training.finished import reached

MEASURES = {"val_loss": ("validation loss", ".4f"), "exact_match": ("exact match", ".3f")}
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T95 |= {10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145}
NORMAL95 = 1.95996  # what it comes down to


def runs_of(experiment, variant):
    """{(method, seed): run} of one variant."""
    return {(run.method, run.seed): run for run in experiment.runs if run.variant == variant}


def seeds_of(experiment):
    return sorted({run.seed for run in experiment.runs})


def times_fewer(student, clm):
    """CLM's tokens over those until a student stays at CLM's final loss or below, or None."""
    tokens = reached(student.curve, clm.curve[-1][1])
    return clm.numbers["tokens_seen"] / tokens if tokens else None


def savings(own, clm):
    """Times fewer tokens to CLM's final loss, and the same with a run's `extra_tokens` counted.

    Two lists, one value a seed; 0 where a run ends above that loss, which is the worst.
    """
    fewer, cheaper = [], []
    for run, base in zip(own, clm, strict=True):
        tokens, loss = base.curve[-1]
        needed = reached(run.curve, loss)
        fewer.append(tokens / needed if needed else 0.0)
        cheaper.append(tokens / (needed + run.numbers["extra_tokens"]) if needed else 0.0)
    return fewer, cheaper


def cost_in_clm(run, clm):
    """What a run costs in all, its reference and scoring included, in costs of CLM."""
    tokens = run.numbers["tokens_seen"] + run.numbers["extra_tokens"]
    return tokens / clm.numbers["tokens_seen"]


def median_times(ratios):
    """The median of `savings`, as text."""
    return or_never(statistics.median(ratios))


def or_never(ratio):
    """One of `savings`, as text."""
    return number(ratio, ".2f") if ratio else "never"


def number(value, form):
    return "–" if value is None else format(value, form)


def span(values, form):
    """The lowest and the highest, as text."""
    return f"{format(min(values), form)} to {format(max(values), form)}"


def estimate(values):
    """(mean, half of its 95 % interval by Student's t).

    The half is None of one value.
    """
    if len(values) == 1:
        return values[0], None
    half = t95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def t95(freedom):
    """Student's t, two-sided 95 %; above the table by its expansion, right to the third digit."""
    if freedom in T95:
        return T95[freedom]
    z = NORMAL95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def paired(values, base):
    """The `estimate` of the differences of two lists, seed by seed."""
    return estimate([a - b for a, b in zip(values, base, strict=True)])


def less(own, base):
    """The `estimate` of the validation losses of runs less those of others, seed by seed."""
    losses = ([run.numbers["val_loss"] for run in side] for side in (own, base))
    return paired(*losses)


def interval(mean, half, form):
    """As "+0.0012 ± 0.0030"."""
    return f"{mean:+{form}}" if half is None else f"{mean:+{form}} ± {format(half, form)}"
