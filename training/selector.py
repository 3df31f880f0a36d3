"""slm.Selection on a run's data: which tokens of each micro-batch carry loss, and how much."""

import numpy as np
import torch

from slm import Selection, Weight
from training.columns import Columns


class Selector:
    """What a `Selection` keeps of a run's micro-batches.

    `references`: {name of the stored values: hash of the model that they come from}.
    Raises UserError where the score needs values that are missing or do not fit.
    """

    def __init__(self, selection, args, data, env):
        self.selection = selection
        self.args = args
        self.data = data
        self.env = env
        self.columns = Columns(selection.method, args, data, env)
        self.references = self.columns.references
        self.settled = {}  # masks that are known before the forward pass, by micro-batch
        self.choices = []  # of this step, on this rank
        self.divisor = 1  # of the sum of losses
        self.exact = True  # is it what it shall be? Else `finish` corrects the gradient

    # ----------------------------------------------------------------------------------------------
    # before the gradient

    def counts(self, student, step, micro_batches):
        """How many tokens of each micro-batch will be kept, and what the summed loss is divided by.

        The masks tell, but in two cases the choice itself has to be made first: where the
        micro-batches of all ranks are ranked together (--scope batch), and where stored values
        decide (as with ref_and). Where the student's losses decide, the counts are None, and the
        divisor is the number of valid targets, until `finish`.
        """
        self.settled = {}
        self.choices = []
        selection = self.selection
        valid = [self.data.valid(windows, self.args.seq_len) for windows in micro_batches]
        together = selection.scope == "batch" and len(micro_batches) > 1
        counts = [None] * len(micro_batches)
        if selection.method and (together or selection.counted == "stored"):
            masks = self._settle(student, step, micro_batches, together)
            self.settled = dict(enumerate(masks))
            if masks[0].dtype == torch.bool:
                counts = torch.stack([mask.sum() for mask in masks]).tolist()
        elif selection.counted == "masks":
            counts = [selection.count(mask) for mask in valid]
        per = selection.method.per if selection.method else "kept"
        by_kept = per == "kept" and counts[0] is not None
        self.exact = by_kept or per == "valid"
        known = counts if by_kept else [int(mask.sum()) for mask in valid]
        self.divisor = max(1, sum(known))
        return counts, self.divisor

    def _settle(self, student, step, micro_batches, together):
        """The mask of each micro-batch, (B, T) bool or weights."""
        if not together:
            return [self._mask(step, windows) for windows in micro_batches]
        predicted = {}
        if not self.selection.static:
            predicted = self._first_pass(student, micro_batches)
        mask = self._mask(step, np.concatenate(micro_batches), predicted)
        return mask.split(self.args.micro_batch_size)

    def _mask(self, step, windows, predicted=()):
        valid = self.data.valid(windows, self.args.seq_len)
        tokens = self.columns.tokens(step, windows, valid)
        for name in predicted:
            setattr(tokens, name, predicted[name])
        return self.selection.mask(tokens, self.env.tensor(valid))

    @torch.no_grad()
    def _first_pass(self, student, micro_batches):
        """The student's losses, and what else the score wants, on the batch of all ranks.

        {name: (windows, T)}, in the batch's order.
        """
        env, T = self.env, self.args.seq_len
        wants = self.selection.wants
        parts = []
        for windows in micro_batches[env.rank :: env.world]:
            x, y, _ = map(env.tensor, self.data.batch(windows, T))
            with env.autocast():
                out = student(x, y, wants=wants)
            parts.append(out if wants else [out])
        columns = [env.interleave(torch.stack(column)).view(-1, T) for column in zip(*parts)]
        return dict(zip(("loss", *wants), columns))

    def choice(self, step, i, windows, valid):
        """What `keep` and `ranked` need for micro-batch i; `valid` (B, T) on the device."""
        known = self.columns.tokens(step, windows, self.data.valid(windows, self.args.seq_len))
        choice = Choice(self.selection, known, valid, self.settled.get(i))
        if not self.exact:
            self.choices.append(choice)
        return choice

    # ----------------------------------------------------------------------------------------------
    # behind the last backward pass of a step

    def finish(self, student):
        """Correct the gradient where the divisor is known only now: one sum over all ranks."""
        if self.exact:
            return
        sums = torch.stack([choice.amount() for choice in self.choices])
        true = self.env.total(sums.sum())
        # Nothing kept: no gradient. All weights 1: exactly 1.
        scale_gradients(student, torch.where(true > 0, self.divisor / true, 0.0))


def scale_gradients(module, factor):
    """Multiply all gradients, or this rank's shards of them, by a scalar tensor."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            local.mul_(factor)


class Choice:
    """The selection among the targets of one micro-batch."""

    def __init__(self, selection: Selection, tokens, valid, settled):
        self.selection = selection
        self.tokens = tokens
        self.valid = valid
        self.settled = settled
        self.wants = selection.wants  # what the head makes beside the losses
        self.kept = None

    def keep(self, losses, **also):
        """Which tokens are kept, (B, T) bool, or their weights.

        `losses`: the student's (B, T); `also`: what the score wants beside them.
        """
        if "loss" in self.selection.needs:
            self.tokens.loss = losses
        for name, values in also.items():
            setattr(self.tokens, name, values)
        self.kept = self.settled
        if self.kept is None:
            self.kept = self.selection.mask(self.tokens, self.valid)
        return self.kept

    def amount(self):
        """What the loss is divided by, as far as this micro-batch goes: a number or sum kept."""
        if self.selection.method.per == "kept":
            return (self.kept != 0).double().sum()
        return self.kept.double().sum()

    def ranked(self):
        """What was ranked, or the weights, (B, T), after `keep`; None where there is no ranking."""
        method = self.selection.method
        if method is None or method.choose is not None:
            return None
        values = self.selection.values(self.tokens, self.valid)
        if values.dtype == torch.bool:
            return None
        if isinstance(method, Weight):  # the meter looks for what is not finite
            return torch.where(values < 0, torch.nan, values)
        return values
