"""A run's models, and what they say of each token."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import slm
from common.errors import UserError
from hf import checkpoint, models
from training.finished import arguments, is_finished

CHUNK = 1024  # targets whose logits are made together, as slm.token_losses makes them
ROWS = 32  # of them that are looked at together
BLOCK = 128  # logits whose maximum is looked at first


def snapshots(folder):
    """[(step, folder of a model)] of a run, by step.

    First where it started (step 0, if that folder is still there and holds the same weights), then
    step-NNNNNN/ of `--snapshots`, and the run's own folder once it is finished.
    """
    folder = Path(folder)
    saved = arguments(folder)
    found = []
    start = Path(saved["init"])
    if (start / "config.json").exists() and checkpoint.model_hash(start) == saved["inputs"].get(
        "init"
    ):
        found.append((0, start))
    for path in sorted(folder.glob("step-[0-9]*")):
        if (path / "config.json").exists():
            found.append((int(path.name.removeprefix("step-")), path))
    if is_finished(folder):
        found.append((saved["steps"], folder))
    if not found:
        raise UserError(f"--run: {folder} holds no model yet; the command that began it goes on")
    return found


def spaced(items, n):
    """At most n of the items, evenly spaced, with the first and the last (n = 1: the last)."""
    if len(items) <= n:
        return list(items)
    if n == 1:
        return [items[-1]]
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, n)]


def batched(windows, size):
    return [windows[i : i + size] for i in range(0, len(windows), size)]


@torch.no_grad()
def look(folder, data, batches, seq_len, env, top=0, document_mask=False, bar=None):
    """What the model in `folder` says of every target of some windows.

    `batches`: lists of window numbers, a forward pass each; the losses are those of training if the
    batches are, and `document_mask` is as it was. Returns arrays over all windows in that order:
    loss (N, T) fp32, in nats; with `top` also entropy (N, T) fp32, in nats, and its likeliest
    tokens, top_id and top_p (N, T, top). `bar`: a progress bar over windows; None: one of its own.
    """
    models.check_vocabulary(folder, data)
    model = checkpoint.load(folder, device=env.device)
    if document_mask:
        models.mask_documents(model, data)
    model = slm.WithLoss(model).eval()
    found = []
    if bar is None:
        bar = tqdm(total=sum(map(len, batches)), unit="window", leave=False)
    bar.set_description(str(folder))
    for windows in batches:
        x, y, _ = map(env.tensor, data.batch(windows, seq_len))
        with env.autocast():
            if top:
                found.append(look_closely(model, x, y, top))
            else:
                found.append({"loss": model(x, y).float().cpu().numpy()})
        bar.update(len(windows))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def look_closely(model, x, y, top):
    """`look` for one batch, x and y (B, T): arrays by name, each (B, T) or (B, T, top)."""
    hidden = model.lm(x).flatten(0, 1).split(CHUNK)
    targets = y.flatten().split(CHUNK)
    parts = [
        predictions(slm.logits_of(h, model.lm.head_weight), t, top) for h, t in zip(hidden, targets)
    ]
    found = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])
        found[name] = values.view(*y.shape, *values.shape[1:]).cpu().numpy()
    return found


def predictions(logits, targets, top):
    """Of logits (N, V): loss and entropy (N,) in nats, the `top` likeliest ids and their
    probabilities (N, top).

    A few rows at a time, so that what is made of them stays in the cache.
    """
    parts = []
    for rows, ids in zip(logits.split(ROWS), targets.split(ROWS)):
        log_p = rows.log_softmax(-1)
        likeliest = highest(log_p, top)
        p = log_p.exp()
        parts.append(
            {
                "loss": F.nll_loss(log_p, ids, reduction="none"),
                "top_id": likeliest,
                "top_p": p.gather(1, likeliest),
                "entropy": -p.mul_(log_p).sum(-1),
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def highest(values, n):
    """Where the n highest of each row of (N, V) are, (N, n), the highest first.

    They stand in the n blocks of a row whose maxima are highest: only those are sorted.
    """
    missing = -values.shape[1] % BLOCK
    blocks = F.pad(values, (0, missing), value=-torch.inf).view(len(values), -1, BLOCK)
    n = min(n, values.shape[1])
    best = blocks.amax(-1).topk(min(n, blocks.shape[1]), dim=-1).indices  # (N, up to n)
    candidates = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1)
    places = candidates.topk(n, dim=-1).indices
    return best.gather(1, places // BLOCK) * BLOCK + places % BLOCK
