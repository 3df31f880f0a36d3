"""What tools/explore's subcommands share: a run's models, and what they say of each token."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import slm
from common.errors import UserError
from common.files import read_json
from hf import checkpoint, models

# Okabe and Ito's palette: told apart by colour-blind readers; with them different dashes, for print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]


def run_arguments(folder):
    """args.json of a run. Raises UserError where `folder` is none."""
    if not (Path(folder) / "args.json").exists():
        raise UserError(
            f"--run: {folder} is not a run (no args.json); name a folder of train_slm.py or train_ref.py"
        )
    return read_json(Path(folder) / "args.json", "run")


def snapshots(folder):
    """[(step, folder of a model)] of a run, by step: where it started (step 0, if that folder is still there and holds
    the same weights), step-NNNNNN/ of `--snapshots`, and the run's own folder once it is finished."""
    folder, saved = Path(folder), run_arguments(folder)
    found = [
        (int(path.name[5:]), path)
        for path in sorted(folder.glob("step-*"))
        if (path / "config.json").exists()
    ]
    start = Path(saved["init"])
    if (start / "config.json").exists() and checkpoint.model_hash(start) == saved["inputs"]["init"]:
        found.insert(0, (0, start))
    if (folder / "summary.json").exists():
        found.append((saved["steps"], folder))
    if not found:
        raise UserError(f"--run: {folder} holds no model yet; the command that began it goes on")
    return found


def spaced(items, n):
    """At most n of the items, evenly spaced, the first and the last among them (n = 1: the last)."""
    if len(items) <= n:
        return list(items)
    return [
        items[round(i)] for i in (np.linspace(0, len(items) - 1, n) if n > 1 else [len(items) - 1])
    ]


@torch.no_grad()
def look(folder, data, batches, seq_len, env, top=0):
    """What the model in `folder` says of every target of the windows in `batches` (a list of lists of window numbers).

    Returns arrays over all windows in that order: loss (N, T) fp32; with `top` also entropy (N, T) fp32, top_id
    (N, T, top) and top_p (N, T, top), its likeliest tokens. One forward pass a batch, as in training: the same losses.
    """
    models.check_vocabulary(folder, data)
    model = slm.WithLoss(checkpoint.load(folder, device=env.device)).eval()
    out = {"loss": [], "entropy": [], "top_id": [], "top_p": []}
    for windows in tqdm(batches, desc=str(folder), unit="batch", leave=False):
        x, y, _ = map(env.tensor, data.batch(windows, seq_len))
        with env.autocast():
            if not top:
                out["loss"].append(model(x, y).float().cpu().numpy())
                continue
            hidden = model.lm(x).flatten(0, 1)
            parts = [
                predictions(F.linear(h, model.lm.head_weight), t, top)
                for h, t in zip(hidden.split(4096), y.flatten().split(4096))
            ]
        for values, pieces in zip(out.values(), zip(*parts)):
            values.append(torch.cat(pieces).view(*y.shape, *pieces[0].shape[1:]).cpu().numpy())
    return {name: np.concatenate(values) for name, values in out.items() if values}


def predictions(logits, targets, top):
    """Loss (N,), entropy (N,), the `top` likeliest ids and their probabilities (N, top), from logits (N, V)."""
    logits = slm.at_least_fp32(logits)
    log_p = logits.log_softmax(-1)
    p, ids = log_p.exp().topk(min(top, logits.shape[1]), dim=-1)
    return (
        F.cross_entropy(logits, targets, reduction="none"),
        -(log_p.exp() * log_p).sum(-1),
        ids,
        p,
    )


def batched(windows, size):
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def plotting():
    """matplotlib's pyplot, drawing into files only."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install matplotlib (or -r requirements-dev.txt)"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "svg.hashsalt": "tools.explore",
            "savefig.bbox": "tight",
        }
    )
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, out):
    """`out`.png and `out`.svg; prints their names."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        path = out.with_name(out.name + suffix)
        figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == ".svg" else None)
        print(path)
