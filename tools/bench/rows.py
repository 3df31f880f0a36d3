"""The rows of tools/bench.py: whole training steps of ours and of transformers, a bare forward pass, scoring."""

import contextlib
import io
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common.device

import numpy as np
import torch
import torch.nn.functional as F

import slm
from data import TokenSetWriter
from model import Config, Transformer, initialise
from training import parallel
from training.optimizer import make_optimizer
from training.loss import FastLoss

PRESETS = {  # V, width, MLP width, layers, heads, key/value heads, tied; T, windows per step
    "demo": (512, 96, 256, 2, 6, 6, True, 128, 8),
    "real-text": (2048, 192, 512, 4, 6, 6, True, 256, 8),  # runs/real_text.sh
    "cpu-30m": (32000, 384, 1024, 8, 6, 2, True, 512, 4),
    "tinyllama-1b": (32000, 2048, 5632, 22, 32, 4, False, 2048, 8),
}
SCORED = 4  # batches that one call of the row `score` scores: still more notes and flushes than in a real run


def config_of(args):
    _, width, d_ff, layers, heads, kv_heads, tied, *_ = PRESETS[args.preset]
    return Config(
        vocab_size=args.vocab_size,
        hidden_size=width,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=args.seq_len,
    )


OURS = {  # row: head, backward, selective
    "clm": ("full", "exact", False),
    "clm_chunked": ("lean", "exact", False),
    "slm_full": ("full", "exact", True),
    "slm_kept": ("kept", "exact", True),
    "slm_lean": ("lean", "exact", True),
    "slm_pruned": ("kept", "pruned", True),
    "slm_pruned_all": ("kept", "pruned_all", True),
}


class Rows:
    """The steps that are measured, on random tokens. What they need is made at the first use: our model, transformers'
    model with the same shapes, a reference."""

    def __init__(self, args, env, folder):
        self.args, self.env, self.folder = args, env, Path(folder)
        self.config, self.made, self.models = config_of(args), {}, []
        shape = (args.batch_size, args.seq_len)
        rng = np.random.RandomState(0)
        self.x, self.y = (env.tensor(rng.randint(0, args.vocab_size, shape)) for _ in range(2))
        self.ref_loss = env.tensor((rng.rand(*shape) * 5).astype(np.float32))
        self.valid = torch.ones_like(self.x, dtype=torch.bool)
        self.n, self.n_kept = self.x.numel(), slm.n_keep(self.x.numel(), args.k)

    def once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def ours(self, head, backward="exact"):
        """Our training module; all forms share one model and one optimiser."""

        def model():
            with self.env.device:
                return initialise_quickly(Transformer(self.config))

        def wrapped():
            module = FastLoss(self.once("model", model), head, backward)
            if not any(name.startswith("wrapped") for name in self.made):
                parallel.compile_blocks(module, self.args, self.env)
            return module

        module = self.once(f"wrapped {head} {backward}", wrapped)
        for part in module.modules():  # what another form left behind
            if hasattr(part, "rows"):
                part.rows = None
        return module, self.once("optimiser", lambda: make_optimizer(module, self.args))

    def theirs(self, name):
        """transformers' Llama with the same shapes, its blocks compiled where ours are, and its optimiser."""

        def make():
            from transformers import LlamaConfig, LlamaForCausalLM

            c = self.config
            same = {
                k: getattr(c, k)
                for k in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "tie_word_embeddings",
                    "max_position_embeddings",
                )
            }
            with self.env.device:
                model = LlamaForCausalLM(LlamaConfig(**same))
            parallel.compile_blocks(SimpleNamespace(lm=model), self.args, self.env)
            return model, make_optimizer(model, self.args)

        return self.once(name, make)

    def finish(self, loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(self, row):
        return partial(self.our_step, *OURS[row]) if row in OURS else getattr(self, row)

    def our_step(self, head, backward, selective):
        module, optimizer = self.ours(head, backward)
        k = self.args.k if selective else 1.0
        count = slm.n_keep(self.n, k)
        with self.env.autocast():
            total, _, _ = module(
                self.x,
                self.y,
                lambda losses: slm.choose(slm.Tokens(losses, self.ref_loss), self.valid, k),
                count=count,
            )
        self.finish(total / count, optimizer)

    def clm_transformers(self):
        model, optimizer = self.theirs("student")
        with self.env.autocast():
            loss = model(input_ids=self.x, labels=self.x, use_cache=False).loss
        self.finish(loss, optimizer)

    def slm_usual(self):
        """As it is usually done: transformers' model, the reference's forward pass in each step, full logits, a masked
        loss."""
        model, optimizer = self.theirs("student")
        reference, _ = self.theirs("reference")

        def losses(m):
            logits = m(input_ids=self.x, use_cache=False).logits.float()
            return F.cross_entropy(logits.flatten(0, 1), self.y.flatten(), reduction="none")

        with self.env.autocast():
            with torch.no_grad():
                ref = losses(reference)
            loss = losses(model)
            kept = torch.zeros_like(loss).index_fill(
                0, (loss.detach() - ref).topk(self.n_kept).indices, 1.0
            )
            loss = (loss * kept).sum() / kept.sum()
        self.finish(loss, optimizer)

    def forward(self):
        """Every token's loss, nothing else: what scoring cannot go below."""
        with torch.no_grad(), self.env.autocast():
            self.ours("full")[0](self.x, self.y)

    def score(self):
        """score.py's loop over the same number of tokens: reading, forward pass, writing (SCORED batches at a time)."""
        import score

        data = self.once(
            "token set", lambda: token_set(self.folder, SCORED * self.n + 1, self.args.vocab_size)
        )
        out = self.folder / "ref_loss.bin"
        args = SimpleNamespace(
            out=str(out), seq_len=self.args.seq_len, batch_size=self.args.batch_size, entropy=False
        )
        if not out.exists():
            np.full(data.count, np.nan, "<f2").tofile(out)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            score.score(args, self.env, data, self.ours("full")[0], {}, 0)


def initialise_quickly(model):
    return initialise(model, 0) if next(model.parameters()).is_cpu else model


def token_set(folder, count, vocab_size):
    folder = Path(folder) / f"tokens-{count}"
    writer = TokenSetWriter(folder, vocab_size)
    writer.append(tokens=np.random.RandomState(1).randint(0, vocab_size, count))
    return writer.finish(tokenizer="none", sources={}, seed=0)


def memory_of(row, args, env):
    """This process's memory over three steps of one row, in bytes. Called in a fresh process."""
    import transformers  # noqa: F401

    import score  # noqa: F401  what rows import counts among the libraries

    def now():
        return torch.cuda.memory_allocated() if env.device.type == "cuda" else resident()

    libraries = now()
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, env, folder)
        step = rows.step(row)
        for _ in range(2):  # the optimiser's state comes with the first
            step()
        between = now()
        env.peak_memory(reset=True)
        for _ in range(3):
            step()
        peak = env.peak_memory()
        trained = rows.made["student"][1] if "student" in rows.made else rows.made.get("optimiser")
        gradients = (
            0
            if row in ("forward", "score")
            else sum(p.nbytes for group in trained.param_groups for p in group["params"])
        )
    return {"peak_memory_bytes": peak - libraries, "activation_bytes": peak - between - gradients}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
