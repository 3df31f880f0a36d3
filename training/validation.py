"""The validation loss."""

import math

import numpy as np
import torch

from common.errors import UserError, command
from data import TokenSet

LONG = 1_000_000  # tokens: less is read in a moment
MUCH, LITTLE = 0.2, 0.05  # of the time between two validations


def validation_sets(args, data, env):
    """The token sets of `--val`, the first decides. Raises UserError where a loss is no number.

    A line says where validations take much of the time.
    """
    sets = []
    for folder in folders_of(args.val):
        val = TokenSet(folder, args.verify)
        if val.tokenizer_hash != data.tokenizer_hash:
            again = ("prepare.py", "--source", "TEXT", "--tokenizer", args.data, "--out", "NEW")
            raise UserError(
                f"--val {folder}: its tokenizer is not that of --data {args.data}; prepare it with "
                f"{command(*again)}"
            )
        val.refuse_no_target()
        val.n_windows(args.seq_len)  # one at least
        sets.append(val)
    every = getattr(args, "eval_every", 0)  # score.py has none
    if env.main and every:
        say_price(every, every * args.batch_size * args.seq_len, sum(val.count for val in sets))
    return sets


def say_price(every, trained, n):
    """A line where validations of `n` tokens, `trained` tokens apart, take much of the time."""
    share = n / 3 / trained  # a forward pass is a third of a step
    if n > LONG and share > MUCH:
        steps = math.ceil(every * share / LITTLE / 50) * 50
        print(
            f"note: a validation takes some {share:.0%} of the time of the {every} steps before "
            f"it; --eval-every {steps} would be {LITTLE:.0%}"
        )


def folders_of(val):
    """`--val` as a list: None, one folder, or several."""
    if not val:
        return []
    folders = [val] if isinstance(val, str) else val
    if len(set(folders)) < len(folders):
        raise UserError(f"--val: got {' '.join(folders)}, wanted folders that differ")
    return folders


def is_due(done, args):
    """Is the validation loss due after `done` steps (`--eval-every`)?

    At the end always; before the first step (`done` is 0) unless it is due at the end alone.
    """
    if done == args.steps:
        return True
    return args.eval_every > 0 and done % args.eval_every == 0


def validate(model, token_sets, args, env):
    """The losses of `--val`: {"val_loss": of the first set, ...}, as `mean_loss` returns them.

    Of several sets also "val_loss_by_set": {folder: loss}.
    """
    records = [mean_loss(model, token_set, args, env) for token_set in token_sets]
    if len(records) == 1:
        return records[0]
    by_set = zip(token_sets, records)
    losses = {str(token_set.folder): record["val_loss"] for token_set, record in by_set}
    return {**records[0], "val_loss_by_set": losses}


@torch.no_grad()
def mean_loss(model, token_set, args, env, micro_batch=None):
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
            losses = model(x, y)
        # No indexing by a mask: on a GPU each would wait for the number of its tokens.
        counted = torch.where(valid, losses.double(), 0.0)
        sums[0].index_add_(0, kind.flatten(), counted.flatten())
        sums[1].index_add_(0, kind.flatten(), valid.flatten().double())
    total, count = env.total(sums).tolist()
    record = {"val_loss": sum(total) / max(sum(count), 1)}
    if token_set.kinds:
        by_kind = zip(kinds, total, count)
        record["val_loss_by_kind"] = {kind: t / n for kind, t, n in by_kind if n}
    return record
