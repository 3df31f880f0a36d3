"""A training run's folder: its log, its checkpoints, its model, its summary.

Which tokens are chosen is decided elsewhere (slm.py). This records what the selector says of it.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import files, locks, owned
from common.errors import StopRequest, UserError
from common.files import write_atomic
from common.json_files import START_OVER, parse
from common.records import as_record
from hf import checkpoint
from hf.card import model_card
from hf.config import config_to_hf
from training import parallel, states
from training.arguments import is_snapshot
from training.identity import claim, identity
from training.lead import Lead
from training.optimizer import flops_per_token
from training.track import Tracker

WARM_UP = 5  # first steps of a process, compilation among them, that its rate leaves out
SHOWN = {
    "loss": "loss",
    "of kept": "loss_selected",
    "val": "val_loss",
    "lead": "reference_lead",
    "tok/s": "tok_per_s",
}
SUMMARY = {
    "val_loss": "validation loss {:.4f}",
    "reference_lead": "the reference's lead {:.4f}",
    "exact_match": "exact match {:.3f}",
    "tokens_seen": "{:,.0f} tokens read",
    "tokens_selected": "{:,.0f} selected",
    "seconds": "{:.0f} s",
    "peak_memory_bytes": "peak memory {:.2f} GB",
    "tok_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}
UNITS = {"peak_memory_bytes": 1e9}  # what a number is divided by before it is shown


@dataclass
class LogLine:
    """What the kit itself reads of a record of log.jsonl."""

    step: int


class Run:
    """args.json, log.jsonl, training states, summary.json and the model.

    Opening it settles whether the run starts, goes on, is finished (`summary` is set), or is
    another one (UserError). A state holds all that is needed to go on, weights too: one rename
    makes a checkpoint, and a kill at any moment leaves the last good one. The one before it is kept
    as well, for a disk that loses what it was given. Only rank 0 writes, but for the parts of a
    state on several ranks. No other run can write here.
    """

    def __init__(self, args, inputs, env, model, tokenizer_from, selector=None):
        """`selector` has `source`, a hash of the method's code, with which alone the run goes on;
        `extra`, {name: tensor} that a checkpoint holds beside weights and optimiser; and
        `reference_loss`, the reference's validation loss in nats, or None."""
        self.folder = Path(args.out)
        self.extra = selector.extra if selector else {}
        self.args = args
        self.env = env
        self.tokenizer_from = tokenizer_from
        self.config = model.config
        self.identity = identity(args, inputs, env, selector.source if selector else None)
        self.summary = env.from_main(partial(claim, self.folder, self.identity, args.overwrite))
        self.states = states.States(self.folder, env, args.save_minutes)
        self.state = self.states.resume() if self.summary is None else None
        saved = self.state or {"step": 0, "val_loss": None, "seconds": 0.0, "tokens": (0, 0)}
        self.step = self.first_step = saved["step"]
        self.val_loss = saved["val_loss"]
        self.val_step = saved.get("val_step")  # the step of that loss; older states do not say
        self.val_loss_by_set = saved.get("val_loss_by_set")
        self.lead = Lead(selector.reference_loss if selector else None, self.val_loss)
        self.at_start = []  # the record of step 0, until it is written
        self.seconds = saved["seconds"]
        self.tokens_seen, self.tokens_selected = saved["tokens"]
        self.started = time.perf_counter()
        self.stop = StopRequest()
        self.shown = {}
        self.flops_per_token = flops_per_token(model, args.seq_len)
        self.timed_tokens = 0
        self.timed_seconds = 0.0
        self.tracker = None
        if env.main and self.summary is None:
            self.log_file = files.Growing(self.folder / "log.jsonl", self._log_size())
            if args.track:
                self.tracker = Tracker(args.track, self.folder, self.identity, self.step)

    def _log_size(self):
        """Bytes of log.jsonl up to the saved state's step: the steps behind it are done again.

        Raises UserError where a record before it cannot be read.
        """
        path = self.folder / "log.jsonl"
        size = 0
        if self.step == 0:
            return size
        if not path.exists():
            raise UserError(
                f"{path}: is gone, the saved state is of step {self.step}; {START_OVER}"
            )
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                size += len(line)
                try:
                    step = as_record(parse(line), LogLine, "").step
                except ValueError:
                    raise UserError(
                        f"{path}, line {number}: is not what was written; the run goes on when "
                        f"the line is deleted"
                    ) from None
                if step >= self.step:  # a line that was deleted may have been the state's
                    return size if step == self.step else size - len(line)
        raise UserError(
            f"{path}: was cut, its last record is not of step {self.step}, of which the saved "
            f"state is; {START_OVER}"
        )

    def restore(self, student, optimizer):
        """Load the saved state, if there is one, into the wrapped model and its optimiser.

        From here on SIGTERM ends the run behind a step, see `save_if_due`.
        """
        if self.state:
            states.restore(student, optimizer, self.state, self.extra)
            self.state = None  # as large as the weights and the optimiser
            self.env.wait()
        self.stop.watch()

    def _seconds(self):
        """Wall-clock time of the run so far: of all processes that went on with it."""
        return self.seconds + time.perf_counter() - self.started

    def record_start(self, record, bar):
        """The validation before the first step: step 0 in log.jsonl.

        It is written with the first step, before which nothing counts as begun (identity.begun).
        """
        self.at_start = [{"step": 0, "tokens_seen": 0, "tokens_selected": 0, **record}]
        self._note_validation(self.at_start[0], bar)
        bar.set_postfix(self.shown)

    def _note_validation(self, record, bar):
        """Add the reference's lead to a record with a validation loss, and print what is new."""
        self.val_loss = record["val_loss"]
        self.val_step = record["step"]
        self.val_loss_by_set = record.get("val_loss_by_set")
        lead = self.lead.over(self.val_loss)
        if lead is not None:
            record["reference_lead"] = lead
        self._show(record)
        said = self.lead.news(record["step"], self.val_loss)
        if said and self.env.main:
            bar.write(said)

    def _show(self, record):
        for name, key in SHOWN.items():
            if record.get(key) is not None:
                self.shown[name] = f"{record[key]:.4g}"

    def record_step(self, step, record, seconds, bar):
        """One line of log.jsonl and of the progress bar. `step` counts from 1.

        `record` is what the step itself counted; tokens are summed over the run here.
        """
        histogram = record.pop("histogram", None)  # for the tracker alone
        if step == self.first_step + 1:  # compilation and warm-up left out of the peak
            self.env.peak_memory(reset=True)
        self.step = step
        tokens = record["tokens_seen"]
        if step > self.first_step + WARM_UP:
            self.timed_tokens += tokens
            self.timed_seconds += seconds
        self.tokens_seen += tokens
        self.tokens_selected += record["tokens_selected"]
        record = {
            "step": step,
            **record,
            "tokens_seen": self.tokens_seen,
            "tokens_selected": self.tokens_selected,
            "tok_per_s": round(tokens / seconds),
            "seconds": round(self._seconds(), 2),
        }
        if "val_loss" in record:
            self._note_validation(record, bar)
        if self.env.main:
            lines = [json.dumps(line) + "\n" for line in (*self.at_start, record)]
            self.log_file.write("".join(lines).encode())
        if self.tracker:
            for line in self.at_start:
                self.tracker.log(line)
            rate = tokens / seconds * self.flops_per_token
            machine = {"mfu": self.env.mfu(rate), "peak_memory_bytes": self.env.peak_memory()}
            self.tracker.log(record | machine, getattr(self.args, "score", None), histogram)
        self.at_start = []
        self._show(record)
        bar.set_postfix(self.shown, refresh=False)
        bar.update()

    def save_if_due(self, done, student, optimizer):
        """A snapshot (`--snapshots`) and a training state, each in its turn.

        A state is due by steps (`--save-every`), by time (`--save-minutes`), at the end, and where
        any rank got SIGTERM: then KeyboardInterrupt on all of them. Raises OSError where a state
        that was being written could not be.
        """
        if is_snapshot(done, self.args):
            self.states.wait()
            folder = self.folder / f"step-{done:06d}"
            if self.env.main:
                owned.own_folder(folder)
            self.save_model(student, folder)
        # Ranks agree in each step; on gloo this takes less than a millisecond.
        asked, late, failed = self.env.any_rank(
            self.stop.asked, self.states.is_late(), self.states.has_failed()
        )
        if failed:
            self.states.wait()
        if asked or late or done % self.args.save_every == 0 or done == self.args.steps:
            self.save_state(done, student, optimizer)
        if asked:
            self.states.wait()
            raise KeyboardInterrupt

    def save_state(self, step, student, optimizer):
        """The training state after `step`, and what a Hugging Face folder needs beside weights."""
        if self.env.main:
            self.log_file.to_disk()  # a state never knows more steps than the log
        record = {
            "step": step,
            "seconds": self._seconds(),
            "tokens": [self.tokens_seen, self.tokens_selected],
            "val_loss": self.val_loss,
            "val_step": self.val_step,
            "val_loss_by_set": self.val_loss_by_set,
            "config": config_to_hf(self.config),
            "tokenizer_from": str(self.tokenizer_from),
            "card": self.card(),
        }
        self.states.save(student, optimizer, record, self.extra)

    def save_model(self, student, folder):
        """The wrapped model as a Hugging Face folder with a model card. All ranks must call it."""
        state, _ = parallel.full_state(student)
        if self.env.main:
            model = getattr(student, "module", student).lm
            checkpoint.save(model, folder, state=state, tokenizer_from=self.tokenizer_from)
            write_atomic(folder / "README.md", self.card())
        self.env.wait()

    def finish(self, student):
        """The model, then summary.json: its presence says that the run is finished."""
        self.states.wait()
        self.save_model(student, self.folder)
        self.summary = {
            "val_loss": self.val_loss,
            "exact_match": None,
            "tokens_seen": self.tokens_seen,
            "tokens_selected": self.tokens_selected,
            "seconds": round(self._seconds(), 2),
            "peak_memory_bytes": self.env.peak_memory(),
        }
        if self.val_loss_by_set:
            self.summary["val_loss_by_set"] = self.val_loss_by_set
        if self.lead.reference is not None:
            self.summary["reference_lead"] = self.lead.over(self.val_loss)
        if self.timed_seconds:
            rate = self.timed_tokens / self.timed_seconds
            self.summary["tok_per_s"] = round(rate)
            self.summary["mfu"] = self.env.mfu(rate * self.flops_per_token)
        if self.env.main:
            self.log_file.close()
            write_atomic(self.folder / "summary.json", json.dumps(self.summary, indent=1))
            if self.tracker:
                self.tracker.finish(self.summary)
            self.states.keep_newest()
            locks.unlock(self.folder)
        self.env.wait()
        self.stop.release()

    def card(self):
        """The model card of what has been trained so far."""
        return model_card(
            vars(self.args),
            self.identity,
            command=[word for word in sys.argv if word != "--overwrite"],  # no part of the recipe
            ranks=self.env.world,
            step=self.step,
            tokens_seen=self.tokens_seen,
            tokens_selected=self.tokens_selected,
            val_loss=self.val_loss,
            val_step=self.val_step,
        )

    def show_summary(self):
        if self.env.main:
            known = [key for key in SUMMARY if self.summary.get(key) is not None]
            shown = [SUMMARY[key].format(self.summary[key] / UNITS.get(key, 1)) for key in known]
            print(f"{self.folder}: {', '.join(shown)}")
            for name, loss in self.summary.get("val_loss_by_set", {}).items():
                print(f"{self.folder}: validation loss {loss:.4f} on {name}")
