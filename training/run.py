"""What both trainers share: their arguments' checks, the optimiser, validation, and a run's folder with its checkpoints and
log. Nothing here knows about token selection: the method is in slm.py.
"""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.files import is_demo_folder, read_json, renamed_when_whole, write_atomic
from hf import checkpoint
from training.optimizer import flops_per_token
from training.parallel import full_state

# ---------------------------------------------------------------------------------------------------------------------
# a run's folder

NOT_IDENTITY = {
    "out",
    "resume",
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


class Run:
    """A training run's folder: args.json, log.jsonl, train_state.pt, summary.json. Only rank 0 writes.

    Opening it settles --resume and --overwrite. `state` is the saved training state to go on from, or None; `summary`
    is set when the run is finished already. train_state.pt holds everything that a resume needs (weights too), so one
    rename makes a checkpoint, and a kill at any moment leaves the last good one.
    """

    def __init__(self, args, inputs, env, model):
        self.folder, self.args, self.env = Path(args.out), args, env
        self.record = {
            **{k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY},
            "inputs": inputs,
        }
        self.record = json.loads(json.dumps(self.record, default=str))
        self.summary = env.from_main(self._claim)
        path = self.folder / "train_state.pt"
        self.state = None
        if self.summary is None and path.exists():
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.step = self.first_step = self.state["step"] if self.state else 0
        self.val_loss = self.state["val_loss"] if self.state else None
        self.seconds = self.state["seconds"] if self.state else 0.0
        self.tokens_seen, self.tokens_selected = self.state["tokens"] if self.state else (0, 0)
        self.started, self.shown = time.perf_counter(), {}
        self.flops_per_token, self.timed = (
            flops_per_token(model, args.seq_len),
            [0, 0.0],
        )  # tokens, seconds
        if env.main and self.summary is None:
            self._cut_log()
            self.log_file = open(self.folder / "log.jsonl", "a")

    def _claim(self):
        path = self.folder / "args.json"
        if self.args.overwrite and path.exists():
            shutil.rmtree(self.folder)
        if path.exists():
            saved = read_json(path, "run")
            differing = [
                f"{k} {saved.get(k)!r} -> {v!r}"
                for k, v in self.record.items()
                if saved.get(k) != v
            ]
            begun = any(
                (self.folder / name).exists() for name in ("train_state.pt", "summary.json")
            )
            if differing and begun:
                raise UserError(
                    f"{self.folder} holds a run with other arguments ({'; '.join(differing)}); "
                    f"choose another --out or start it over with --overwrite"
                )
            if not (self.args.resume or is_demo_folder(self.folder)):
                raise UserError(
                    f"{self.folder} exists; go on with --resume or start it over with --overwrite"
                )
            if (
                differing
            ):  # nothing is lost: it stopped before it saved anything, for lack of memory perhaps
                write_atomic(path, json.dumps(self.record, indent=1))
            if (self.folder / "summary.json").exists():
                return read_json(self.folder / "summary.json", "run")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} exists and is not a run of this kit; choose another --out"
            )
        else:
            write_atomic(path, json.dumps(self.record, indent=1))
        return None

    def _cut_log(self):
        """Drop the records after the checkpoint's step: those steps are done again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [
                line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")
            ]
            write_atomic(
                path, "".join(line for line in lines if json.loads(line)["step"] <= self.step)
            )

    def record_step(self, step, record, seconds, bar):
        """One line of log.jsonl and of the progress bar, from the step's own record. `step` counts from 1."""
        if step == self.first_step + 1:  # compilation and warm-up left out of the peak
            self.env.peak_memory(reset=True)
        self.step = step
        if step > self.first_step + WARM_UP:
            self.timed = [self.timed[0] + record["tokens_seen"], self.timed[1] + seconds]
        tokens, self.val_loss = record["tokens_seen"], record.get("val_loss", self.val_loss)
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
        shown = {"loss": "loss", "kept": "loss_selected", "val": "val_loss", "tok/s": "tok_per_s"}
        self.shown.update(
            {
                name: f"{record[key]:.4g}"
                for name, key in shown.items()
                if record.get(key) is not None
            }
        )
        bar.set_postfix(self.shown, refresh=False)
        bar.update()

    def save_state(self, step, model_state, optimizer_state):
        """The training state, atomically. States are full (gathered) ones, the same for any number of ranks."""
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

    def finish(self):
        """summary.json, the last file of a run: its presence says that the run is finished."""
        self.summary = {
            "val_loss": self.val_loss,
            "exact_match": None,
            "tokens_seen": self.tokens_seen,
            "tokens_selected": self.tokens_selected,
            "seconds": round(self.seconds + time.perf_counter() - self.started, 2),
            "peak_memory_bytes": self.env.peak_memory(),
        }
        if self.timed[1]:
            rate = self.timed[0] / self.timed[1]
            self.summary |= {
                "tok_per_s": round(rate),
                "mfu": self.env.mfu(rate * self.flops_per_token),
            }
        if self.env.main:
            self.log_file.close()
            write_atomic(self.folder / "summary.json", json.dumps(self.summary, indent=1))

    def card(self):
        """The model card (README.md, with the hub's metadata on top) of what has been trained so far."""
        args, inputs = vars(self.args), self.record["inputs"]
        reference = next((sha for name, sha in inputs.items() if name.startswith("ref_")), None)
        init, k = args["init"], args.get("k", 1.0)
        scratch, revision = (
            init == "scratch",
            f" at revision {args['revision']}" if args["revision"] else "",
        )
        method = (
            f"Selective Language Modeling (Rho-1, arXiv:2404.07965): every token was read, the loss was taken on "
            f"the {k:.0%} of them that the score `{args['score']}` ranks first."
            if k < 1
            else "Plain causal language modelling: the loss was taken on every token."
        )
        rows = {
            "base": "random weights" if scratch else init + revision,
            "base, sha256 of its tensors": inputs["init"],
            "training data": args["data"],
            "training data, sha256": inputs["data"],
            "reference, sha256 of its tensors": reference,
            "k": k,
            "score": args.get("score") if k < 1 else None,
            "scope": args.get("scope") if k < 1 else None,
            "window": f"{args['seq_len']} tokens",
            "batch": f"{args['batch_size']} windows",
            "steps": f"{self.step} of {args['steps']}",
            "tokens read": f"{self.tokens_seen:,}",
            "tokens learnt from": f"{self.tokens_selected:,}",
            "validation data": args["val"],
            "validation loss, nats per token": self.val_loss,
            "type of the weights": "float32, as the optimiser held them",
        }
        head = ["library_name: transformers", "pipeline_tag: text-generation"]
        head += [] if scratch or Path(init).exists() else [f"base_model: {init}"]
        head += ["tags: [selective-language-modeling]"] if k < 1 else []
        ranks = f", on {self.env.world} ranks" if self.env.world > 1 else ""
        return "\n".join(
            [
                "---",
                *head,
                "---",
                "",
                f"# {Path(args['out']).name}",
                "",
                method,
                "",
                "| | |",
                "|---|---|",
                *(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
                "",
                f"Made by the command below{ranks}, with the settings below it.",
                "",
                "```",
                shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                "```",
                "",
                "```json",
                json.dumps(self.record, indent=1),
                "```",
                "",
                f"The licence of {'' if scratch else 'the base and of '}the "
                "data holds for the weights.",
                "",
            ]
        )

    def show_summary(self):
        if self.env.main:
            shown = {
                "val_loss": "validation loss {:.4f}",
                "exact_match": "exact match {:.3f}",
                "tokens_seen": "{:,} tokens read",
                "tokens_selected": "{:,} learnt from",
                "seconds": "{:.0f} s",
                "peak_memory_bytes": "peak memory {:.2e} bytes",
                "tok_per_s": "{:,} tokens/s",
                "mfu": "MFU {:.1%}",
            }
            print(
                f"{self.folder}: "
                + ", ".join(
                    text.format(self.summary[key])
                    for key, text in shown.items()
                    if self.summary.get(key) is not None
                )
            )


def save_wrapped(module, folder, tokenizer_from, env, run=None):
    """A wrapped training module (slm.WithLoss, perhaps under DDP or FSDP) as a Hugging Face folder, with a model card
    where `run` is given. All ranks must call this; rank 0 writes."""
    state, _ = full_state(module)
    if env.main:
        checkpoint.save(
            getattr(module, "module", module).lm, folder, state=state, tokenizer_from=tokenizer_from
        )
        if run:
            write_atomic(Path(folder) / "README.md", run.card())
