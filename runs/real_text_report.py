"""The report of runs/real_text.sh, from the runs' own logs, and the choice of a learning rate."""

import numpy as np

from common.errors import UserError
from data import header_of
from demo.chain import tokens_to_reach
from training.finished import arguments, is_finished, steps, summary

METHODS = {"clm": "CLM, every token", "slm": "SLM, k = 0.6", "random": "random 60 %"}
RUN_COLUMNS = [
    "run",
    "learning rate",
    "seed",
    "validation loss",
    "GSM8K test loss",
    "tokens read",
    "tokens to CLM's loss",
    "the same, all costs counted",
]


def run_folder(out, method, rate, seed):
    return out / f"{method}-lr{rate}-seed{seed}"


def best_rate(out, method, rates, seed):
    """The learning rate of the lowest final validation loss, among those that `seed` has finished.

    The test split has no say. Raises UserError where there is none.
    """
    tried = [rate for rate in rates if is_finished(run_folder(out, method, rate, seed))]
    if not tried:
        raise UserError(
            f"{out}: got no finished run of {method} with seed {seed}, "
            f"wanted one at {' or '.join(rates)}"
        )
    return min(tried, key=lambda rate: summary(run_folder(out, method, rate, seed))["val_loss"])


def stored_mean(path):
    """Mean of the losses that score.py stored, in nats; None where it stored none."""
    if not path.exists():
        return None
    losses = np.fromfile(path, "<f2")[1:]  # the first token is no target
    return float(losses.astype(np.float64).mean())


def number(value, form=".3f"):
    return "-" if value is None else format(value, form)


def table(head, rows):
    """Markdown, as lines."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def report(data, out, rates, seeds):
    """Markdown from the runs that are finished: the runs, the validation loss on the way, the cost.

    Tokens to the target: read by a student until its validation loss is CLM's final one (best rate,
    same seed). With all costs counted, SLM is also charged with each token that the reference was
    trained on, and with a third of each token of the corpus for scoring it: a forward pass is a
    third of a training step. CLM and random need neither.
    """
    clm_rate = best_rate(out, "clm", rates, seeds[0])
    reference = summary(out / "ref")["tokens_seen"]
    scoring = header_of(data / "corpus").count / 3
    rows = [
        run_cells("base, where all start", out / "base", "", ""),
        run_cells("the reference", out / "ref", "", ""),
    ]
    for seed in seeds:
        baseline = run_folder(out, "clm", clm_rate, seed)
        target = summary(baseline)["val_loss"] if is_finished(baseline) else None
        for method, label in methods_in(out).items():
            fixed = reference + scoring if method.startswith("slm") else 0
            for rate in rates:
                folder = run_folder(out, method, rate, seed)
                if not is_finished(folder):
                    continue
                reached = None if target is None else tokens_to_reach(folder, target)
                cost = None if reached is None else reached + fixed
                rows.append(run_cells(label, folder, number(reached, ",.0f"), number(cost, ",.0f")))
    lines = [
        *table(RUN_COLUMNS, rows),
        f"Validation loss by tokens read, seed {seeds[0]}, each method's best learning rate:",
        "",
        *curves_table(out, rates, seeds[0]),
        f"Charged to SLM: {reference:,} tokens of the reference's training and {scoring:,.0f} for "
        f"scoring (a third of the corpus). Validation: 10 % of the curated half of GSM8K's "
        "training problems.",
    ]
    return "\n".join(lines)


def run_cells(label, folder, reached, cost):
    """A row for RUN_COLUMNS."""
    args = arguments(folder)
    return [
        label,
        f"{args['lr']:g}",
        str(args["seed"]),
        number(summary(folder)["val_loss"]),
        number(stored_mean(folder.with_name(f"{folder.name}-test_loss.bin"))),
        number(summary(folder)["tokens_seen"], ","),
        reached,
        cost,
    ]


def methods_in(out):
    """{method: label}: METHODS, and SLM at the other shares (KS) that there are runs of."""
    names = {folder.name.split("-lr")[0] for folder in out.glob("slm-k*-lr*-seed*")}
    others = {name: f"SLM, k = {name.removeprefix('slm-k')}" for name in sorted(names)}
    return {**METHODS, **others}


def curves_table(out, rates, seed):
    """Validation losses on the way, of each method at its best rate, as lines of Markdown."""
    curves = {}
    for method, label in METHODS.items():
        if not any(is_finished(run_folder(out, method, rate, seed)) for rate in rates):
            continue
        rate = best_rate(out, method, rates, seed)
        curves[f"{label} ({rate})"] = {
            record["tokens_seen"]: record["val_loss"]
            for record in steps(run_folder(out, method, rate, seed))
            if "val_loss" in record
        }
    seen = sorted(set().union(*curves.values()))
    rows = [[name, *(number(curve.get(count)) for count in seen)] for name, curve in curves.items()]
    return table(["tokens", *(f"{count:,}" for count in seen)], rows)
