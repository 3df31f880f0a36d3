"""slm.Selection on a run's data: it loads what the score needs and says which tokens are kept."""

import numpy as np
import torch

from common.errors import UserError
from common.numerics import notice, numerics
from data import Stored, score_command
from slm import Tokens

STORED = ("ref_loss", "ref_entropy")


class Selector:
    """Which tokens of each micro-batch carry loss.

    `references`: {name of the stored values: hash of the model that they come from}.
    Raises UserError where the score needs values that are missing or do not fit.
    """

    def __init__(self, selection, args, data, env):
        self.selection = selection
        self.args = args
        self.data = data
        self.env = env
        self.now = numerics(args, env, args.micro_batch_size)
        self.stored = {}
        for name in STORED:
            if name in selection.needs:
                self.stored[name] = self._open(name)
        self.references = {name: values.meta["reference"] for name, values in self.stored.items()}
        self.settled = {}  # masks that are known before the forward pass, by micro-batch

    def _open(self, name):
        args = self.args
        now = self.now
        if not args.ref_loss:
            remedy = score_command("FILE", self.data, args.seq_len, now)
            raise UserError(
                f"--ref-loss: --score {args.score} needs the reference's losses; make them with "
                f"{remedy}{' --entropy' if name == 'ref_entropy' else ''}"
            )
        stored = Stored(args.ref_loss, self.data, args.seq_len, name == "ref_entropy", now)
        said = notice(args.ref_loss, stored.meta, now)
        if said and self.env.main:
            print(said)
        return stored

    def reference_loss_on(self, val):
        """The reference's mean loss on the token set `val`, in nats; None where it is not known.

        Only for scores that compare the student with the reference. One line says where another
        set's is known.
        """
        if val is None or not {"loss", "ref_loss"}.issubset(self.selection.needs):
            return None
        known = self.stored["ref_loss"].meta["validation"]
        for validation in known:
            if validation["data"] == val.hash:
                return validation["loss"]
        if known and self.env.main:
            names = ", ".join(validation["name"] for validation in known)
            meta, now = self.stored["ref_loss"].meta, self.now
            again = score_command(self.args.ref_loss, self.data, self.args.seq_len, now, meta)
            print(
                f"note: {self.args.ref_loss} knows the reference's validation loss on {names}, not "
                f"on --val {val.folder}; add that one's with {again} --val {val.folder}"
            )
        return None

    def counts(self, student, step, micro_batches):
        """How many tokens of each micro-batch will be kept, before any gradient.

        The masks tell, but in two cases the choice itself has to be made first: where the
        micro-batches of all ranks are ranked together (--scope batch), and where two choices are
        combined (ref_and, ref_or).
        """
        self.settled = {}
        selection = self.selection
        together = selection.scope == "batch" and len(micro_batches) > 1
        if selection.k == 1 or not (together or selection.combined):
            return [selection.count(self.data.valid(w, self.args.seq_len)) for w in micro_batches]
        masks = self._settle(student, step, micro_batches, together)
        self.settled = dict(enumerate(masks))
        return torch.stack([mask.sum() for mask in masks]).tolist()

    def _settle(self, student, step, micro_batches, together):
        """The mask of each micro-batch, (B, T) bool."""
        if not together:
            return [self._mask(step, windows) for windows in micro_batches]
        losses = None
        if not self.selection.static:
            losses = self._first_pass(student, micro_batches)
        mask = self._mask(step, np.concatenate(micro_batches), losses)
        return mask.split(self.args.micro_batch_size)

    def _mask(self, step, windows, losses=None):
        tokens = self._known(step, windows)
        if losses is not None:
            tokens.loss = losses
        valid = self.env.tensor(self.data.valid(windows, self.args.seq_len))
        return mask_of(self.selection, tokens, valid)

    @torch.no_grad()
    def _first_pass(self, student, micro_batches):
        """The student's losses on the whole batch of all ranks, (windows, T), in its order."""
        env, T = self.env, self.args.seq_len
        losses = []
        for windows in micro_batches[env.rank :: env.world]:
            x, y, _ = map(env.tensor, self.data.batch(windows, T))
            with env.autocast():
                losses.append(student(x, y))
        return env.interleave(torch.stack(losses)).view(-1, T)

    def _known(self, step, windows):
        """What is known of the windows' targets before the forward pass."""
        T = self.args.seq_len
        valid = self.data.valid(windows, T)
        tokens = Tokens()
        for name, values in self.stored.items():
            setattr(tokens, name, self.env.tensor(values.batch(windows, valid)))
        if "noise" in self.selection.needs:
            tokens.noise = self.env.tensor(self._noise(step, windows))
        return tokens

    def _noise(self, step, windows):
        """(B, T): a function of seed, step and window, and so the same on any rank."""
        rows = [np.random.RandomState([self.args.seed, step, int(w)]) for w in windows]
        return np.stack([row.rand(self.args.seq_len) for row in rows]).astype(np.float32)

    def choice(self, step, i, windows, valid):
        """What `keep` and `ranked` need for micro-batch i; `valid` (B, T) on the device."""
        return Choice(self.selection, self._known(step, windows), valid, self.settled.get(i))


def mask_of(selection, tokens, valid):
    """selection.mask, whose UserError names the score."""
    try:
        return selection.mask(tokens, valid)
    except UserError as error:
        raise UserError(f"--score {selection.score}: {error}") from None


class Choice:
    """The selection among the targets of one micro-batch."""

    def __init__(self, selection, tokens, valid, settled):
        self.selection = selection
        self.tokens = tokens
        self.valid = valid
        self.settled = settled

    def keep(self, losses):
        """Which tokens are kept, (B, T) bool, given the student's losses (B, T)."""
        if "loss" in self.selection.needs:
            self.tokens.loss = losses
        if self.settled is not None:
            return self.settled
        return mask_of(self.selection, self.tokens, self.valid)

    def ranked(self):
        """The values that were ranked, (B, T), after `keep`; None where there are none."""
        return self.selection.ranked(self.tokens)
