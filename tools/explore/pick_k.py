"""A suggestion for k: `python -m tools.explore pick-k`.

Where the student starts, its excess losses over the reference form a peak at 0 (text that both know
equally well), a shoulder to the right (what the reference knows better), and a long tail to the
left: text that the reference was taken away from, at which it is worse than the model it came from.
The last is what is not worth keeping. So the suggestion is

    k = share of the targets with L_theta - L_ref > -0.2 nats

with the paper's own bound for "the loss has not changed" (section 2.1). It needs one forward pass
over a sample. It says nothing where reference and student do not come from the same start: then
most of the excess is their difference.
"""

from common.device import Env

import numpy as np

from common.errors import UserError
from common.records import read_record
from data import Note, Stored, TokenSet
from hf import models
from tools.explore.figures import COLOURS, plotting, save_figure
from tools.explore.runs import batched, look, spaced

SLACK = 0.2  # nats
SLACKS = (0.05, 0.1, 0.2, 0.5, 1.0)


def suggestion(excess, slack=SLACK):
    """The share of the excess losses above -slack, to two places and never 0."""
    return max(0.01, round(float((excess > -slack).mean()), 2))


def sample(ref_loss, data, model, n_windows, env):
    """Excess losses in at most n_windows evenly spaced windows of a TokenSet.

    Returns (losses of `model` over the stored ones (W, T) in nats, which are valid (W, T), labels
    (W, T) or None).
    """
    note = str(ref_loss).removesuffix(".bin") + ".json"
    seq_len = read_record(note, Note, "reference losses").seq_len
    stored = Stored(ref_loss, data, seq_len)
    windows = np.array(spaced(range(data.n_windows(seq_len)), n_windows))
    valid = data.valid(windows, seq_len)
    folder = models.folder_of(model, None, data, env)
    mask = stored.meta["document_mask"]
    seen = look(folder, data, batched(windows, 32), seq_len, env, document_mask=mask)
    loss = seen["loss"]
    return loss - stored.batch(windows, valid), valid, data.labels(windows, seq_len)


def main(args):
    env = Env(args)
    data = TokenSet(args.data)
    if args.windows < 2:
        raise UserError(f"--windows: got {args.windows}, wanted at least 2")
    excess, valid, labels = sample(args.ref_loss, data, args.model, args.windows, env)
    k = suggestion(excess[valid])
    print(f"{int(valid.sum()):,} targets of {args.data}, {args.model} against {args.ref_loss}\n")
    show_slacks(excess[valid])
    if labels is not None:
        show_kinds(data.kinds, excess, valid, labels)
    error = standard_error(excess, valid)
    print(f"\nsuggested: --k {k:g} (standard error of the sample {error:.3f})")
    if not 0.2 <= k <= 0.9:
        print(
            "beyond 0.2 to 0.9 the two models hardly share a scale: "
            "did reference and student start from one model?"
        )
    if args.out:
        draw(excess[valid], k, args.out)


def show_slacks(excess):
    print("| slack, nats | share of the targets above it |\n|---|---|")
    for slack in SLACKS:
        print(f"| {slack:g} | {(excess > -slack).mean():.3f} |")


def show_kinds(kinds, excess, valid, labels):
    print(f"\n| kind | share of the targets | of it above -{SLACK:g} nats |\n|---|---|---|")
    for i, name in enumerate(kinds):
        inside = valid & (labels == i)
        if inside.any():
            share = inside.sum() / valid.sum()
            above = (excess[inside] > -SLACK).mean()
            print(f"| {name} | {share:.3f} | {above:.3f} |")


def standard_error(excess, valid):
    """Of the suggestion: the windows are the sample, for tokens of one window are alike."""
    by_window = [(row[v] > -SLACK).mean() for row, v in zip(excess, valid) if v.any()]
    return np.std(by_window) / len(by_window) ** 0.5


def draw(excess, k, out):
    plot = plotting()
    figure, axis = plot.subplots(figsize=(5.4, 3))
    edges = np.arange(-6, 3.01, 0.1)
    inside = excess.clip(-6, 2.99)
    above = excess > -SLACK
    axis.hist(inside[above], edges, color=COLOURS[0], label=f"above -{SLACK:g}: {k:.0%}")
    axis.hist(inside[~above], edges, color=COLOURS[7], label="below")
    axis.set(
        yscale="log",
        xlabel="excess loss at the start, nats (the tails at the ends)",
        ylabel="targets",
    )
    axis.legend()
    save_figure(figure, out)
