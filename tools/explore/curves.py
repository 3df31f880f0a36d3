"""Losses and accuracy of runs against tokens and against cost: `python -m tools.explore curves`.

Cost is counted in tokens of plain training of the student (6 N FLOPs a token, N its parameters): a run costs what it
reads, and where its score needs the reference's losses also the reference's training and one scoring pass (2 N_ref
FLOPs a token) over the whole corpus. A batch scope over several micro-batches costs another forward pass.
"""

import json
from pathlib import Path

import numpy as np

import slm
from common.errors import UserError
from common.files import read_json, write_atomic
from demo.chain import records, tokens_to_reach
from hf import checkpoint
from hf.config import config_from_hf
from tools.explore import runs as explore_run
from tools.explore.runs import COLOURS, DASHES

SMOOTH = 50  # steps over which the training losses and the kept shares are averaged


class Line:
    """A line of the figures: `label`, and a run (a folder) for each seed."""

    def __init__(self, text, references):
        label, _, folders = text.rpartition("=")
        if not label:
            raise UserError(f"--run: got {text}, wanted LABEL=FOLDER or LABEL=FOLDER,FOLDER")
        self.label, self.folders = label, [Path(folder) for folder in folders.split(",")]
        self.saved = [explore_run.run_arguments(folder) for folder in self.folders]
        for folder in self.folders:
            if not (folder / "summary.json").exists():
                raise UserError(
                    f"--run: {folder} is not finished; the command that began it goes on"
                )
        self.summaries = [read_json(folder / "summary.json", "run") for folder in self.folders]
        if any(summary["val_loss"] is None for summary in self.summaries):
            raise UserError(f"--run: {self.label} has no validation loss; train with --val")
        self.logs = [records(folder) for folder in self.folders]
        self.costs = [
            cost(*each, references)
            for each in zip(self.folders, self.saved, range(len(self.folders)))
        ]

    def selects(self):
        return self.saved[0].get("k", 1) < 1

    def curve(self, read):
        """(seeds, points) of the records' tokens and read(record), where every seed has it, up to the shortest."""
        rows = [
            [(r["tokens_seen"], read(r)) for r in log if read(r) is not None] for log in self.logs
        ]
        n = min(map(len, rows))
        return np.array([row[:n] for row in rows], float).transpose(2, 0, 1) if n else None

    def at_cost(self, tokens):
        """`tokens` (seeds, points) as cost, (seeds, points)."""
        return np.array([fixed + per * row for (fixed, per), row in zip(self.costs, tokens)])


def parameters(folder):
    config = config_from_hf(
        read_json(Path(folder) / "config.json", "model"), Path(folder) / "config.json"
    )
    return sum(int(np.prod(shape)) for shape in checkpoint.parameter_shapes(config).values())


def cost(folder, saved, i, references):
    """(fixed, per token): what a run costs in tokens of plain training of its student."""
    selection = slm.Selection(saved.get("k", 1), saved.get("score"), saved.get("scope"))
    per = (
        4 / 3
        if saved.get("scope") == "batch"
        and saved["micro_batch_size"] < saved["batch_size"]
        and not selection.static
        else 1.0
    )
    if not {"ref_loss", "ref_entropy"}.intersection(selection.needs):
        return 0.0, per
    reference = (
        references[min(i, len(references) - 1)] if references else find_reference(folder, saved)
    )
    scored = read_json(Path(saved["ref_loss"]).with_suffix(".json"), "reference losses")["count"]
    trained = read_json(Path(reference) / "summary.json", "reference")["tokens_seen"]
    return (trained + scored / 3) * parameters(reference) / parameters(folder), per


def find_reference(folder, saved):
    """The run beside the stored losses whose weights they were made with."""
    wanted = next(value for name, value in saved["inputs"].items() if name.startswith("ref_"))
    for path in sorted(Path(saved["ref_loss"]).parent.glob("*/summary.json")):
        finished = (path.parent / "model.safetensors").exists() or any(
            path.parent.glob("*.index.json")
        )
        if finished and checkpoint.model_hash(path.parent) == wanted:
            return path.parent
    raise UserError(
        f"--reference: no run beside {saved['ref_loss']} has the weights that {folder} was selected with; "
        f"name the reference's folder"
    )


def accuracy(folder, task="test"):
    """[(tokens, share of right answers)] of a run's snapshots and its end, where eval_math.py has evaluated them."""
    points, saved = [], explore_run.run_arguments(folder)
    for step, path in explore_run.snapshots(folder):
        found = path / "eval" / "results.json"
        found = read_json(found, "evaluation").get(task) if found.exists() else None
        if step and found:
            points.append((step * saved["batch_size"] * saved["seq_len"], found["published"] / 100))
    return points


def smooth(values):
    """The mean over SMOOTH steps, of every tenth step: figures stay small."""
    return (
        np.convolve(values, np.ones(SMOOTH) / SMOOTH, "valid")[::10]
        if len(values) > SMOOTH
        else values
    )


def band(axis, i, label, x, y):
    """The mean over seeds as a line, their range as a band. x, y (seeds, points)."""
    axis.plot(x.mean(0), y.mean(0), color=COLOURS[i % 8], linestyle=DASHES[i % 8], label=label)
    if len(y) > 1:
        axis.fill_between(
            x.mean(0), y.min(0), y.max(0), color=COLOURS[i % 8], alpha=0.16, linewidth=0
        )


def main(args):
    references = args.reference.split(",") if args.reference else None
    lines = [Line(text, references) for text in args.run]
    labels = [line.label for line in lines]
    for flag, got in (("--baseline", args.baseline), ("--kept-of", args.kept_of)):
        if got is not None and got not in labels:
            raise UserError(f"{flag}: got {got}, wanted one of {', '.join(labels)}")
    baseline = next((line for line in lines if line.label == args.baseline), None)
    kept_of = next((line for line in lines if line.label == args.kept_of), None) or next(
        (line for line in lines if line.selects() and line.logs[0][-1].get("kept")), None
    )
    result = {line.label: summarise(line, baseline) for line in lines}
    table(result, args.baseline)

    plot = explore_run.plotting()
    figure, (a, b) = plot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for i, line in enumerate(lines):
        curve = line.curve(lambda r: r.get("val_loss"))
        if curve is None:
            raise UserError(f"--run: {line.folders[0]} has no validation loss; train with --val")
        tokens, loss = curve
        band(a, i, line.label, tokens / 1e6, loss)
        band(b, i, line.label, line.at_cost(tokens) / 1e6, loss)
        if baseline and line is not baseline and result[line.label]["tokens_to_reach"]:
            target = np.mean([s["val_loss"] for s in baseline.summaries])
            reached = [t for t in result[line.label]["tokens_to_reach"] if t]
            if len(reached) == len(line.folders):
                for axis, x in (
                    (a, np.mean(reached)),
                    (b, line.at_cost(np.array(reached)[:, None]).mean()),
                ):
                    axis.plot(x / 1e6, target, "o", color=COLOURS[i % 8], markersize=5)
    if baseline:
        end = np.mean([s["val_loss"] for s in baseline.summaries])
        for axis in (a, b):
            axis.axhline(end, color="#666", linewidth=0.8, linestyle=":")
    a.set(xlabel="tokens read, millions", ylabel="validation loss, nats")
    b.set(xlabel="cost, millions of training tokens\n(reference and scoring included)")
    a.legend()
    explore_run.save_figure(figure, args.out)

    figure, axes = plot.subplots(1, 2, figsize=(9, 3.2))
    for axis, name, title in zip(axes, ("loss", "loss_selected"), ("all tokens", "kept tokens")):
        for i, line in enumerate(lines):
            tokens, loss = line.curve(lambda r: r[name])
            band(
                axis,
                i,
                line.label,
                np.array([smooth(t) for t in tokens]) / 1e6,
                np.array([smooth(l) for l in loss]),
            )
        axis.set(xlabel="tokens read, millions", ylabel=f"training loss, {title}, nats")
    axes[0].legend()
    explore_run.save_figure(figure, args.out + "-training")

    points = {line.label: [accuracy(folder) for folder in line.folders] for line in lines}
    if any(len(p) > 1 for rows in points.values() for p in rows):
        figure, axes = plot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
        for i, line in enumerate(lines):
            rows = points[line.label]
            if min(map(len, rows)):
                tokens, shares = np.array(
                    [row[: min(map(len, rows))] for row in rows], float
                ).transpose(2, 0, 1)
                band(axes[0], i, line.label, tokens / 1e6, shares)
                band(axes[1], i, line.label, line.at_cost(tokens) / 1e6, shares)
        axes[0].set(xlabel="tokens read, millions", ylabel="exact match", ylim=(0, 1))
        axes[1].set(xlabel="cost, millions of training tokens\n(reference and scoring included)")
        axes[0].legend()
        explore_run.save_figure(figure, args.out + "-accuracy")
    if kept_of:
        draw_kept(plot, kept_of, args.out + "-kept")
    write_atomic(args.out + ".json", json.dumps(result, indent=1))
    print(args.out + ".json")


def summarise(line, baseline):
    """What the table says of a line, a value for each seed; None where it is not known or never happens."""
    reach, ratio, cost_ratio = [], [], []
    for i, folder in enumerate(line.folders if baseline else []):
        j = min(i, len(baseline.folders) - 1)
        end = baseline.summaries[j]
        tokens = tokens_to_reach(folder, end["val_loss"])
        reach.append(tokens)
        ratio.append(tokens and round(end["tokens_seen"] / tokens, 2))
        spent = tokens and line.costs[i][0] + line.costs[i][1] * tokens
        fixed, per = baseline.costs[j]
        cost_ratio.append(spent and round((fixed + per * end["tokens_seen"]) / spent, 2))
    return {
        "runs": [str(folder) for folder in line.folders],
        "val_loss": [s["val_loss"] for s in line.summaries],
        "exact_match": [s["exact_match"] for s in line.summaries],
        "fixed_cost": [round(c) for c, _ in line.costs],
        "tokens_to_reach": reach,
        "times_fewer_tokens": ratio,
        "times_less_cost": cost_ratio,
    }


def table(result, baseline):
    print(
        f"| | validation loss | exact match | reference and scoring | {baseline or 'no baseline'}'s final loss after "
        f"tokens | times fewer | cost: times less |\n|---|---|---|---|---|---|---|"
    )
    show = lambda values, form: (
        ", ".join("never" if v is None else form.format(v) for v in values) or "–"
    )
    for label, row in result.items():
        print(
            f"| {label} | {show(row['val_loss'], '{:.3f}')} | "
            f"{', '.join('–' if v is None else f'{v:.3f}' for v in row['exact_match'])} | "
            f"{show(row['fixed_cost'], '{:,}')} | {show(row['tokens_to_reach'], '{:,}')} | "
            f"{show(row['times_fewer_tokens'], '{:.1f}')} | {show(row['times_less_cost'], '{:.2f}')} |"
        )


def draw_kept(plot, line, out):
    """The share kept of each kind over the run; beyond the palette, dashes tell kinds apart."""
    figure, axis = plot.subplots(figsize=(6.4, 3.6))
    kinds = [
        kind
        for kind in dict.fromkeys(k for log in line.logs for r in log for k in r.get("kept") or ())
    ]
    drawn = []
    for i, kind in enumerate(kinds):
        curve = line.curve(lambda r: (r.get("kept") or {}).get(kind))
        if curve is None:
            continue
        tokens, share = curve
        tokens, share = (np.array([smooth(row) for row in rows]) for rows in (tokens, share))
        axis.plot(
            tokens.mean(0) / 1e6,
            share.mean(0),
            color=COLOURS[i % 8],
            linestyle=DASHES[(i + i // 8) % 8],
        )
        drawn.append((share.mean(0)[-1], tokens.mean(0)[-1] / 1e6, kind, COLOURS[i % 8]))
    right, above = max(x for _, x, _, _ in drawn) * 1.04, 1.06
    for y, _, kind, colour in sorted(
        drawn, reverse=True
    ):  # names beside the lines' ends, none on another
        above = min(y, above - 0.055)
        axis.text(right, above, kind, color=colour, va="center", fontsize=8)
    axis.set(xlabel="tokens read, millions", ylabel=f"share kept, {line.label}", ylim=(0, 1))
    explore_run.save_figure(figure, out)
