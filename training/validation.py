"""The validation loss."""

import numpy as np
import torch


@torch.no_grad()
def validate(model, token_set, args, env):
    """{"val_loss": mean loss in nats over all targets that count} and, where the token set has labels, the same of each
    kind, "val_loss_by_kind". `model` is the (wrapped) WithLoss module."""
    kinds = token_set.kinds or ["all"]
    sums = torch.zeros(2, len(kinds), dtype=torch.float64, device=env.device)
    size, n = args.micro_batch_size, token_set.n_windows(args.seq_len)
    for start in range(
        env.rank * size, -(-n // (size * env.world)) * size * env.world, size * env.world
    ):
        windows = np.arange(start, start + size).clip(
            max=n - 1
        )  # every rank makes the same number of forward passes
        x, y, valid = map(env.tensor, token_set.batch(windows, args.seq_len))
        valid &= env.tensor(np.arange(start, start + size) < n)[:, None]
        labels = token_set.labels(windows, args.seq_len)
        kind = torch.zeros_like(y) if labels is None else env.tensor(labels)
        with env.autocast():
            losses = model(x, y)
        for row, values in zip(
            sums, (losses[valid].double(), torch.ones_like(losses[valid], dtype=torch.float64))
        ):
            row.index_add_(0, kind[valid], values)
    total, count = env.total(sums).tolist()
    record = {"val_loss": sum(total) / max(sum(count), 1)}
    if token_set.kinds:
        record["val_loss_by_kind"] = {k: t / c for k, t, c in zip(kinds, total, count) if c}
    return record
