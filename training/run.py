"""A training run's folder: its identity, its log, its checkpoints, its summary.

Nothing here knows about token selection: the method is in slm.py.
"""

import json
import sys
import time
import zipfile
from pathlib import Path

import torch

from common import aside, files
from common.errors import UserError
from common.files import renamed_when_whole, write_atomic
from common.records import read_json
from hf import checkpoint
from hf.card import model_card
from training import parallel
from training.arguments import is_snapshot
from training.optimizer import flops_per_token

# What may change when a run goes on: it changes no number of it, or only what is reported.
NOT_IDENTITY = {
    "out",
    "overwrite",
    "threads",
    "save_every",
    "eval_every",
    "snapshots",
    "verify",
    "compile",
    "device",
    "head",
    "parallel",
    "checkpointing",
    "chain",
}
FORMAT = 1  # of args.json and what it belongs to
START_OVER = "bring it back, or start over with --overwrite"  # for a file that cannot be read
STATE = "train_state.pt"
BEFORE = "train_state.before.pt"  # the state before that one
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one of them
RECORDS = ("args.json", "log.jsonl", "summary.json", STATE, BEFORE)  # of the run, and not the model
MODEL = ("README.md", "config.json", "generation_config.json", *WEIGHTS)
STATE_KEYS = {"step", "seconds", "tokens", "val_loss", "model", "optimizer"}
SHOWN_REASON = 80  # characters of what torch says
WARM_UP = 5  # first steps of a process, compilation among them, that its rate leaves out
SHOWN = {"loss": "loss", "kept": "loss_selected", "val": "val_loss", "tok/s": "tok_per_s"}
SUMMARY = {
    "val_loss": "validation loss {:.4f}",
    "exact_match": "exact match {:.3f}",
    "tokens_seen": "{:,} tokens read",
    "tokens_selected": "{:,} selected",
    "seconds": "{:.0f} s",
    "peak_memory_bytes": "peak memory {:.2e} bytes",
    "tok_per_s": "{:,} tokens/s",
    "mfu": "MFU {:.1%}",
}


class Run:
    """args.json, log.jsonl, train_state.pt, summary.json and the model. Only rank 0 writes.

    Opening it settles whether the run starts, goes on, is finished (`summary` is set), or is
    another one (UserError). train_state.pt holds all that is needed to go on, weights too: one
    rename makes a checkpoint, and a kill at any moment leaves the last good one. The one before it
    is kept as well, for a disk that loses what it was given. No other process can write here.
    """

    def __init__(self, args, inputs, env, model, tokenizer_from):
        self.folder = Path(args.out)
        self.args = args
        self.env = env
        self.tokenizer_from = tokenizer_from
        identity = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY}
        record = {"format": FORMAT, **identity, "inputs": inputs}
        self.record = json.loads(json.dumps(record, default=str))
        self.summary = env.from_main(self._claim)
        self.newest = None  # which of the two files holds the newest state that can be read
        self.state = self._saved_state() if self.summary is None else None
        saved = self.state or {"step": 0, "val_loss": None, "seconds": 0.0, "tokens": (0, 0)}
        self.step = self.first_step = saved["step"]
        self.val_loss = saved["val_loss"]
        self.seconds = saved["seconds"]
        self.tokens_seen, self.tokens_selected = saved["tokens"]
        self.started = time.perf_counter()
        self.shown = {}
        self.flops_per_token = flops_per_token(model, args.seq_len)
        self.timed_tokens = 0
        self.timed_seconds = 0.0
        if self.state and env.main:
            aside.discard(self.folder)  # a kill came before the first state could do so
        if env.main and self.summary is None:
            self.log_file = files.Growing(self.folder / "log.jsonl", self._log_size())

    def _claim(self):
        """Settle what the folder is. Returns the summary of a finished run, else None."""
        path = self.folder / "args.json"
        if self.folder.exists():
            self._refuse_foreign()
        files.lock_folder(self.folder, "run")
        if self.args.overwrite:
            aside.set_aside(self.folder)
        else:
            aside.put_back(self.folder)
        if not (self.folder / "summary.json").exists():
            files.refuse_foreign(self.folder / name for name in MODEL)
        if not path.exists():
            write_atomic(path, json.dumps(self.record, indent=1))
            return None
        saved = read_json(path, "run", START_OVER)
        differing = [
            f"{k} {saved.get(k)!r} -> {v!r}" for k, v in self.record.items() if saved.get(k) != v
        ]
        if differing and self._begun():
            raise UserError(
                f"{self.folder} holds a run with other arguments ({'; '.join(differing)}); "
                f"choose another --out or start it over with --overwrite"
            )
        if differing:  # it stopped in its first step, for lack of memory perhaps
            write_atomic(path, json.dumps(self.record, indent=1))
        if (self.folder / "summary.json").exists():
            return self._finished()
        return None

    def _refuse_foreign(self):
        """Raises UserError where the folder holds something, and nothing that a run wrote."""
        if not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: is a file, wanted a folder; name another one")
        files.refuse_foreign(self.folder / name for name in RECORDS)
        if any(self.folder.iterdir()) and not files.written(self.folder):
            raise UserError(
                f"{self.folder} exists and is not a run of this kit; choose another --out"
            )

    def _finished(self):
        """The summary of a finished run. Raises UserError where its weights are gone."""
        if not any((self.folder / name).exists() for name in WEIGHTS):
            raise UserError(
                f"{self.folder} holds a finished run, but {WEIGHTS[0]} is gone; bring it back, or "
                f"train again with --overwrite"
            )
        aside.discard(self.folder)
        files.remove(self.folder / BEFORE)
        files.unlock(self.folder)
        return read_json(self.folder / "summary.json", "run", START_OVER)

    def _begun(self):
        """Has a step been made, or anything been saved?"""
        log = self.folder / "log.jsonl"
        if log.exists() and log.stat().st_size:
            return True
        if any(self.folder.glob("step-[0-9]*")):
            return True
        return any((self.folder / name).exists() for name in ("summary.json", STATE, BEFORE))

    def _saved_state(self):
        """The newest training state that can be read, or None. Raises UserError."""
        broken = []
        for name in (STATE, BEFORE):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                state = read_state(path)
            except UserError as error:
                broken.append(error)
                continue
            self.newest = name
            if broken and self.env.main:
                step = state["step"]
                print(f"{broken[0]}; going on from the one before it, step {step}", file=sys.stderr)
            return state
        if broken:
            raise UserError(f"{broken[0]}; no older one is left: start over with --overwrite")
        return None

    def _log_size(self):
        """Bytes of log.jsonl up to the saved state's step: the steps behind it are done again.

        Raises UserError where it does not reach that far.
        """
        path = self.folder / "log.jsonl"
        size = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for step in range(1, self.step + 1):
            line = lines[step - 1] if step <= len(lines) else b""
            if not line.startswith(b'{"step": %d,' % step) or not line.endswith(b"}\n"):
                raise UserError(
                    f"{path}: was cut or changed at step {step}, the saved state is of step "
                    f"{self.step}; bring the whole file back, or start over with --overwrite"
                )
            size += len(line)
        return size

    def restore(self, student, optimizer):
        """Load the saved state, if there is one, into the wrapped model and its optimiser."""
        if self.state:
            parallel.restore(student, optimizer, self.state)
            self.state = None  # as large as the weights and the optimiser

    def record_step(self, step, record, seconds, bar):
        """One line of log.jsonl and of the progress bar. `step` counts from 1.

        `record` is what the step itself counted; tokens are summed over the run here.
        """
        if step == self.first_step + 1:  # compilation and warm-up left out of the peak
            self.env.peak_memory(reset=True)
        self.step = step
        tokens = record["tokens_seen"]
        if step > self.first_step + WARM_UP:
            self.timed_tokens += tokens
            self.timed_seconds += seconds
        self.val_loss = record.get("val_loss", self.val_loss)
        self.tokens_seen += tokens
        self.tokens_selected += record["tokens_selected"]
        record = {
            "step": step,
            **record,
            "tokens_seen": self.tokens_seen,
            "tokens_selected": self.tokens_selected,
            "tok_per_s": round(tokens / seconds),
        }
        if self.env.main:
            self.log_file.write((json.dumps(record) + "\n").encode())
        for name, key in SHOWN.items():
            if record.get(key) is not None:
                self.shown[name] = f"{record[key]:.4g}"
        bar.set_postfix(self.shown, refresh=False)
        bar.update()

    def save_if_due(self, done, student, optimizer):
        """A snapshot (`--snapshots`) and a training state (`--save-every`), each in its turn."""
        if is_snapshot(done, self.args):
            folder = self.folder / f"step-{done:06d}"
            if self.env.main:
                files.own_folder(folder)
            self.save_model(student, folder)
        if done % self.args.save_every == 0 or done == self.args.steps:
            self.save_state(done, *parallel.full_state(student, optimizer))

    def save_state(self, step, model_state, optimizer_state):
        """The training state, atomically. States are gathered, alike for any number of ranks."""
        if self.env.main:
            state = {
                "step": step,
                "seconds": self.seconds + time.perf_counter() - self.started,
                "tokens": [self.tokens_seen, self.tokens_selected],
                "val_loss": self.val_loss,
                "model": model_state,
                "optimizer": optimizer_state,
            }
            self.log_file.to_disk()  # a state never knows more steps than the log
            path = self.folder / STATE
            if self.newest == STATE:  # a damaged one never takes the place of a good one
                files.rename(path, self.folder / BEFORE)
            with renamed_when_whole(path) as temporary:
                torch.save(state, temporary)
            self.newest = STATE
            aside.discard(self.folder)
        self.env.wait()

    def save_model(self, student, folder):
        """The wrapped model as a Hugging Face folder with a model card. All ranks must call it."""
        state, _ = parallel.full_state(student)
        if self.env.main:
            model = getattr(student, "module", student).lm
            checkpoint.save(model, folder, state=state, tokenizer_from=self.tokenizer_from)
            write_atomic(folder / "README.md", self.card())

    def finish(self, student):
        """The model, then summary.json: its presence says that the run is finished."""
        self.save_model(student, self.folder)
        self.summary = {
            "val_loss": self.val_loss,
            "exact_match": None,
            "tokens_seen": self.tokens_seen,
            "tokens_selected": self.tokens_selected,
            "seconds": round(self.seconds + time.perf_counter() - self.started, 2),
            "peak_memory_bytes": self.env.peak_memory(),
        }
        if self.timed_seconds:
            rate = self.timed_tokens / self.timed_seconds
            self.summary["tok_per_s"] = round(rate)
            self.summary["mfu"] = self.env.mfu(rate * self.flops_per_token)
        if self.env.main:
            self.log_file.close()
            write_atomic(self.folder / "summary.json", json.dumps(self.summary, indent=1))
            files.remove(self.folder / BEFORE)
            files.unlock(self.folder)

    def card(self):
        """The model card of what has been trained so far."""
        return model_card(
            vars(self.args),
            self.record,
            command=[word for word in sys.argv if word != "--overwrite"],  # no part of the recipe
            ranks=self.env.world,
            step=self.step,
            tokens_seen=self.tokens_seen,
            tokens_selected=self.tokens_selected,
            val_loss=self.val_loss,
        )

    def show_summary(self):
        if self.env.main:
            known = [key for key in SUMMARY if self.summary.get(key) is not None]
            shown = [SUMMARY[key].format(self.summary[key]) for key in known]
            print(f"{self.folder}: {', '.join(shown)}")


def read_state(path):
    """A training state, its tensors mapped from the file. Raises UserError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} differs")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no one class for a file that is cut, empty or no state
        reason = str(error).splitlines()[0][:SHOWN_REASON] if str(error) else type(error).__name__
        raise UserError(f"{path}: is damaged or no training state ({reason})") from None
    missing = STATE_KEYS - set(state) if isinstance(state, dict) else STATE_KEYS
    if missing:
        raise UserError(f"{path}: is no training state, it lacks {', '.join(sorted(missing))}")
    return state
