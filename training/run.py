"""A training run's folder: its identity, its log, its checkpoints, its summary.

Nothing here knows about token selection: the method is in slm.py.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.files import read_json, renamed_when_whole, write_atomic
from hf import checkpoint
from hf.card import model_card
from hf.tokenizer_files import FILES
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
    rename makes a checkpoint, and a kill at any moment leaves the last good one.
    """

    def __init__(self, args, inputs, env, model, tokenizer_from):
        self.folder = Path(args.out)
        self.args = args
        self.env = env
        self.tokenizer_from = tokenizer_from
        identity = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY}
        self.record = json.loads(json.dumps({**identity, "inputs": inputs}, default=str))
        self.summary = env.from_main(self._claim)
        self.state = None
        path = self.folder / "train_state.pt"
        if self.summary is None and path.exists():
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
        if env.main and self.summary is None:
            self._cut_log()
            self.log_file = open(self.folder / "log.jsonl", "a")

    def _claim(self):
        """Settle what the folder is. Returns the summary of a finished run, else None."""
        path = self.folder / "args.json"
        ours = path.exists()
        if self.args.overwrite and ours:
            erase(self.folder)
        if not path.exists():
            if not ours and self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(
                    f"{self.folder} exists and is not a run of this kit; choose another --out"
                )
            write_atomic(path, json.dumps(self.record, indent=1))
            return None
        saved = read_json(path, "run")
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
            return read_json(self.folder / "summary.json", "run")
        return None

    def _begun(self):
        """Has a step been made, or anything been saved?"""
        log = self.folder / "log.jsonl"
        if log.exists() and log.stat().st_size:
            return True
        if any(self.folder.glob("step-[0-9]*")):
            return True
        return any((self.folder / name).exists() for name in FIRST)

    def _cut_log(self):
        """Drop the records after the checkpoint's step: those steps are done again."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= self.step]
        write_atomic(path, "".join(kept))

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
            self.log_file.write(json.dumps(record) + "\n")
            self.log_file.flush()
        for name, key in SHOWN.items():
            if record.get(key) is not None:
                self.shown[name] = f"{record[key]:.4g}"
        bar.set_postfix(self.shown, refresh=False)
        bar.update()

    def save_if_due(self, done, student, optimizer):
        """A snapshot (`--snapshots`) and a training state (`--save-every`), each in its turn."""
        if is_snapshot(done, self.args):
            self.save_model(student, self.folder / f"step-{done:06d}")
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
            with renamed_when_whole(self.folder / "train_state.pt") as temporary:
                torch.save(state, temporary)
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

    def card(self):
        """The model card of what has been trained so far."""
        return model_card(
            vars(self.args),
            self.record,
            command=sys.argv,
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


# --------------------------------------------------------------------------------------------------
# --overwrite: what the kit writes into a run's folder, and nothing else

OURS = {
    "args.json",
    "log.jsonl",
    "summary.json",
    "train_state.pt",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    *FILES,
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FIRST = ("summary.json", "train_state.pt")  # without them a folder is not taken for a whole run
LAST = "args.json"  # with it a folder is known as a run


def erase(folder):
    """Delete a run of ours, its snapshots and their evaluations; folders that become empty, too.

    A kill on the way leaves a folder that is still known as a run, and not as a finished one.
    """
    for name in FIRST:
        (folder / name).unlink(missing_ok=True)
    for snapshot in folder.glob("step-[0-9]*"):
        if snapshot.is_dir():
            _erase_evaluation(snapshot / "eval")
            _erase_files(snapshot)
    _erase_evaluation(folder / "eval")
    _erase_files(folder)


def _is_ours(name):
    name = name.removesuffix(".tmp")
    return name in OURS or SHARD.fullmatch(name) is not None


def _erase_files(folder):
    files = [path for path in folder.iterdir() if path.is_file() and _is_ours(path.name)]
    for path in sorted(files, key=lambda path: path.name == LAST):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _erase_evaluation(folder):
    """Delete what eval_math.py wrote about the model that goes."""
    if not folder.is_dir():
        return
    results = folder / "results.json"
    if results.is_file():
        for task in read_json(results, "results"):
            for ending in (".jsonl", ".differences.jsonl"):
                (folder / (task + ending)).unlink(missing_ok=True)
    for unfinished in folder.glob("*.partial-[0-9]*.jsonl"):
        unfinished.unlink()
    (folder / "results.md").unlink(missing_ok=True)
    results.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
