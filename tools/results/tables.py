"""The tables of README and docs, each a function of one experiment. Markdown, as lines."""

import statistics
import textwrap
from functools import partial

from common.errors import UserError
from tools.compare import table
from tools.results import ablations, demo, methods, pays
from tools.results.files import FIRST
from tools.results.seeds import (
    MEASURES,
    interval,
    number,
    paired,
    runs_of,
    seeds_of,
    span,
    times_fewer,
)
from training.finished import reached

# --------------------------------------------------------------------------------------------------
# runs/roundings.sh

METHODS = {"slm": "SLM", "clm": "CLM", "ref": "reference"}


def roundings(experiment):
    """A row for each rounding and seed, then one of each seed's range."""
    head = ["rounding", "seed", *(f"{name}: exact match" for name in METHODS.values())]
    rows = [[*head, "SLM: validation loss", "CLM: validation loss", "times fewer tokens"]]
    variants = sorted({run.variant for run in experiment.runs})
    for variant in variants:
        rows += [[variant, *cells] for cells in _rounding(experiment, variant)]
    return table(rows).splitlines()


def _rounding(experiment, variant):
    runs = runs_of(experiment, variant)
    for seed in seeds_of(experiment):
        if ("slm", seed) not in runs or ("clm", seed) not in runs:
            continue
        matches = [runs[method, seed].numbers["exact_match"] for method in METHODS]
        losses = [runs[method, seed].numbers["val_loss"] for method in ("slm", "clm")]
        yield [
            str(seed),
            *(number(match, ".3f") for match in matches),
            *(number(loss, ".4f") for loss in losses),
            number(times_fewer(runs["slm", seed], runs["clm", seed]), ".1f"),
        ]


def roundings_by_seed(experiment):
    """Of each seed: how far the roundings lie apart."""
    titles = [f"{name}: exact match" for name in METHODS.values()]
    rows = [["seed", "roundings", *titles, "SLM: half of its range", "times fewer tokens"]]
    for seed in seeds_of(experiment):
        cells = {method: [] for method in METHODS}
        ratios = []
        for variant in sorted({run.variant for run in experiment.runs}):
            runs = runs_of(experiment, variant)
            if any((method, seed) not in runs for method in METHODS):
                continue
            for method in METHODS:
                cells[method].append(runs[method, seed].numbers["exact_match"])
            ratios.append(times_fewer(runs["slm", seed], runs["clm", seed]) or 0.0)
        if not ratios:
            continue
        half = (max(cells["slm"]) - min(cells["slm"])) / 2
        matches = [span(cells[method], ".3f") for method in METHODS]
        rows.append([str(seed), str(len(ratios)), *matches, f"{half:.3f}", span(ratios, ".1f")])
    return table(rows).splitlines()


def roundings_not_run(experiment):
    return [f"- {variant}: {why}" for variant, why in sorted(experiment.not_run.items())]


# --------------------------------------------------------------------------------------------------
# runs/moments.sh

FORMS = {"float32": 8, "bfloat16": 4, "int8": 2}  # bytes a parameter, without int8's scales


def moments(experiment):
    """A row for each method, measure and form: the mean, and what it differs from float32's."""
    rows = [["", "moments", "bytes a parameter", "seeds", "mean", "from float32, 95 % interval"]]
    whole = runs_of(experiment, "float32")
    for method in ("slm", "clm"):
        for key, (name, form) in MEASURES.items():
            for kind, size in FORMS.items():
                runs = runs_of(experiment, kind)
                seeds = [seed for made, seed in sorted(runs) if made == method]
                seeds = [seed for seed in seeds if (method, seed) in whole]
                values = [runs[method, seed].numbers[key] for seed in seeds]
                if not values or None in values:
                    continue
                cells = [str(size), str(len(seeds)), format(statistics.mean(values), form)]
                base = [whole[method, seed].numbers[key] for seed in seeds]
                difference = "–" if kind == "float32" else interval(*paired(values, base), form)
                rows.append([f"{METHODS[method]}, {name}", kind, *cells, difference])
    return table(rows).splitlines()


# --------------------------------------------------------------------------------------------------
# runs/real_model.sh

CONTINUED = {
    "base": "before",
    "ref": "the reference itself",
    "clm": "CLM",
    "random": "random tokens, k {k:g}",
    "slm": "SLM, k {k:g}",
    "clm-tuned": "CLM, then fine-tuned as the reference was",
    "slm-tuned": "SLM, then fine-tuned as the reference was",
}


def real_model(experiment):
    """A row for each model: losses, accuracy, and tokens until CLM's final loss."""
    head = ["model", "run", "seed", "validation loss", "GSM8K loss", "GSM8K few-shot, %"]
    rows = [[*head, "tokens read", "tokens to CLM's loss", "with all costs"]]
    for variant in sorted({run.variant for run in experiment.runs}):
        runs = runs_of(experiment, variant)
        for method, label in CONTINUED.items():
            seeds = sorted(seed for name, seed in runs if name == method)
            for seed in seeds:
                named = label.format(k=runs[method, seed].arguments.get("k", 1.0))
                rows.append([variant, named, str(seed), *_continued(runs, method, seed)])
    return table(rows).splitlines()


def _continued(runs, method, seed):
    run = runs[method, seed]
    numbers = run.numbers
    yield number(numbers["val_loss"], ".3f")
    yield number(numbers["gsm8k_loss"], ".3f")
    yield number(numbers["gsm8k_accuracy"], ".1f")
    yield number(numbers["tokens_seen"], ",.0f")
    tokens = None
    if method in ("clm", "random", "slm"):
        tokens = reached(run.curve, runs["clm", seed].curve[-1][1])
    yield number(tokens, ",.0f")
    if tokens is not None and method == "slm":
        # The reference's training, and scoring: a forward pass is a third of a training step.
        tokens += runs["ref", 0].numbers["tokens_seen"] + numbers["scored_tokens"] / 3
    yield number(tokens, ",.0f")


# --------------------------------------------------------------------------------------------------
# the names that pages use

TABLES = {
    "demo": demo.by_seed,
    "demo differences": demo.differences,
    "demo tokens": demo.tokens,
    "demo first-screen": demo.first_screen,
    "when-it-pays": pays.by_reference,
    "when-it-pays others": pays.others,
    "methods": methods.by_method,
    "methods kept": methods.kept,
    "methods-search": methods.search,
    "methods-2e-3": methods.beside_clm_at_its_rate,
    "methods-tuned": methods.by_method,
    "methods-tuned kept": methods.kept,
    "methods-real-text": methods.on_real_text,
    "methods-real-text-5e-4": methods.on_real_text,
    "real-model": real_model,
    "roundings": roundings,
    "roundings by-seed": roundings_by_seed,
    "roundings not-run": roundings_not_run,
    "moments": moments,
    "ablations price": ablations.price,
}
for _name in ablations.ROWS:
    TABLES[f"ablations {_name}"] = partial(ablations.losses_and_shares, name=_name)


# Without a line that says what made them: README's, which links to its file, and a list.
BARE = ("demo first-screen", "roundings not-run")
WIDTH = 100


def render(name, experiment):
    """The lines of the table `name` ("EXPERIMENT" or "EXPERIMENT PART"). Raises UserError."""
    made = name.removeprefix(FIRST)
    if made not in TABLES:
        known = ", ".join(sorted(TABLES))
        raise UserError(f"results: no table is called {name!r}; known: {known}")
    lines = TABLES[made](experiment)
    above = [f"*{experiment.note}*", ""] if experiment.note else []
    below = [] if name in BARE else ["", *textwrap.wrap(f"*{made_by(experiment)}*", WIDTH)]
    return [*above, *lines, *below]


def made_by(experiment):
    """The commits, machines and versions of its runs."""
    commits, machines, versions = set(), set(), set()
    for run in experiment.runs:
        if run.made:
            commits.add(run.made["commit"])
            machine = run.made["machine"]
            machines.add(f"{machine['processor']} with {machine['torch_kernels']} kernels")
            versions.add(run.made["versions"]["torch"])
    found = [f"results/{experiment.experiment}.json", f"commit {_listed(commits)}"]
    return "; ".join([*found, _listed(machines), f"torch {_listed(versions)}"])


def _listed(names):
    return " and ".join(sorted(names)) or "unknown"
