"""The tables of runs/when_it_pays.sh: what SLM gains, beside how far its reference is ahead.

The lead of a reference is the validation loss of what stands beside it minus its own, in nats: of
the base where students start, and of CLM's end. A gain is CLM's loss minus the student's, of the
same seed. All tokens are tokens of plain training of the student.
"""

import math
import statistics
from dataclasses import dataclass, replace

from tools.compare import table
from tools.results import ablations
from tools.results.demo import reference_cost
from tools.results.seeds import (
    cost_in_clm,
    interval,
    median_times,
    number,
    paired,
    runs_of,
    savings,
)

EARLY = 0.25  # the share of CLM's tokens at which the early gain is read
OTHERS = {
    "base": "base, where all start",
    "clm": "CLM",
    "random": "random 60 %",
    "oracle": "CLM on what a parser cuts out",
    "clm-tuned": "CLM, then fine-tuned on the curated set",
}


@dataclass
class Point:
    """SLM of one reference at one k."""

    name: str  # of the reference
    k: float
    reference_loss: float
    lead_at_start: float  # over the base
    lead_at_end: float  # over CLM's end, mean over the seeds
    losses: list[float]  # SLM's end, one a seed, as all that follows
    clm: list[float]
    early: list[float]
    clm_early: list[float]
    fewer: list[float]  # times fewer tokens to CLM's final loss; 0: it never gets there
    cheaper: list[float]  # the same with the reference and scoring counted
    costs: list[float]  # in all, in costs of CLM

    @property
    def is_shown(self):
        """Is it in the figures? One reference throughout, at k = 0.6."""
        return self.k == 0.6 and ", then " not in self.name

    @property
    def gain(self):
        """(mean, half of the 95 % interval or None) at the end."""
        return paired(self.clm, self.losses)

    @property
    def early_gain(self):
        return paired(self.clm_early, self.early)


def at(curve, tokens):
    """A curve's loss at so many tokens, between the two validations around them."""
    before = curve[0]
    for point in curve:
        if point[0] >= tokens:
            if point[0] == before[0]:
                return point[1]
            share = (tokens - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def points(experiment):
    """A `Point` for each reference and k, the weakest reference first."""
    runs = {(run.method, run.seed, run.variant): run for run in experiment.runs}
    variants = sorted({run.variant for run in experiment.runs if run.method == "slm"})
    found = []
    for variant in variants:
        slm = [run for run in experiment.runs if run.method == "slm" and run.variant == variant]
        slm = [run for run in slm if ("clm", run.seed, "") in runs]
        for own in by_base(slm):
            clm = [runs["clm", run.seed, ""] for run in own]
            _, base = clm[0].curve[0]
            found.append(_point(base, clm, own))
    return sorted(found, key=lambda point: (-point.reference_loss, point.name, point.k))


def by_base(slm):
    """Runs of one variant, those from one base together: another machine's base has its own row.

    Those that went on from the middle of a run have a start of their own each, by design.
    """
    bases = {}
    for run in slm:
        start = "" if ", then " in run.variant else run.inputs.get("init")
        bases.setdefault(start, []).append(run)
    return list(bases.values())


def _point(base, clm, slm):
    """The `Point` of runs with one variant; clm: those of the same seeds; base: its loss."""
    ends = [run.curve[-1] for run in clm]
    references = [run.numbers["reference_loss"] for run in slm]  # one, or made for each seed
    reference_loss = statistics.mean(references)
    name, _, k = slm[0].variant.rpartition(" ")
    fewer, cheaper = savings(slm, clm)
    return Point(
        name=name,
        k=float(k),
        reference_loss=reference_loss,
        lead_at_start=base - reference_loss,
        lead_at_end=statistics.mean(loss for _, loss in ends) - reference_loss,
        losses=[run.numbers["val_loss"] for run in slm],
        clm=[loss for _, loss in ends],
        early=[at(run.curve, EARLY * tokens) for run, (tokens, _) in zip(slm, ends)],
        clm_early=[at(run.curve, EARLY * tokens) for run, (tokens, _) in zip(clm, ends)],
        fewer=fewer,
        cheaper=cheaper,
        costs=[cost_in_clm(run, plain) for run, plain in zip(slm, clm)],
    )


def of_demo(experiment):
    """The demo's reference as a `Point`."""
    runs = runs_of(experiment, "")
    seeds = sorted(seed for method, seed in runs if method == "slm")
    base = statistics.mean(runs["base", seed].numbers["val_loss"] for seed in seeds)
    slm = []
    for seed in seeds:
        reference = {
            "reference_loss": runs["ref", seed].numbers["val_loss"],
            "extra_tokens": reference_cost(runs, seed),
        }
        run = runs["slm", seed]
        slm.append(replace(run, variant="271k 0.6", numbers=run.numbers | reference))
    return _point(base, [runs["clm", seed] for seed in seeds], slm)


def of_smaller(experiment):
    """A `Point` of the demo for each reference that is smaller than the student (ablations)."""
    runs = runs_of(experiment, "")
    found = []
    for size in ablations.SMALLER:
        seeds = sorted(seed for method, seed in runs if method == f"slm-weak-{size}")
        slm = []
        for seed in seeds:
            run = runs[f"slm-weak-{size}", seed]
            loss = {"reference_loss": runs[f"weak-{size}", seed].numbers["val_loss"]}
            slm.append(replace(run, variant=f"{size} 0.6", numbers=run.numbers | loss))
        clm = [runs["clm", seed] for seed in seeds]
        if slm:  # students start from the base of 271k, of which no run is kept there
            found.append(_point(math.nan, clm, slm))
    return found


def prices(experiment):
    """[(reference, total cost of SLM at k = 0.6 in costs of CLM, (its loss less CLM's, half))]."""
    shown = [point for point in points(experiment) if point.is_shown]
    return [(p.name, statistics.mean(p.costs), paired(p.losses, p.clm)) for p in shown]


def by_reference(experiment):
    """A row for each reference and k, as Markdown lines."""
    head = ["reference", "its loss", "lead over the base", "over CLM's end", "k", "seeds", "SLM"]
    head += ["gain, 95 % interval", f"gain after {EARLY:.0%}", "times fewer tokens"]
    rows = [[*head, "times less cost"]]
    for point in points(experiment):
        rows.append(
            [
                point.name,
                number(point.reference_loss, ".3f"),
                number(point.lead_at_start, "+.3f"),
                number(point.lead_at_end, "+.3f"),
                number(point.k, "g"),
                str(len(point.losses)),
                number(statistics.mean(point.losses), ".3f"),
                interval(*point.gain, ".3f"),
                interval(*point.early_gain, ".3f"),
                median_times(point.fewer),
                median_times(point.cheaper),
            ]
        )
    return table(rows).splitlines()


def others(experiment):
    """The runs without a reference's choice, and how they differ from CLM."""
    rows = [["", "seeds", "validation loss", "gain over CLM, 95 % interval"]]
    runs = {(run.method, run.seed): run for run in experiment.runs if run.variant == ""}
    for method, label in OTHERS.items():
        seeds = sorted(seed for name, seed in runs if name == method)
        if not seeds:
            continue
        losses = [runs[method, seed].numbers["val_loss"] for seed in seeds]
        gain = "–"
        compared = method not in ("base", "clm")
        if compared and all(("clm", seed) in runs for seed in seeds):
            clm = [runs["clm", seed].numbers["val_loss"] for seed in seeds]
            gain = interval(*paired(clm, losses), ".3f")
        rows.append([label, str(len(seeds)), number(statistics.mean(losses), ".3f"), gain])
    return table(rows).splitlines()
