"""What both trainers share: their arguments' checks, the optimiser, validation, and a run's folder with its checkpoints and
log. Nothing here knows about token selection: the method is in slm.py.
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from files import UserError, is_demo_folder, read_json, renamed_when_whole, write_atomic


class LightAdamW(torch.optim.AdamW):
    """AdamW that keeps its two moments in bfloat16 between steps: 4 bytes a parameter instead of 8.

    The arithmetic is torch's own, in fp32, one parameter at a time; only what is kept is rounded. Rounding to the nearest
    would lose updates of the second moment that are smaller than 1/512 of it, as with beta2 = 0.999; not so with 0.95.
    """

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                 exp_avg_sq=torch.zeros_like(p))
                moments = [state[name].float() for name in ("exp_avg", "exp_avg_sq")]
                adamw([p], [p.grad], [moments[0]], [moments[1]], [], [state["step"]], fused=True, amsgrad=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                      weight_decay=group["weight_decay"], maximize=False)
                state["exp_avg"], state["exp_avg_sq"] = (m.bfloat16() for m in moments)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # makes them the parameters' dtype
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")})


def make_optimizer(model, args):
    """AdamW, betas (0.9, 0.95), fused (8 times faster on CPU too); weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    return (LightAdamW if args.moments == "bfloat16" else torch.optim.AdamW)(
        [{"params": [p for p in params if p.dim() >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True)


def lr_at(step, args):
    """Learning rate of step 0, 1, ..."""
    if step < args.warmup:                                        # 1. linear warm-up
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":                               # 2. constant after it
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.schedule == "cosine":                                 # 3. down to min_lr, along a cosine or a line
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return args.lr + progress * (args.min_lr - args.lr)


def flops_per_token(model, seq_len):
    """Of forward and backward pass: 6 N + 12 L d T, for N parameters without an untied input embedding and L layers of
    width d; attention's share is not halved for causality (PaLM, appendix B). Selection does not change it: the
    utilisation then tells what a token that was read costs, whether or not it was learnt from."""
    c = model.config
    n = sum(p.numel() for p in model.parameters()) - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    return 6 * n + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len


def check_arguments(args):
    """Refuse what cannot be meant, before anything is read or written."""
    def need(ok, flag, wanted):
        if not ok:
            raise UserError(f"{flag}: got {getattr(args, flag[2:].replace('-', '_'))}, wanted {wanted}")

    args.micro_batch_size = args.micro_batch_size or max(1, args.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    args.lr = 1e-3 if args.lr is None else args.lr
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    for flag in ("--seq-len", "--batch-size", "--micro-batch-size"):
        need(getattr(args, flag[2:].replace("-", "_")) > 0, flag, "at least 1")
    per_forward = args.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    need(args.batch_size % per_forward == 0, "--batch-size",
         f"a multiple of --micro-batch-size times the number of ranks, {per_forward}")
    need(args.steps is None or args.epochs is None, "--epochs", "either --steps or --epochs")
    need(args.steps is None or args.steps > 0, "--steps", "at least 1")
    need(args.epochs is None or 0 < args.epochs < math.inf, "--epochs", "a number above 0")
    need(math.isfinite(args.lr) and args.lr > 0, "--lr", "a positive number")
    for flag in ("--warmup", "--clip", "--weight-decay", "--min-lr", "--eval-every", "--snapshots"):
        need(getattr(args, flag[2:].replace("-", "_")) >= 0, flag, "0 or more")
    need(args.save_every > 0, "--save-every", "at least 1")
    need(args.seed >= 0, "--seed", "0 or more")
    need(args.init is not None, "--init", "a model's folder or hub id, or scratch")
    for flag in ("--n-layer", "--n-head", "--n-kv-head", "--d-model", "--d-ff"):
        value = getattr(args, flag[2:].replace("-", "_"))
        need(value is None or value > 0, flag, "at least 1")
    need(args.out is not None, "--out", "a folder for the run")


def clip_gradients(module, args, step):
    """Scale the gradients down to norm `--clip`; returns their norm before. Raises UserError where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient norm is {norm}; nothing was updated, the last saved state is "
                        f"kept. Lower --lr {args.lr} or lengthen --warmup {args.warmup}")
    return norm


def is_snapshot(done, args):
    """Is one of `--snapshots` N evenly spaced models due after `done` steps? The last one is the run's own folder."""
    return done < args.steps and any(done == round(args.steps * i / args.snapshots) for i in range(1, args.snapshots))


@torch.no_grad()
def validate(model, token_set, args, env):
    """{"val_loss": mean loss in nats over all targets that count} and, where the token set has labels, the same of each
    kind, "val_loss_by_kind". `model` is the (wrapped) WithLoss module."""
    kinds = token_set.kinds or ["all"]
    sums = torch.zeros(2, len(kinds), dtype=torch.float64, device=env.device)
    size, n = args.micro_batch_size, token_set.n_windows(args.seq_len)
    for start in range(env.rank * size, -(-n // (size * env.world)) * size * env.world, size * env.world):
        windows = np.arange(start, start + size).clip(max=n - 1)  # every rank makes the same number of forward passes
        x, y, valid = map(env.tensor, token_set.batch(windows, args.seq_len))
        valid &= env.tensor(np.arange(start, start + size) < n)[:, None]
        labels = token_set.labels(windows, args.seq_len)
        kind = torch.zeros_like(y) if labels is None else env.tensor(labels)
        with env.autocast():
            losses = model(x, y)
        for row, values in zip(sums, (losses[valid].double(), torch.ones_like(losses[valid], dtype=torch.float64))):
            row.index_add_(0, kind[valid], values)
    total, count = env.total(sums).tolist()
    record = {"val_loss": sum(total) / max(sum(count), 1)}
    if token_set.kinds:
        record["val_loss_by_kind"] = {k: t / c for k, t, c in zip(kinds, total, count) if c}
    return record


class Meter:
    """What one optimiser step reports, summed on the device over micro-batches and ranks: one synchronisation a step."""

    def __init__(self, env, kinds):
        self.env, self.kinds = env, kinds
        self.sums = torch.zeros(4 + 2 * len(kinds or ()), dtype=torch.float64, device=env.device)
        self.threshold = torch.full((), math.inf, device=env.device)

    def add(self, losses, valid, kept, kind=None, scores=None):
        """losses, valid, kept (B, T); `kind` (B, T) labels (numpy), for reporting only; `scores` what was ranked."""
        zero = torch.zeros((), device=losses.device)
        values = [torch.where(m, losses, zero).sum() for m in (valid, kept)] + [valid.sum(), kept.sum()]
        sums = [torch.stack([v.double() for v in values])]
        if kind is not None:
            kind = self.env.tensor(kind).flatten()
            sums += [torch.zeros(len(self.kinds), dtype=torch.float64, device=kind.device).index_add_(
                0, kind, m.flatten().double()) for m in (valid, kept)]
        self.sums += torch.cat(sums)
        if scores is not None:
            self.threshold = torch.minimum(self.threshold, torch.where(kept, scores, math.inf).min())

    def read(self):
        """The step's record: how many were kept, mean losses, lowest kept score, share kept of each kind."""
        if self.env.world > 1:
            dist.all_reduce(self.threshold, dist.ReduceOp.MIN)
        loss, selected, n_valid, n_kept, *counts = self.env.total(self.sums).tolist()
        threshold = self.threshold.item()
        record = {"tokens_selected": int(n_kept), "loss": loss / max(n_valid, 1),
                  "loss_selected": selected / max(n_kept, 1),
                  "threshold": threshold if math.isfinite(threshold) else None}
        if counts:
            every, kept = counts[: len(self.kinds)], counts[len(self.kinds):]
            record["kept"] = {name: round(b / a, 4) for name, a, b in zip(self.kinds, every, kept) if a}
        return record


# ---------------------------------------------------------------------------------------------------------------------
# a run's folder

NOT_IDENTITY = {"out", "resume", "overwrite", "threads", "save_every", "eval_every", "snapshots", "verify", "compile",
                "device", "head", "parallel", "checkpointing", "chain"}


WARM_UP = 5  # first steps of a process, compilation among them, that its rate leaves out


class Run:
    """A training run's folder: args.json, log.jsonl, train_state.pt, summary.json. Only rank 0 writes.

    Opening it settles --resume and --overwrite. `state` is the saved training state to go on from, or None; `summary`
    is set when the run is finished already. train_state.pt holds everything that a resume needs (weights too), so one
    rename makes a checkpoint, and a kill at any moment leaves the last good one.
    """

    def __init__(self, args, inputs, env, model):
        self.folder, self.args, self.env = Path(args.out), args, env
        self.record = {**{k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY}, "inputs": inputs}
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
        self.flops_per_token, self.timed = flops_per_token(model, args.seq_len), [0, 0.0]  # tokens, seconds
        if env.main and self.summary is None:
            self._cut_log()
            self.log_file = open(self.folder / "log.jsonl", "a")

    def _claim(self):
        path = self.folder / "args.json"
        if self.args.overwrite and path.exists():
            shutil.rmtree(self.folder)
        if path.exists():
            saved = read_json(path, "run")
            differing = [f"{k} {saved.get(k)!r} -> {v!r}" for k, v in self.record.items() if saved.get(k) != v]
            begun = any((self.folder / name).exists() for name in ("train_state.pt", "summary.json"))
            if differing and begun:
                raise UserError(f"{self.folder} holds a run with other arguments ({'; '.join(differing)}); "
                                f"choose another --out or start it over with --overwrite")
            if not (self.args.resume or is_demo_folder(self.folder)):
                raise UserError(f"{self.folder} exists; go on with --resume or start it over with --overwrite")
            if differing:  # nothing is lost: it stopped before it saved anything, for lack of memory perhaps
                write_atomic(path, json.dumps(self.record, indent=1))
            if (self.folder / "summary.json").exists():
                return read_json(self.folder / "summary.json", "run")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not a run of this kit; choose another --out")
        else:
            write_atomic(path, json.dumps(self.record, indent=1))
        return None

    def _cut_log(self):
        """Drop the records after the checkpoint's step: those steps are done again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            write_atomic(path, "".join(line for line in lines if json.loads(line)["step"] <= self.step))

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
        record = {"step": step, **record, "tokens_seen": self.tokens_seen, "tokens_selected": self.tokens_selected,
                  "tok_per_s": round(tokens / seconds)}
        if self.env.main:
            self.log_file.write(json.dumps(record) + "\n")
            self.log_file.flush()
        shown = {"loss": "loss", "kept": "loss_selected", "val": "val_loss", "tok/s": "tok_per_s"}
        self.shown.update({name: f"{record[key]:.4g}" for name, key in shown.items() if record.get(key) is not None})
        bar.set_postfix(self.shown, refresh=False)
        bar.update()

    def save_state(self, step, model_state, optimizer_state):
        """The training state, atomically. States are full (gathered) ones, the same for any number of ranks."""
        if self.env.main:
            state = {"step": step, "seconds": self.seconds + time.perf_counter() - self.started,
                     "tokens": [self.tokens_seen, self.tokens_selected], "val_loss": self.val_loss,
                     "model": model_state, "optimizer": optimizer_state}
            with renamed_when_whole(self.folder / "train_state.pt") as temporary:
                torch.save(state, temporary)
        self.env.wait()

    def finish(self):
        """summary.json, the last file of a run: its presence says that the run is finished."""
        self.summary = {"val_loss": self.val_loss, "exact_match": None, "tokens_seen": self.tokens_seen,
                        "tokens_selected": self.tokens_selected,
                        "seconds": round(self.seconds + time.perf_counter() - self.started, 2),
                        "peak_memory_bytes": self.env.peak_memory()}
        if self.timed[1]:
            rate = self.timed[0] / self.timed[1]
            self.summary |= {"tok_per_s": round(rate), "mfu": self.env.mfu(rate * self.flops_per_token)}
        if self.env.main:
            self.log_file.close()
            write_atomic(self.folder / "summary.json", json.dumps(self.summary, indent=1))

    def card(self):
        """The model card (README.md, with the hub's metadata on top) of what has been trained so far."""
        args, inputs = vars(self.args), self.record["inputs"]
        reference = next((sha for name, sha in inputs.items() if name.startswith("ref_")), None)
        init, k = args["init"], args.get("k", 1.0)
        scratch, revision = init == "scratch", f" at revision {args['revision']}" if args["revision"] else ""
        method = (f"Selective Language Modeling (Rho-1, arXiv:2404.07965): every token was read, the loss was taken on "
                  f"the {k:.0%} of them that the score `{args['score']}` ranks first." if k < 1 else
                  "Plain causal language modelling: the loss was taken on every token.")
        rows = {"base": "random weights" if scratch else init + revision,
                "base, sha256 of its tensors": inputs["init"],
                "training data": args["data"], "training data, sha256": inputs["data"],
                "reference, sha256 of its tensors": reference,
                "k": k, "score": args.get("score") if k < 1 else None, "scope": args.get("scope") if k < 1 else None,
                "window": f"{args['seq_len']} tokens", "batch": f"{args['batch_size']} windows",
                "steps": f"{self.step} of {args['steps']}", "tokens read": f"{self.tokens_seen:,}",
                "tokens learnt from": f"{self.tokens_selected:,}",
                "validation data": args["val"], "validation loss, nats per token": self.val_loss,
                "type of the weights": "float32, as the optimiser held them"}
        head = ["library_name: transformers", "pipeline_tag: text-generation"]
        head += [] if scratch or Path(init).exists() else [f"base_model: {init}"]
        head += ["tags: [selective-language-modeling]"] if k < 1 else []
        ranks = f", on {self.env.world} ranks" if self.env.world > 1 else ""
        return "\n".join([
            "---", *head, "---", "", f"# {Path(args['out']).name}", "", method, "", "| | |", "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items() if value is not None), "",
            f"Made by the command below{ranks}, with the settings below it.", "", "```",
            shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "```", "", "```json",
            json.dumps(self.record, indent=1), "```", "", f"The licence of {'' if scratch else 'the base and of '}the "
            "data holds for the weights.", ""])

    def show_summary(self):
        if self.env.main:
            shown = {"val_loss": "validation loss {:.4f}", "exact_match": "exact match {:.3f}",
                     "tokens_seen": "{:,} tokens read", "tokens_selected": "{:,} learnt from", "seconds": "{:.0f} s",
                     "peak_memory_bytes": "peak memory {:.2e} bytes", "tok_per_s": "{:,} tokens/s", "mfu": "MFU {:.1%}"}
            print(f"{self.folder}: " + ", ".join(text.format(self.summary[key]) for key, text in shown.items()
                                                 if self.summary.get(key) is not None))
