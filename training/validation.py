"""The validation loss."""

import numpy as np
import torch

from common.errors import UserError, command
from data import TokenSet


def validation_set(args, data):
    """The token set of `--val`, or None. Raises UserError where its loss would be no number."""
    if not args.val:
        return None
    val = TokenSet(args.val, args.verify)
    if val.tokenizer_hash != data.tokenizer_hash:
        again = command("prepare.py", "--source", "TEXT", "--tokenizer", args.data, "--out", "NEW")
        raise UserError(
            f"--val {args.val}: its tokenizer is not that of --data {args.data}; prepare it with "
            f"{again}"
        )
    val.refuse_no_target()
    return val


def is_due(done, args):
    """Is the validation loss due after `done` steps (`--eval-every`)?

    At the end always; before the first step (`done` is 0) unless it is due at the end alone.
    """
    if done == args.steps:
        return True
    return args.eval_every > 0 and done % args.eval_every == 0


@torch.no_grad()
def validate(model, token_set, args, env, micro_batch=None):
    """The mean loss in nats over all targets that count: {"val_loss": ...}.

    Where the token set has labels, also the same of each kind: "val_loss_by_kind". `model` is the
    (wrapped) WithLoss module. micro_batch: windows per rank per forward pass, where it is not the
    trainer's. Every rank makes the same number of forward passes.
    """
    kinds = token_set.kinds or ["all"]
    sums = torch.zeros(2, len(kinds), dtype=torch.float64, device=env.device)
    n_windows = token_set.n_windows(args.seq_len)
    size = micro_batch or args.micro_batch_size
    stride = size * env.world
    rounds = -(-n_windows // stride)
    for i in range(rounds):
        asked = np.arange(size) + i * stride + env.rank * size
        windows = asked.clip(max=n_windows - 1)
        x, y, valid = map(env.tensor, token_set.batch(windows, args.seq_len))
        valid &= env.tensor(asked < n_windows)[:, None]
        labels = token_set.labels(windows, args.seq_len)
        kind = torch.zeros_like(y) if labels is None else env.tensor(labels)
        with env.autocast():
            losses = model(x, y)[valid].double()
        sums[0].index_add_(0, kind[valid], losses)
        sums[1].index_add_(0, kind[valid], torch.ones_like(losses))
    total, count = env.total(sums).tolist()
    record = {"val_loss": sum(total) / max(sum(count), 1)}
    if token_set.kinds:
        by_kind = zip(kinds, total, count)
        record["val_loss_by_kind"] = {kind: t / n for kind, t, n in by_kind if n}
    return record
