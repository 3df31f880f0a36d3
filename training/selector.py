"""slm.Selection on a run's data: which tokens of each micro-batch carry loss, and how much."""

import contextlib
from dataclasses import replace

import numpy as np
import torch

from common.errors import UserError
from data import score_command
from slm import Tokens, Weight
from training.columns import Columns
from training.identity import hash_of_validation
from training.method_flags import k_at, refuse_ranking, selection_of
from training.source import source_hash

WINDOWS = 256  # read at a time where the whole set is ranked


class Selector:
    """Applies the flags' slm.Selection to a run's micro-batches: `begin` and `finish` a step.

    `source`: a hash of the score's code. `extra`: {name: tensor} that belongs to a checkpoint.
    `reference_loss`: the reference's mean loss in nats on the first set of `val`, where it is known
    and the score compares the student with the reference; else None.
    Raises UserError where the score needs values that are missing or do not fit.
    """

    def __init__(self, args, data, env, val=()):
        refuse_ranking(args)
        self.args = args
        self.data = data
        self.env = env
        self.selection = selection_of(args)
        method = self.selection.method
        self.source = source_hash(method)
        self.columns = Columns(method, args, data, env)
        self.reference_loss = self._reference_loss_on(val[0]) if val else None
        self.memory = self.columns.memory
        self.extra = {"memory": self.memory.values} if self.memory else {}
        self.of_set = self._ranked_set() if method and args.scope == "set" else None
        self.micro_batches = []
        self.valid = {}  # of this rank's micro-batches: which targets count, (B, T), numpy
        self.settled = {}  # of this rank's micro-batches: (mask, where a score is wrong), if known
        self.choices = []  # of this step, on this rank
        self.divisor = 1  # of the sum of losses
        self.divisor_known = True  # else `finish` corrects the gradient

    def started_from(self, init):
        """{name: hash} of the models and arrays that the score reads, for a run's identity.

        `init`: the hash of the model that training starts from. Raises UserError where the stored
        losses of that model are another's.
        """
        references = self.columns.references
        got = references.get("base_loss", init)
        if got != init:
            args = self.args
            raise UserError(
                f"--base-loss {args.base_loss}: holds the losses of model {got[:12]}, --init "
                f"{args.init} is {init[:12]}; make them with {self.columns.command('base_loss')}"
            )
        return references

    def _ranked_set(self):
        """--scope set: which tokens are kept, (count,) bool: a mask of all windows, made once."""
        return self.env.from_main(self._choose_from_set)

    def _choose_from_set(self):
        """Everything is ranked at once, on the CPU: a GPU may be full, and has a limit of 2^31.

        For a moment some 80 bytes a token are held.
        """
        T = self.args.seq_len
        windows = np.arange(self.data.n_windows(T))
        parts = []
        for start in range(0, len(windows), WINDOWS):
            some = windows[start : start + WINDOWS]
            valid = self.data.valid(some, T)
            part = {**vars(self.columns.tokens(0, some, valid)), "valid": torch.from_numpy(valid)}
            parts.append({name: values.cpu() for name, values in part.items()})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        valid = whole.pop("valid")
        _, mask, wrong = checked_mask(self.selection, Tokens(**whole), valid)
        if wrong.any():
            raise UserError(
                f"--score {self.selection.score}: {wrong.sum()} of {valid.sum()} scores are not "
                f"finite; look at what it reads"
            )
        kept = np.zeros(len(windows) * T + 1, bool)
        kept[1:] = mask.flatten().numpy()
        return kept[: self.data.count]

    def _reference_loss_on(self, val):
        """The reference's mean loss on `val`, or None; a line says where another set's is known."""
        if not {"loss", "ref_loss"}.issubset(self.selection.needs):
            return None
        meta = self.columns.stored["ref_loss"].meta
        known = meta["validation"]
        for validation in known:
            if validation["data"] == hash_of_validation([val]):
                return validation["loss"]
        if known and self.env.main:
            names = ", ".join(validation["name"] for validation in known)
            now = self.columns.now
            path, T = self.args.ref_loss, self.args.seq_len
            print(
                f"note: {path} knows the reference's validation loss on {names}, not on --val "
                f"{val.folder}; add that one's with "
                f"{score_command(path, self.data, T, now, meta, val.folder)}"
            )
        return None

    # ----------------------------------------------------------------------------------------------
    # before the gradient

    def begin(self, student, step, micro_batches):
        """Before a step's gradient: make the choices that can be made already.

        Returns {number of a micro-batch of this rank: how many of its tokens will be kept, None
        where only the losses tell}, and what the summed loss is divided by. Where that is not known
        yet either, it is the number of valid targets, and `finish` corrects the gradient.
        """
        mine = range(self.env.rank, len(micro_batches), self.env.world)
        self.settled = {}
        self.choices = []
        self.micro_batches = micro_batches
        self._set_k(k_at(step, self.args))
        if self._is_settled_first(len(micro_batches)):
            self.settled = self._settle(student, step, micro_batches, mine)
        self.valid = {i: self.data.valid(micro_batches[i], self.args.seq_len) for i in mine}
        counts = self._known_counts()
        per = self.selection.method.per if self.selection.method else "kept"
        if per == "kept" and counts:
            self.divisor_known = True
            divisor = self.env.count(counts.values())
        else:
            self.divisor_known = per == "valid"  # else `finish` corrects what is divided by it
            divisor = self.env.count(int(mask.sum()) for mask in self.valid.values())
        self.divisor = max(1, divisor)
        return counts or dict.fromkeys(mine), self.divisor

    def _known_counts(self):
        """How many tokens of each micro-batch will be kept; None where only its losses tell."""
        if self.settled:
            masks = [mask for mask, _ in self.settled.values()]
            if masks[0].dtype != torch.bool:  # weights
                return None
            return dict(zip(self.settled, torch.stack([mask.sum() for mask in masks]).tolist()))
        if self.selection.counted == "masks":  # they tell without a choice
            return {i: self.selection.count(mask) for i, mask in self.valid.items()}
        return None

    def _is_settled_first(self, n):
        """Is the choice in a step's n micro-batches made before their gradient?"""
        stored = self.selection.counted == "stored"  # as with ref_and
        return bool(self.selection.method) and (stored or self._is_of_batch(n))

    def _is_of_batch(self, n):
        """Are a step's n micro-batches, of all ranks, ranked together, in a pass of their own?"""
        # The pruned backward pass has to know how many are kept, even of one micro-batch.
        unknown = self.args.backward == "pruned" and self.selection.counted == "losses"
        return self.selection.scope == "batch" and (n > 1 or unknown)

    def _set_k(self, k):
        """A step of a schedule of k; what is ranked once, the whole set, is ranked anew."""
        if k == self.selection.k:
            return
        self.selection = replace(self.selection, k=k)
        if self.of_set is not None and self.selection.method:
            self.of_set = self._ranked_set()

    def _settle(self, student, step, micro_batches, mine):
        """Of this rank's micro-batches: {number: (mask (B, T) bool or weights, where a score is
        wrong)}."""
        if self.of_set is not None:
            T = self.args.seq_len
            cut = {i: self.data.cut(self.of_set, micro_batches[i], T, fill=0) for i in mine}
            return {i: (self.env.tensor(mask), None) for i, mask in cut.items()}
        if not self._is_of_batch(len(micro_batches)):
            return {i: self._select(step, micro_batches[i]) for i in mine}
        predicted = {}
        if not self.selection.static:
            predicted = self._first_pass(student, micro_batches)
        of_batch = self._select(step, np.concatenate(micro_batches), predicted)
        split = list(zip(*(part.split(self.args.micro_batch_size) for part in of_batch)))
        return {i: split[i] for i in mine}

    def _select(self, step, windows, predicted=()):
        """The mask of some windows, and where a score is wrong."""
        valid = self.data.valid(windows, self.args.seq_len)
        tokens = self.columns.tokens(step, windows, valid)
        for name in predicted:
            setattr(tokens, name, predicted[name])
        return checked_mask(self.selection, tokens, self.env.tensor(valid))[1:]

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
        """The `Choice` among the targets of micro-batch i; `valid` (B, T) on the device."""
        known = self.columns.tokens(step, windows, self.valid[i])
        choice = Choice(self.selection, known, valid, *self.settled.get(i, ()))
        if not self.divisor_known or self.memory:
            self.choices.append(choice)
        return choice

    # ----------------------------------------------------------------------------------------------
    # behind the last backward pass of a step

    def finish(self, student):
        """Correct the gradient where the divisor is known only now: one sum over all ranks.

        And remember what the score wants to know of these tokens the next time.
        """
        if not self.divisor_known:
            sums = torch.stack([choice.amount() for choice in self.choices])
            true = self.env.total(sums.sum())
            # Nothing kept: no gradient. All weights 1: the factor is exactly 1.
            scale_gradients(student, torch.where(true > 0, self.divisor / true, 0.0))
        if self.memory and self.selection.method:
            mine = torch.stack([choice.remembered() for choice in self.choices])
            for windows, values in zip(self.micro_batches, self.env.interleave(mine)):
                self.memory.put(windows, values)


def scale_gradients(module, factor):
    """Multiply all gradients, or this rank's shards of them, by a scalar tensor."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            local.mul_(factor)


def checked_mask(selection, tokens, valid):
    """(values, mask, wrong): what the score's function gives, selection.mask, and where a valid
    score is not finite or a weight is below 0, (B, T) bool. A UserError names the score."""
    if selection.method is None:
        return None, valid, torch.zeros_like(valid)
    with not_in_place(selection, tokens, valid):
        try:
            values = selection.values(tokens, valid)
            mask = selection.chosen(values, valid)
        except (UserError, ValueError, ArithmeticError) as error:
            raise UserError(f"--score {selection.score}: {error}") from None
    parts = values if isinstance(values, tuple) else (values,)
    wrong = [~part.isfinite() for part in parts]
    if isinstance(selection.method, Weight):
        wrong.append(values < 0)
    return values, mask, torch.stack(wrong).any(0) & valid


@contextlib.contextmanager
def not_in_place(selection, tokens, valid):
    """Raises UserError where a score's function changes what it reads: the log reads it, too."""
    fields = {**vars(tokens), "valid": valid}
    before = {name: values._version for name, values in fields.items()}
    yield
    for name, values in fields.items():
        if values._version != before[name]:
            raise UserError(
                f"--score {selection.score}: changes t.{name} in place; wanted a new tensor, such "
                f"as that of t.{name}.clamp(max=3) and not of t.{name}.clamp_(max=3)"
            )


class Choice:
    """The selection among the targets of one micro-batch."""

    def __init__(self, selection, tokens, valid, settled=None, wrong=None):
        """`settled`: the mask, where it is known already; `wrong`: (B, T), which scores of it are
        not finite."""
        self.selection = selection
        self.tokens = tokens
        self.valid = valid
        self.settled = settled
        self.wrong = wrong
        self.wants = selection.wants  # what the head makes beside the losses
        self.values = None  # what the score's function gave
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
            self.values, self.kept, self.wrong = checked_mask(
                self.selection, self.tokens, self.valid
            )
        return self.kept

    def amount(self):
        """What the loss is divided by, as far as this micro-batch goes: a number or sum kept."""
        if self.selection.method.per == "kept":
            return (self.kept != 0).double().sum()
        return self.kept.double().sum()

    def remembered(self):
        """What `remember` gives of these tokens, (B, T)."""
        with not_in_place(self.selection, self.tokens, self.valid):
            return self.selection.remembered(self.tokens, self.valid)

    def ranked(self):
        """What was ranked, or the weights, (B, T), after `keep`; None where no one number was."""
        method = self.selection.method
        if method is None or method.choose is not None:
            return None
        values = self.values
        if values is None and isinstance(method, Weight):
            values = self.settled
        elif values is None:
            if self.selection.scope == "set" and "noise" in method.needs:
                return None  # what was ranked was drawn in the first step
            values = self.selection.values(self.tokens, self.valid)
        return None if values.dtype == torch.bool else values
