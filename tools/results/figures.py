"""The figures of README and docs that are made from results/. Each notes what it was made from:

an SVG's description holds a hash of its results and of the code that draws them, so that `python -m
tools.results` draws it again when one of them changes, and `--check` can say so without drawing.
"""

import hashlib
import re
import statistics
from pathlib import Path

import numpy as np

from tools.explore.figures import COLOURS, DASHES, plotting, save_figure
from tools.results import ablations, pays
from tools.results.demo import reference_cost
from tools.results.files import FIRST, ROOT, load, path_of
from tools.results.methods import ranked
from tools.results.seeds import MEASURES, cost_in_clm, less, runs_of

MADE_FROM = re.compile(r"made from results of sha256 ([0-9a-f]{64})")


def update(check):
    """Draw every figure again whose results changed, or only compare; returns their names."""
    differ = []
    for name, (experiments, _) in FIGURES.items():
        if not all(path_of(experiment).exists() for experiment in experiments):
            continue
        out = ROOT / "figures" / name
        found = MADE_FROM.search(text_of(out.with_suffix(".svg")))
        if found and found[1] == digest(experiments):
            continue
        differ.append(f"figures/{name}.svg")
        if not check:
            write(name, out, [".svg"])
    return differ


def text_of(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def digest(experiments):
    """The hash of the experiments' files, and of this folder's."""
    found = hashlib.sha256()
    for path in [*map(path_of, experiments), *sorted(Path(__file__).parent.glob("*.py"))]:
        found.update(path.read_bytes())
    return found.hexdigest()


def write(name, out, suffixes=(".png", ".svg")):
    """Draw the figure `name` into `out`.png and `out`.svg. Raises UserError without matplotlib."""
    experiments, draw = FIGURES[name]
    experiments = [experiment for experiment in experiments if path_of(experiment).exists()]
    figure = draw(*map(load, experiments))
    save_figure(figure, out, f"made from results of sha256 {digest(experiments)}", suffixes)


# --------------------------------------------------------------------------------------------------
# runs/demo.sh


def effect(experiment):
    """Validation loss against tokens read, and against cost with reference and scoring counted."""
    runs = runs_of(experiment, "")
    seeds = sorted(seed for method, seed in runs if method == "slm")
    figure, axes = plotting().subplots(1, 2, figsize=(9, 3.4), sharey=True)
    end = statistics.mean(runs["clm", seed].numbers["val_loss"] for seed in seeds)
    for i, (method, label) in enumerate({"clm": "CLM", "slm": "SLM, k = 0.6"}.items()):
        curves = np.array([runs[method, seed].curve for seed in seeds])  # (seeds, points, 2)
        tokens, losses = curves[..., 0].mean(0), curves[..., 1]
        cost = 0.0
        if method == "slm":
            cost = statistics.mean(reference_cost(runs, seed) for seed in seeds)
        for axis, x in zip(axes, (tokens, tokens + cost)):
            x = x / 1e6
            axis.plot(x, losses.mean(0), color=COLOURS[i], linestyle=DASHES[i], label=label)
            axis.fill_between(
                x, losses.min(0), losses.max(0), color=COLOURS[i], alpha=0.16, linewidth=0
            )
    for axis in axes:
        axis.axhline(end, color="#666", linewidth=0.8, linestyle=":", label="CLM's end, mean")
    axes[0].set(xlabel="tokens read, millions", ylabel="validation loss, nats")
    axes[1].set(xlabel="cost, millions of training tokens\n(reference and scoring included)")
    axes[0].legend()
    return figure


# --------------------------------------------------------------------------------------------------
# runs/when_it_pays.sh


def when_it_pays(*experiments):
    """Gains against the lead over CLM's end: a point for each reference at k = 0.6.

    Of runs/when_it_pays.sh, and where they are there of runs/demo.sh and runs/ablations.sh.
    """
    made = {experiment.experiment: experiment for experiment in experiments}
    figure, axes = plotting().subplots(figsize=(7, 4.2))
    shown = {"real text": [p for p in pays.points(made["when-it-pays"]) if p.is_shown], "demo": []}
    if "demo" in made:
        shown["demo"].append(pays.of_demo(made["demo"]))
    if "ablations" in made:
        shown["demo"] += pays.of_smaller(made["ablations"])
    for text, points in shown.items():
        for i, (when, marker) in enumerate({"at the end": "o", "after a quarter": "^"}.items()):
            gains = [point.early_gain if i else point.gain for point in points]
            axes.errorbar(
                [point.lead_at_end for point in points],
                [mean for mean, _ in gains],
                yerr=[half or 0.0 for _, half in gains],
                fmt=marker,
                capsize=2,
                color=COLOURS[i],
                markerfacecolor="white" if text == "demo" else COLOURS[i],
                label=f"{text}, {when}",
            )
        places = [(point.lead_at_end, point.gain[0]) for point in points]
        for point, place in zip(points, places):
            name(axes, point.name, place, right=has_near_left(place, places))
    axes.margins(x=0.12)
    axes.axhline(0, color="#666", linewidth=0.8)
    axes.axvline(0, color="#666", linewidth=0.8, linestyle=":")
    axes.set(xlabel="the reference's lead over CLM's end, nats", ylabel="SLM's gain over CLM, nats")
    axes.legend(fontsize=8)
    return figure


def has_near_left(place, places):
    """Is one of `places` so close to the left of `place` that its name would be written over it?"""
    x, y = place
    return any(0 < x - other < 0.03 and abs(y - its) < 0.01 for other, its in places)


def name(axes, text, place, right=False):
    """Write a point's name beside it, readable over lines: to its left, or to its right."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    where = {"xytext": (-5, 5), "textcoords": "offset points", "ha": "right"}
    if right:
        where |= {"xytext": (5, 5), "ha": "left"}
    axes.annotate(text, place, fontsize=8, zorder=10, path_effects=halo, **where)


# --------------------------------------------------------------------------------------------------
# runs/methods.sh


def methods(experiment):
    """A row for each method, the best first: its loss less CLM's; its total cost as colour."""
    names, runs, beside = ranked(experiment)
    figure, axes = plotting().subplots(figsize=(7, 0.3 * len(names) + 1))
    cost = {}
    for name in names:
        cost[name] = round(cost_in_clm(runs[name][0], beside[name][0]), 2)
    costs = sorted(set(cost.values()))
    for row, name in enumerate(names):
        middle, half = less(runs[name], beside[name])
        colour = COLOURS[costs.index(cost[name]) % len(COLOURS)]
        axes.errorbar(middle, row, xerr=half or 0.0, fmt="o", capsize=2, color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="#666", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.05)  # a few methods are far behind
    axes.set_xticks([-0.05, -0.02, 0, 0.02, 0.05, 0.2, 1], "-.05 -.02 0 .02 .05 .2 1".split())
    axes.set_xlabel("validation loss less CLM's, nats")
    for times, colour in zip(costs, COLOURS):
        axes.plot([], [], "o", color=colour, label=f"{times:g} times CLM's cost")
    axes.legend()
    return figure


# --------------------------------------------------------------------------------------------------
# runs/ablations.sh


def ablation(name):
    """The function that draws loss and exact match of an ablation's rows: a dot for each seed, a
    bar at their mean.
    """

    def draw(experiment, variant=""):
        rows, _ = ablations.found(experiment, name, variant)
        size = (8, 0.8 + 0.28 * len(rows))
        figure, axes = plotting().subplots(1, 2, figsize=size, sharey=True)
        for axis, (key, (title, _)) in zip(axes, MEASURES.items()):
            for y, (label, runs) in enumerate(rows.items()):
                values = [run.numbers[key] for run in runs if run.numbers[key] is not None]
                if not values:
                    continue
                colour = colour_of(y, label)
                mean = statistics.mean(values)
                axis.plot(values, [y] * len(values), "o", color=colour, markersize=4.5, alpha=0.75)
                axis.plot([mean, mean], [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
            axis.set(xlabel=title)
        axes[0].set_yticks(range(len(rows)), list(rows))
        axes[0].invert_yaxis()
        return figure

    return draw


def colour_of(row, label):
    """The method itself, plain training, and all else."""
    if row == 0:
        return COLOURS[0]
    return COLOURS[1] if "CLM" in label else COLOURS[2]


def ablation_of_k(experiment, variant=""):
    """Loss and exact match against k: each seed, and their mean."""
    figure, axes = plotting().subplots(1, 2, figsize=(8, 3))
    for axis, (key, (title, _)) in zip(axes, MEASURES.items()):
        ks, by_seed = ablations.by_k(experiment, variant, key)
        values = np.array(list(by_seed.values()), float).T  # (k, seeds)
        axis.plot(ks, values, color=COLOURS[7], linewidth=0.8)
        axis.plot(ks, values.mean(1), "o-", color=COLOURS[0], label="mean over seeds")
        axis.set(xlabel="k (1.0: CLM)", ylabel=title)
    axes[0].legend()
    return figure


def price(experiment, real):
    """SLM's loss less CLM's against the reference's cost, on the demo and on real text."""
    figure, axes = plotting().subplots(1, 2, figsize=(8, 3.2), gridspec_kw={"wspace": 0.3})
    panels = {
        "demo": ablations.prices(experiment),
        "real text": pays.prices(real),
    }
    for axis, (title, found) in zip(axes, panels.items()):
        for label, cost, (mean, half) in found:
            axis.errorbar(cost, mean, yerr=half or 0.0, fmt="o", capsize=2, color=COLOURS[0])
            name(axis, label, (cost, mean))
        axis.margins(x=0.2, y=0.12)
        axis.axhline(0, color="#666", linewidth=0.8)
        axis.axvline(1, color="#666", linewidth=0.8, linestyle=":")
        axis.set(xlabel="total cost, times CLM's", title=title)
    axes[0].set(ylabel="validation loss less CLM's, nats")
    axes[1].set_xscale("log", base=2)  # a larger reference costs many times what the others do
    axes[1].set(xlabel="total cost, times CLM's (log scale)")
    axes[1].xaxis.set_major_formatter("{x:g}")
    return figure


FIGURES = {
    "effect": (("demo",), effect),
    "when-it-pays": (("when-it-pays", "demo", "ablations"), when_it_pays),
    "methods": (("methods",), methods),
    "methods-tuned": (("methods-tuned",), methods),
    f"{FIRST}methods": ((f"{FIRST}methods",), methods),
    f"{FIRST}methods-tuned": ((f"{FIRST}methods-tuned",), methods),
    "ablation-k": (("ablations",), ablation_of_k),
    "ablation-score": (("ablations",), ablation("score")),
    "price": (("ablations", "when-it-pays"), price),
}
