"""The rows of tools.bench: training steps, ours and transformers', a forward pass, scoring."""

import contextlib
import copy
import io
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import common.device  # noqa: F401  first: it sets how torch's threads wait

import numpy as np
import torch
import torch.nn.functional as F

import slm
from common.compiling import compile_blocks
from common.errors import UserError
from common.numerics import is_compiled
from model import Config, Transformer, initialise
from text.writing import TokenSetWriter
from training.loss import FastLoss
from training.optimizer import make_optimizer
from training.selector import Choice, scale_gradients


class Preset(NamedTuple):
    vocab_size: int
    width: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool  # are input and output embedding one matrix?
    seq_len: int
    batch_size: int  # windows per step
    qk_norm: bool = False


PRESETS = {
    "demo": Preset(512, 96, 256, 2, 6, 6, True, 128, 8, qk_norm=True),
    "real-text": Preset(2048, 192, 512, 4, 6, 6, True, 256, 8),  # runs/real_text.sh
    "cpu-30m": Preset(32000, 384, 1024, 8, 6, 2, True, 512, 4),
    "cpu-130m": Preset(32000, 896, 2432, 12, 14, 2, True, 64, 4),  # for tools.bench.saves, too
    "cpu-200m": Preset(32000, 1024, 2816, 15, 16, 4, True, 64, 4),
    "tinyllama-1b": Preset(32000, 2048, 5632, 22, 32, 4, False, 2048, 8),
}
OURS = {  # row: head, backward, selective
    "clm": ("full", "exact", False),
    "clm_chunked": ("lean", "exact", False),
    "slm_full": ("full", "exact", True),
    "slm_kept": ("kept", "exact", True),
    "slm_lean": ("lean", "exact", True),
    "slm_pruned": ("kept", "pruned", True),
}
ROWS = (
    "clm_transformers",
    "clm",
    "clm_chunked",
    "slm_usual",
    "slm_full",
    "slm_kept",
    "slm_lean",
    "slm_pruned",
    "forward",
    "score",
)
# Batches that one call of the row `score` scores: still more notes and flushes than in a real run.
SCORED = 4


def config_of(args):
    preset = PRESETS[args.preset]
    return Config(
        vocab_size=args.vocab_size,
        hidden_size=preset.width,
        intermediate_size=preset.d_ff,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        tie_word_embeddings=preset.tied,
        max_position_embeddings=args.seq_len,
        qk_norm=preset.qk_norm,
    )


class Rows:
    """The steps that are measured, on random tokens.

    What they need is made at the first use: our model, transformers' model with the same shapes, a
    reference.
    """

    def __init__(self, args, env, folder):
        self.args = args
        self.env = env
        self.folder = Path(folder)
        self.config = config_of(args)
        self.made = {}
        shape = (args.batch_size, args.seq_len)
        rng = np.random.RandomState(0)
        self.x = env.tensor(rng.randint(0, args.vocab_size, shape))  # (B, T)
        self.y = env.tensor(rng.randint(0, args.vocab_size, shape))
        self.ref_loss = env.tensor((rng.rand(*shape) * 5).astype(np.float32))
        self.valid = torch.ones_like(self.x, dtype=torch.bool)
        self.n = self.x.numel()
        self.n_kept = slm.n_keep(self.n, args.k)

    def step(self, row):
        """A function of no arguments that takes one step of a row."""
        if row in OURS:
            return partial(self.our_step, *OURS[row])
        if row in slm.SCORES:
            return partial(self.method_step, row)
        return getattr(self, row)

    # ----------------------------------------------------------------------------------------------
    # what the steps are made of

    def once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def our_model(self):
        with self.env.device:
            model = Transformer(self.config)
        # It draws on the CPU, which is slow for a billion parameters; PyTorch's own do for a GPU.
        return initialise(model, 0) if self.env.device.type == "cpu" else model

    def ours(self, head, backward="exact"):
        """(training module, its optimiser). All forms share their parameters and one optimiser.

        Their modules are their own, for FastLoss puts other parts into the blocks.
        """

        def make():
            plain = self.once("model", self.our_model)
            shared = {id(p): p for p in plain.parameters()}  # deepcopy then copies none of them
            module = FastLoss(copy.deepcopy(plain, shared), head, backward)
            module.lm.checkpointing = self.args.checkpointing
            compile_blocks(module, self.args, self.env)
            return module

        module = self.once(f"{head} {backward}", make)
        return module, self.once("optimiser", lambda: make_optimizer(module, self.args))

    def theirs(self, name):
        """transformers' model of the same shapes, compiled where ours is, and its optimiser."""

        def make():
            try:
                from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
            except ModuleNotFoundError:
                raise UserError(
                    "transformers' model: is not installed; pip install transformers, or take "
                    "other --rows"
                ) from None
            shapes = (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "tie_word_embeddings",
                "max_position_embeddings",
            )
            same = {shape: getattr(self.config, shape) for shape in shapes}
            config = Qwen3Config if self.config.qk_norm else LlamaConfig
            with self.env.device:
                model = AutoModelForCausalLM.from_config(config(**same))
            if is_compiled(self.args, self.env.device):
                for block in model.model.layers:
                    block.compile()
            return model, make_optimizer(model, self.args)

        return self.once(name, make)

    def finish(self, loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # ----------------------------------------------------------------------------------------------
    # the rows

    def our_step(self, head, backward, selective):
        module, optimizer = self.ours(head, backward)
        k = self.args.k if selective else 1.0
        count = slm.n_keep(self.n, k)

        def select(losses):
            tokens = slm.Tokens(loss=losses, ref_loss=self.ref_loss)
            return slm.Selection(k).mask(tokens, self.valid)

        with self.env.autocast():
            total, _, _ = module(self.x, self.y, select, count=count)
        self.finish(total / count, optimizer)

    def method_step(self, name):
        """A step of `--score NAME`, as train_slm.py makes it with the head "kept"."""
        module, optimizer = self.ours("kept")
        weight = isinstance(slm.SCORES[name], slm.Weight)
        selection = slm.Selection(1.0 if weight else self.args.k, name)
        stored = self.once("stored", self.stored_values)
        settled, count = None, None
        if selection.counted == "masks":
            count = self.n_kept
        if selection.counted == "stored":  # the choice is made before the forward pass
            settled = selection.mask(slm.Tokens(**stored), self.valid)
            count = int(settled.sum())
        choice = Choice(selection, slm.Tokens(**stored), self.valid, settled)
        with self.env.autocast():
            total, _, _ = module(self.x, self.y, choice.keep, choice.wants, count)
        (total / (count or self.n)).backward()
        if count is None and selection.method.per != "valid":
            scale_gradients(module, self.n / choice.amount().clamp(min=1e-9))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def stored_values(self):
        """{name: (B, T)}: what is known of each token beside the student."""
        values = {name: self.ref_loss.roll(i) for i, name in enumerate(slm.STORED)}
        document = torch.arange(self.n, device=self.x.device).view_as(self.x) // 100
        noise = self.ref_loss / 5
        return {**values, "document": document, "noise": noise, "memory": noise}

    def clm_transformers(self):
        model, optimizer = self.theirs("student")
        with self.env.autocast():
            loss = model(input_ids=self.x, labels=self.x, use_cache=False).loss
        self.finish(loss, optimizer)

    def slm_usual(self):
        """Selection as it is usually done.

        transformers' model, the reference's forward pass in each step, full logits, a masked loss.
        """
        model, optimizer = self.theirs("student")
        reference, _ = self.theirs("reference")

        def losses_of(m):
            logits = m(input_ids=self.x, use_cache=False).logits.float()  # (B, T, V)
            return F.cross_entropy(logits.flatten(0, 1), self.y.flatten(), reduction="none")

        with self.env.autocast():
            with torch.no_grad():
                ref_loss = losses_of(reference)
            loss = losses_of(model)
            excess = loss.detach() - ref_loss
            highest = excess.topk(self.n_kept).indices
            kept = torch.zeros_like(loss).index_fill(0, highest, 1.0)
            loss = (loss * kept).sum() / kept.sum()
        self.finish(loss, optimizer)

    def forward(self):
        """Every token's loss, nothing else: what scoring cannot go below."""
        with torch.no_grad(), self.env.autocast():
            self.ours("full")[0](self.x, self.y)

    def score(self):
        """score.py's loop over SCORED batches: reading, forward passes, writing."""
        import score

        data = self.once("token set", self.tokens_to_score)
        out = self.folder / "ref_loss.bin"
        args = SimpleNamespace(
            model="a random model",
            out=str(out),
            seq_len=self.args.seq_len,
            batch_size=self.args.batch_size,
            entropy=False,
            context=None,
        )
        note = {"n_scored": 0, "checksums": {}}
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            score.score(args, self.env, data, self.ours("full")[0], note)

    def tokens_to_score(self):
        return token_set(self.folder, SCORED * self.n + 1, self.args.vocab_size)


def token_set(folder, count, vocab_size):
    """A TokenSet of `count` random tokens in a folder of its own."""
    folder = Path(folder) / f"tokens-{count}"
    writer = TokenSetWriter(folder, vocab_size)
    writer.append(tokens=np.random.RandomState(1).randint(0, vocab_size, count))
    return writer.finish(tokenizer="none", sources=[], seed=0)


# --------------------------------------------------------------------------------------------------
# memory


def memory_of(row, args, env):
    """This process's memory over three steps of one row, in bytes; for a fresh process.

    Returns {"peak_memory_bytes": above the interpreter and its libraries, "activation_bytes": above
    weights, gradients and optimiser, too}.
    """
    # What rows import at their first use counts among the libraries.
    import torch._dynamo  # an optimiser does

    import score  # noqa: F401

    with contextlib.suppress(ModuleNotFoundError):
        import transformers  # noqa: F401

    def now():
        if env.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return resident()

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
        # Between steps no gradients are held, so they are not in `between`.
        gradients = 0 if row in ("forward", "score") else bytes_of_gradients(rows)
    return {
        "peak_memory_bytes": peak - libraries,
        "activation_bytes": peak - between - gradients,
    }


def bytes_of_gradients(rows):
    if "student" in rows.made:
        _, optimizer = rows.made["student"]
    else:
        optimizer = rows.made["optimiser"]
    return sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


def resident():
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
