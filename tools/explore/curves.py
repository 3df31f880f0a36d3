"""Losses and accuracy of runs against tokens and against cost: `python -m tools.explore curves`.

What a run costs is defined in lines.py.
"""

import json

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from tools.explore.figures import COLOURS, DASHES, plotting, save_figure
from tools.explore.lines import Line, accuracy, stacked, summarise

SMOOTH = 50  # steps over which the training losses and the kept shares are averaged
TOKENS = "tokens read, millions"
COST = "cost, millions of training tokens\n(reference and scoring included)"


def main(args):
    references = args.reference.split(",") if args.reference else None
    lines = [Line(text, references) for text in args.run]
    by_label = {line.label: line for line in lines}
    if len(by_label) < len(lines):
        raise UserError(
            f"--run: got {', '.join(line.label for line in lines)}, wanted names that differ; "
            f"give them as LABEL=FOLDER"
        )
    for flag, label in (("--baseline", args.baseline), ("--kept-of", args.kept_of)):
        if label is not None and label not in by_label:
            raise UserError(f"{flag}: got {label}, wanted one of {', '.join(by_label)}")
    baseline = by_label.get(args.baseline)
    result = {line.label: summarise(line, baseline) for line in lines}
    show_table(result, args.baseline)

    plot = plotting()
    draw_validation(plot, lines, baseline, result, args.out)
    draw_sets(plot, lines, f"{args.out}-sets")
    draw_training(plot, lines, f"{args.out}-training")
    draw_accuracy(plot, lines, f"{args.out}-accuracy")
    kept_of = by_label.get(args.kept_of) or first_with_kinds(lines)
    if kept_of:
        draw_kept(plot, kept_of, f"{args.out}-kept")
    write_atomic(f"{args.out}.json", json.dumps(result, indent=1))
    print(f"{args.out}.json")


def first_with_kinds(lines):
    """The first line that selects, on tokens that have kinds; None where there is none."""
    for line in lines:
        if line.selects() and line.logs[0][-1].get("kept"):
            return line
    return None


def show_table(result, baseline):
    print(
        f"| | validation loss | exact match | reference and scoring "
        f"| {baseline or 'no baseline'}'s final loss after tokens | times fewer "
        f"| cost: times less |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, row in result.items():
        cells = [
            label,
            listed(row["val_loss"], "{:.3f}"),
            listed(row["exact_match"], "{:.3f}", missing="–"),
            listed(row["fixed_cost"], "{:,}"),
            listed(row["tokens_to_reach"], "{:,}"),
            listed(row["times_fewer_tokens"], "{:.1f}"),
            listed(row["times_less_cost"], "{:.2f}"),
        ]
        print(f"| {' | '.join(cells)} |")


def listed(values, form, missing="never"):
    """The seeds' values, by comma."""
    return ", ".join(missing if v is None else form.format(v) for v in values) or "–"


# --------------------------------------------------------------------------------------------------
# figures


def band(axis, i, label, x, y):
    """Line i: the mean over seeds as a line, their range as a band. x, y (seeds, points)."""
    colour = COLOURS[i % 8]
    axis.plot(x.mean(0), y.mean(0), color=colour, linestyle=DASHES[i % 8], label=label)
    if len(y) > 1:
        axis.fill_between(x.mean(0), y.min(0), y.max(0), color=colour, alpha=0.16, linewidth=0)


def smooth(rows):
    """The mean over SMOOTH steps of each row, every tenth of them: figures stay small."""
    if rows.shape[1] <= SMOOTH:
        return rows
    window = np.ones(SMOOTH) / SMOOTH
    return np.array([np.convolve(row, window, "valid")[::10] for row in rows])


def draw_validation(plot, lines, baseline, result, out):
    """Validation loss against tokens and against cost; dots where a line reaches the baseline."""
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    target = None
    if baseline:
        target = np.mean([summary["val_loss"] for summary in baseline.summaries])
    for i, line in enumerate(lines):
        curve = line.curve(lambda record: record.get("val_loss"))
        if curve is None:
            raise UserError(f"--run: {line.folders[0]} has no validation loss; train with --val")
        tokens, loss = curve
        band(axes[0], i, line.label, tokens / 1e6, loss)
        band(axes[1], i, line.label, line.at_cost(tokens) / 1e6, loss)
        reached = result[line.label]["tokens_to_reach"]
        if line is baseline or not reached or None in reached:
            continue
        costs = line.at_cost(np.array(reached)[:, None])
        for axis, x in zip(axes, (np.mean(reached), costs.mean())):
            axis.plot(x / 1e6, target, "o", color=COLOURS[i % 8], markersize=5)
    if baseline:
        for axis in axes:
            axis.axhline(target, color="#666", linewidth=0.8, linestyle=":", label="baseline's end")
    axes[0].set(xlabel=TOKENS, ylabel="validation loss, nats")
    axes[1].set(xlabel=COST)
    axes[0].legend()
    save_figure(figure, out)


def draw_sets(plot, lines, out):
    """The loss on each of several validation sets, where all runs have them."""
    names = list(lines[0].logs[0][-1].get("val_loss_by_set", {}))
    curves = {}
    for name in names:
        found = [
            line.curve(lambda r, n=name: r.get("val_loss_by_set", {}).get(n)) for line in lines
        ]
        if all(curve is not None for curve in found):
            curves[name] = found
    if not curves:
        return
    size = (4.5 * len(curves), 3.4)
    figure, axes = plot.subplots(1, len(curves), figsize=size, squeeze=False)
    for axis, (name, found) in zip(axes[0], curves.items()):
        for i, (line, (tokens, loss)) in enumerate(zip(lines, found)):
            band(axis, i, line.label, tokens / 1e6, loss)
        axis.set(xlabel=TOKENS, ylabel="validation loss, nats", title=name)
    axes[0][0].legend()
    save_figure(figure, out)


def draw_training(plot, lines, out):
    """Training losses, of all tokens and of those kept."""
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.2))
    titles = {"loss": "all tokens", "loss_selected": "kept tokens"}
    for axis, (name, title) in zip(axes, titles.items()):
        for i, line in enumerate(lines):
            tokens, loss = line.curve(lambda record, name=name: record.get(name))
            band(axis, i, line.label, smooth(tokens) / 1e6, smooth(loss))
        axis.set(xlabel=TOKENS, ylabel=f"training loss, {title}, nats")
    axes[0].legend()
    save_figure(figure, out)


def draw_accuracy(plot, lines, out):
    """Exact match of the snapshots, where there are more of them than one."""
    points = [[accuracy(folder) for folder in line.folders] for line in lines]
    if not any(len(row) > 1 for rows in points for row in rows):
        return
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for i, (line, rows) in enumerate(zip(lines, points)):
        curve = stacked(rows)
        if curve is None:
            continue
        tokens, shares = curve
        band(axes[0], i, line.label, tokens / 1e6, shares)
        band(axes[1], i, line.label, line.at_cost(tokens) / 1e6, shares)
    axes[0].set(xlabel=TOKENS, ylabel="exact match", ylim=(0, 1))
    axes[1].set(xlabel=COST)
    axes[0].legend()
    save_figure(figure, out)


def draw_kept(plot, line, out):
    """The share kept of each kind over the run; beyond the palette, dashes tell kinds apart."""
    figure, axis = plot.subplots(figsize=(6.4, 3.6))
    drawn = []  # last share, last tokens, kind, colour
    for i, kind in enumerate(kinds_of(line)):
        curve = line.curve(lambda record, kind=kind: (record.get("kept") or {}).get(kind))
        if curve is None:
            continue
        tokens, share = map(smooth, curve)
        x = tokens.mean(0) / 1e6
        y = share.mean(0)
        colour = COLOURS[i % 8]
        axis.plot(x, y, color=colour, linestyle=DASHES[(i + i // 8) % 8])
        drawn.append((y[-1], x[-1], kind, colour))
    # The kinds' names stand beside the ends of their lines, from the top down, none on another.
    right = max(x for _, x, _, _ in drawn) * 1.04
    above = 1.06
    for y, _, kind, colour in sorted(drawn, reverse=True):
        above = min(y, above - 0.055)
        axis.text(right, above, kind, color=colour, va="center", fontsize=8)
    axis.set(xlabel=TOKENS, ylabel=f"share kept, {line.label}", ylim=(0, 1))
    save_figure(figure, out)


def kinds_of(line):
    """The kinds of token in its logs, in the order in which they appear."""
    kinds = {}
    for log in line.logs:
        for record in log:
            kinds.update(dict.fromkeys(record.get("kept") or ()))
    return list(kinds)
