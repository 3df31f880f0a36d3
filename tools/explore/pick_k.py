"""A suggestion for k: `python -m tools.explore pick-k`.

Where the student starts, its excess losses over the reference form a peak at 0 (text that both know equally well), a
shoulder to the right (what the reference knows better), and a long tail to the left: text that the reference was taken
away from, at which it is worse than the model it came from. The last is what is not worth keeping. So the suggestion is

    k = share of the targets with L_theta - L_ref > -0.2 nats

with the paper's own bound for "the loss has not changed" (section 2.1). It needs one forward pass over a sample. It
says nothing where reference and student do not come from the same start: then most of the excess is their difference.
"""

from common.device import Env

import numpy as np

from common.errors import UserError
from common.files import read_json
from data import Stored, TokenSet
from hf import checkpoint, models
from tools.explore import runs as explore_run

SLACK = 0.2  # nats
SLACKS = (0.05, 0.1, 0.2, 0.5, 1.0)


def suggestion(excess, slack=SLACK):
    """The share of the excess losses above -slack, to two places and never 0."""
    return max(0.01, round(float((excess > -slack).mean()), 2))


def sample(ref_loss, data, model, n_windows, env):
    """Of at most n_windows evenly spaced windows of a TokenSet: (excess losses of `model` over the stored ones (W, T),
    which are valid (W, T), labels (W, T) or None)."""
    T = read_json(str(ref_loss).removesuffix(".bin") + ".json", "reference losses")["seq_len"]
    stored = Stored(ref_loss, data, T)
    windows = np.array(explore_run.spaced(range(data.n_windows(T)), n_windows))
    valid = data.valid(windows, T)
    folder = models.folder_of(model, None, data, env)
    loss = explore_run.look(folder, data, explore_run.batched(windows, 32), T, env)["loss"]
    return loss - stored.batch(windows, valid), valid, data.labels(windows, T)


def main(args):
    env = Env(args)
    data = TokenSet(args.data)
    if args.windows < 2:
        raise UserError(f"--windows: got {args.windows}, wanted at least 2")
    excess, valid, labels = sample(args.ref_loss, data, args.model, args.windows, env)
    k = suggestion(excess[valid])
    by_window = [(row[v] > -SLACK).mean() for row, v in zip(excess, valid) if v.any()]
    error = np.std(by_window) / len(by_window) ** 0.5
    print(f"{int(valid.sum()):,} targets of {args.data}, {args.model} against {args.ref_loss}\n")
    print("| slack, nats | share of the targets above it |\n|---|---|")
    for slack in SLACKS:
        print(f"| {slack:g} | {(excess[valid] > -slack).mean():.3f} |")
    if labels is not None:
        print(f"\n| kind | share of the targets | of it above -{SLACK:g} nats |\n|---|---|---|")
        for i, name in enumerate(data.kinds):
            inside = valid & (labels == i)
            if inside.any():
                print(
                    f"| {name} | {inside.sum() / valid.sum():.3f} | {(excess[inside] > -SLACK).mean():.3f} |"
                )
    print(f"\nsuggested: --k {k:g} (standard error of the sample {error:.3f})")
    if not 0.2 <= k <= 0.9:
        print(
            "beyond 0.2 to 0.9 the two models hardly share a scale: did reference and student start from one model?"
        )
    if args.out:
        draw(excess[valid], k, args.out)


def draw(excess, k, out):
    plot = explore_run.plotting()
    figure, axis = plot.subplots(figsize=(5.4, 3))
    edges = np.arange(-6, 3.01, 0.1)
    inside = excess.clip(-6, 2.99)
    for part, colour, label in (
        (inside[excess > -SLACK], explore_run.COLOURS[0], f"above -{SLACK:g}: {k:.0%}"),
        (inside[excess <= -SLACK], explore_run.COLOURS[7], "below"),
    ):
        axis.hist(part, edges, color=colour, label=label)
    axis.set(
        yscale="log",
        xlabel="excess loss at the start, nats (the tails at the ends)",
        ylabel="targets",
    )
    axis.legend()
    explore_run.save_figure(figure, out)
