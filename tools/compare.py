"""Runs side by side: what came out, and what differs in their arguments.

python -m tools.compare out/demo/clm out/demo/slm out/demo/random
"""

from pathlib import Path

from common.checksums import short
from common.command_line import Parser
from common.errors import UserError, cli
from training import finished

SHOWN = {  # a column's title: a key of summary.json, how it is written
    "val loss": ("val_loss", "{:.4f}"),
    "exact match": ("exact_match", "{:.3f}"),
    "tokens read": ("tokens_seen", "{:,}"),
    "trained on": ("tokens_selected", "{:,}"),
    "minutes": ("seconds", None),
    "tokens/s": ("tok_per_s", "{:,}"),
}
LEFT_OUT = ("format", "inputs", "numerics", "source", "made", "execution")


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of train_ref or train_slm")
    return parser.parse_args(argv)


def read_run(folder):
    """(its arguments, its summary; {} where it is not finished). Raises UserError."""
    path = Path(folder) / "args.json"
    if not path.exists():
        raise UserError(f"{folder}: is not a run, it has no args.json; name a run's folder")
    saved = finished.arguments(folder)
    done = finished.is_finished(folder)
    return saved, finished.summary(folder) if done else {}


def cell(summary, key, form):
    value = summary.get(key)
    if value is None:
        return "-"
    if key == "seconds":
        return f"{value / 60:.1f}"
    return form.format(value)


def table(rows):
    """Rows of cells as Markdown; the first one is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        others = [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("| " + " | ".join([first, *others]) + " |")
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def results(runs):
    """The table of what came out."""
    sets = dict.fromkeys(n for _, summary in runs.values() for n in by_set(summary))
    rows = [["run", *SHOWN, *(f"val loss, {name}" for name in sets)]]
    for name, (_, summary) in runs.items():
        cells = [cell(summary, key, form) for key, form in SHOWN.values()]
        cells += [cell(by_set(summary), key, "{:.4f}") for key in sets]
        rows.append([name, *cells])
    return table(rows)


def by_set(summary):
    """{validation set: loss} of a run with several of them."""
    return summary.get("val_loss_by_set") or {}


def differing(runs):
    """{argument: its value in each run} where not all are equal.

    Inputs, the code of the score and the kit's commit are named by their hash.
    """
    flat = []
    for saved, _ in runs.values():
        inputs = {f"hash of {key}": short(str(value)) for key, value in saved["inputs"].items()}
        made = saved.get("made", {})
        code = {"code of the score": saved.get("source"), "commit": made.get("commit")}
        inputs |= {key: value[:12] for key, value in code.items() if value}
        numerics = {k: v for k, v in saved.get("numerics", {}).items() if k != "micro_batch"}
        inputs |= {f"computed with {key}": value for key, value in numerics.items()}
        inputs |= {"ranks": made["ranks"]} if "ranks" in made else {}
        flags = {k: v for k, v in saved.items() if k not in LEFT_OUT}
        flat.append({**flags, **saved.get("execution", {}), **inputs})
    keys = dict.fromkeys(key for run in flat for key in run)
    found = {}
    for key in keys:
        values = [run.get(key) for run in flat]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


def differences(runs):
    """The table of arguments that differ; None where none does."""
    rows = [["", *runs]]
    for key, values in differing(runs).items():
        rows.append([key, *("-" if value is None else str(value) for value in values)])
    return table(rows) if len(rows) > 1 else None


def main(argv=None):
    args = arguments(argv)
    runs = {str(folder): read_run(folder) for folder in args.runs}
    print(results(runs))
    print()
    print(differences(runs) or "all arguments are equal")


if __name__ == "__main__":
    cli(main)
