"""The tables of runs/methods.sh and methods_on_real_text.sh: every method beside CLM, seed by seed.

All tokens are tokens of plain training. A method's extra tokens are its passes over the corpus, a
third of a training step's cost each, and its reference's training.
"""

import statistics

from tools.compare import table
from tools.results import files
from tools.results.seeds import interval, less, median_times, number, paired, savings

KINDS = ("solution", "problem", "wrong_digits", "id_hash", "chatter")  # of the demo's text


def ranked(experiment):
    """(names of methods, the largest gain over CLM first; {name: runs}; {name: CLM's beside them}).

    A run counts where CLM has its seed and its base. Another processor makes another base with the
    same seed; CLM's runs from there have the hash of that base as their variant.
    """
    plain = {base_of(run): run for run in experiment.runs if run.method == "clm"}
    own, clm = {}, {}
    for run in sorted(experiment.runs, key=lambda run: run.seed):
        if not run.variant and base_of(run) in plain:
            own.setdefault(run.method, []).append(run)
            clm.setdefault(run.method, []).append(plain[base_of(run)])
    names = sorted(own, key=lambda name: loss_of(own[name]) - loss_of(clm[name]))
    return names, own, clm


def base_of(run):
    return run.seed, run.inputs.get("init")


def by_method(experiment):
    """A row for each method: losses, exact match, tokens to CLM's loss, costs."""
    head = ["method", "setting", "seeds", "validation loss", "less CLM, 95 % interval"]
    head += ["exact match", "times fewer tokens", "with all costs"]
    rows = [[*head, "extra passes"]]
    names, runs, beside = ranked(experiment)
    for name in names:
        own, clm = runs[name], beside[name]
        matches = [run.numbers["exact_match"] for run in own]
        fewer, cheaper = savings(own, clm)
        rows.append(
            [
                label(name),
                setting(own[0].arguments),
                str(len(own)),
                f"{loss_of(own):.4f}",
                "–" if name == "clm" else interval(*less(own, clm), ".4f"),
                "–" if None in matches else f"{statistics.mean(matches):.3f}",
                median_times(fewer),
                median_times(cheaper),
                number(own[0].numbers["passes"], "g"),
            ]
        )
    return table(rows).splitlines()


def beside_clm_at_its_rate(experiment):
    """CLM at one rate, at 1e-3, and the chosen methods that have its rate and its bases.

    `experiment` has CLM at that rate; the others are in methods-tuned.
    """
    clm = {base_of(run): run for run in experiment.runs}
    rate = experiment.runs[0].arguments["lr"]
    found = {("clm", rate): list(clm.values())}
    prefix, _, _ = experiment.experiment.rpartition("methods-")
    for run in files.load(f"{prefix}methods-tuned").runs:
        if base_of(run) in clm and (run.method == "clm" or run.arguments["lr"] == rate):
            found.setdefault((run.method, run.arguments["lr"]), []).append(run)
    head = ["method", "setting", "seeds", "validation loss", "less CLM, 95 % interval"]
    rows = [[*head, "exact match", "more than CLM, 95 % interval"]]
    for (name, at), own in sorted(found.items(), key=lambda item: loss_of(item[1])):
        beside = [clm[base_of(run)] for run in own]
        matches = [run.numbers["exact_match"] for run in own]
        loss, match = "–", "–"
        if (name, at) != ("clm", rate):
            loss = interval(*less(own, beside), ".4f")
            match = interval(
                *paired(matches, [run.numbers["exact_match"] for run in beside]), ".3f"
            )
        cells = [label(name), setting(own[0].arguments), str(len(own)), f"{loss_of(own):.4f}"]
        rows.append([*cells, loss, f"{statistics.mean(matches):.3f}", match])
    return table(rows).splitlines()


def setting(arguments):
    """What a run's method was set to, as "k 0.6, lr 0.001"."""
    k = [] if arguments["k"] == 1 else [f"k {arguments['k']:g}"]
    return ", ".join([*k, *(arguments.get("set") or ()), f"lr {arguments['lr']:g}"])


def search(experiment):
    """A row for each method: its loss at each rate as published, then with its knob elsewhere.

    Means over the seeds of the search. The lowest of a row, which the table of all methods takes,
    is bold.
    """
    runs = {}  # of a method: {(rate, knob): its seeds}
    for run in experiment.runs:
        tried = run.arguments["lr"], knob(run.arguments)
        runs.setdefault(run.method, {}).setdefault(tried, []).append(run)
    losses = {}
    for name, tried in runs.items():
        losses[name] = {key: loss_of(own) for key, own in tried.items()}
    rates = sorted({rate for tried in losses.values() for rate, _ in tried})
    rows = [["method", *(f"lr {rate:g}" for rate in rates), "its knob at the best rate"]]
    for name in sorted(losses, key=lambda name: min(losses[name].values())):
        tried = losses[name]
        cells = {}
        for key, loss in tried.items():
            cells[key] = f"{loss:.4f}"
            if loss == min(tried.values()):
                cells[key] = f"**{cells[key]}**"
        knobs = [f"{value}: {cells[rate, value]}" for rate, value in tried if value]
        row = [cells.get((rate, ""), "–") for rate in rates]
        rows.append([label(name), *row, ", ".join(knobs) or "–"])
    return table(rows).splitlines()


def knob(arguments):
    """What is not as published in a run of the search, beside its rate: "k 0.4", "gamma=2", ""."""
    if arguments.get("set"):
        return arguments["set"][0]
    return "" if arguments["k"] in (1, 0.6) else f"k {arguments['k']:g}"


def label(name):
    return "CLM" if name == "clm" else f"`{name}`"


def kept(experiment):
    """A row for each method: what it keeps of each kind of text, or weighs it with, at the end."""
    rows = [["method", *(kind.replace("_", " ") for kind in KINDS)]]
    names, runs, _ = ranked(experiment)
    for name in names:
        cells = []
        for kind in KINDS:
            shares = [run.numbers.get(f"kept_{kind}") for run in runs[name]]
            shares = [share for share in shares if share is not None]
            cells.append(f"{statistics.mean(shares):.2f}" if shares else "–")
        if name != "clm":
            rows.append([label(name), *cells])
    return table(rows).splitlines()


def on_real_text(experiment):
    """A row for each method and reference, the best mean loss first."""
    clm = {run.seed: run for run in experiment.runs if run.method == "clm"}
    rows = {}
    for run in experiment.runs:
        if run.seed in clm:
            rows.setdefault((run.method, run.variant), []).append(run)
    head = ["method", "reference", "setting", "seeds", "validation loss"]
    lines = [[*head, "less CLM, 95 % interval", "times fewer tokens", "with all costs"]]
    for (method, reference), own in sorted(rows.items(), key=lambda row: loss_of(row[1])):
        base = [clm[run.seed] for run in own]
        plain = method == "clm"
        cells = [label(method), reference or "–", setting(own[0].arguments)]
        cells += [str(len(own)), f"{loss_of(own):.4f}"]
        cells.append("–" if plain else interval(*less(own, base), ".4f"))
        lines.append([*cells, *map(median_times, savings(own, base))])
    return table(lines).splitlines()


def loss_of(runs):
    return statistics.mean(run.numbers["val_loss"] for run in runs)
