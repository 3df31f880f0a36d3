"""The tables of runs/ablations.sh: a row for each student or reference, beside CLM and SLM.

All differences are taken seed by seed.
"""

import statistics

from tools.compare import table
from tools.results.seeds import (
    cost_in_clm,
    interval,
    less,
    median_times,
    number,
    or_never,
    runs_of,
    savings,
    times_fewer,
)

ROWS = {  # label: folder of the run
    "k": {
        "k 0.3": "slm-k0.3",
        "k 0.4": "slm-k0.4",
        "k 0.5": "slm-k0.5",
        "k 0.6": "slm",
        "k 0.7": "slm-k0.7",
        "k 0.8": "slm-k0.8",
        "k 0.9": "slm-k0.9",
        "CLM (k 1.0)": "clm",
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
        "reference of 80k": "slm-weak-80k",
        "reference of 52k": "slm-weak-52k",
        "reference of 28k": "slm-weak-28k",
        "CLM": "clm",
        "(the reference of 271k itself)": "ref",
        "(the reference of 80k itself)": "weak-80k",
        "(the reference of 52k itself)": "weak-52k",
        "(the reference of 28k itself)": "weak-28k",
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
SMALLER = ("80k", "52k", "28k")  # references of so many parameters, of a student of 271k
REFERENCES = ("ref", *(f"weak-{size}" for size in SMALLER), "narrow", "stale")
COMPARED = {"clm": "less CLM", "slm": "less SLM of 0.6"}
LOSSES = {"problem": "of it problems", "solution": "correct solutions", "end_of_text": "ends"}
SHARES = {"solution": "of solutions", "problem": "problems", "wrong_digits": "wrong digits"}
SHARES |= {"id_hash": "ids", "chatter": "chatter"}


def found(experiment, name, variant=""):
    """{label: its runs, one a seed} of an ablation, and all runs by (method, seed).

    Only seeds that every row has that has any: all means are over the same.
    """
    runs = runs_of(experiment, variant)
    made = {label: method for label, method in ROWS[name].items() if seeds_of(runs, method)}
    seeds = [seeds_of(runs, method) for method in made.values()]
    common = sorted(set.intersection(*seeds)) if seeds else []
    rows = {}
    for label, method in made.items():
        if common:
            rows[label] = [runs[method, seed] for seed in common]
    return rows, runs


def seeds_of(runs, method):
    return {seed for name, seed in runs if name == method}


def losses_and_shares(experiment, name, variant=""):
    """Losses with their intervals, exact match, what is kept. Markdown, as lines."""
    head = ["", "seeds", "validation loss", *(f"{title}, 95 %" for title in COMPARED.values())]
    head += ["exact match", "times fewer tokens", *LOSSES.values(), "share kept"]
    lines = [[*head, *SHARES.values()]]
    rows, runs = found(experiment, name, variant)
    for label, own in rows.items():
        cells = [label, str(len(own)), number(mean_of(own, "val_loss"), ".3f")]
        cells += [difference(own, runs, method) for method in COMPARED]
        cells.append(number(mean_of(own, "exact_match"), ".2f"))
        student = own[0].method not in REFERENCES
        ratios = [times_fewer(run, runs["clm", run.seed]) or 0.0 for run in own]
        cells.append(median_times(ratios) if student and own[0].method != "clm" else "–")
        cells += [number(mean_of(own, f"loss_{kind}"), ".3f") for kind in LOSSES]
        cells.append(number(mean_of(own, "share"), ".2f") if student else "–")
        shares = [mean_of(own, f"kept_{kind}") for kind in SHARES]
        cells += [number(share if student else None, ".0%") for share in shares]
        lines.append(cells)
    return table(lines).splitlines()


def mean_of(runs, key):
    """The mean over seeds; None where one of them lacks it."""
    values = [run.numbers.get(key) for run in runs]
    return None if None in values else statistics.mean(values)


def difference(own, runs, method):
    """Validation losses less those of CLM or SLM with the same seeds; a dash for itself."""
    if own[0].method == method or any((method, run.seed) not in runs for run in own):
        return "–"
    return interval(*less(own, [runs[method, run.seed] for run in own]), ".3f")


def by_k(experiment, variant="", key="val_loss"):
    """(ks, {seed: losses at these k}) of the seeds that have every k that any seed has."""
    rows, runs = found(experiment, "k", variant)
    methods = {run.method: k_of(run) for own in rows.values() for run in own}
    losses = {}
    for seed in sorted(seed for method, seed in runs if method == "slm"):
        own = [runs.get((method, seed)) for method in methods]
        if None not in own:
            losses[seed] = [run.numbers[key] for run in own]
    return list(methods.values()), losses


def k_of(run):
    return run.arguments.get("k", 1.0)


def price(experiment, variant=""):
    """What a reference of each size costs and saves. Costs are in tokens of training the student:
    a smaller model's tokens count by its share of the student's parameters.
    """
    head = ["reference's parameters", "of the student's", "seeds", "its cost, tokens"]
    head += ["SLM less CLM, 95 %", "times fewer tokens", "with all costs, lowest"]
    lines = [[*head, "median", "highest"]]
    _, runs = found(experiment, "weak", variant)
    for own in priced(experiment, variant):
        numbers = own[0].numbers
        share = numbers["reference_parameters"] / numbers["parameters"]
        fewer, cheaper = savings(own, [runs["clm", run.seed] for run in own])
        lines.append(
            [
                f"{numbers['reference_parameters']:,}",
                f"{share:.0%}",
                str(len(own)),
                f"{mean_of(own, 'extra_tokens'):,.0f}",
                difference(own, runs, "clm"),
                median_times(fewer),
                *(or_never(times(cheaper)) for times in (min, statistics.median, max)),
            ]
        )
    return table(lines).splitlines()


def priced(experiment, variant=""):
    """The runs, one a seed, of each student whose reference's price is known."""
    rows, _ = found(experiment, "weak", variant)
    return [own for own in rows.values() if "extra_tokens" in own[0].numbers]


def prices(experiment):
    """[(reference's size, total cost of SLM in costs of CLM, (its loss less CLM's, half))]."""
    _, runs = found(experiment, "weak")
    points = []
    for own in priced(experiment):
        clm = [runs["clm", run.seed] for run in own]
        size = f"{round(own[0].numbers['reference_parameters'] / 1000)}k"
        points.append((size, statistics.mean(map(cost_in_clm, own, clm)), less(own, clm)))
    return points
