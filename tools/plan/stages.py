"""What each stage of a recipe takes: tokens, FLOPs, memory per GPU, disk, hours, money.

Arithmetic is 6 N per token of training plus attention, 12 L d T (not halved for causality), a third
of it for scoring; checkpointing computes the forward pass twice and takes a third longer, and so
does a batch that is ranked as a whole.
"""

from itertools import product
from pathlib import Path

from common.device import PEAK_FLOPS  # first: it sets how torch's threads wait

import numpy as np

import slm
from common.errors import UserError
from common.records import read_json
from data import header_of
from hf.models import width_of_mlp
from model import Config
from tools.plan.memory import counts, memory, moments_of
from tools.plan.recipe import stage_of
from training.method_flags import selection_of
from training.optimizer import flops_of

# (FLOP/s, bytes): a little less than there is, for the CUDA context and the allocator's gaps.
GPUS = {
    "h100": (PEAK_FLOPS["H100"], 80e9),
    "h200": (PEAK_FLOPS["H200"], 141e9),
    "b200": (PEAK_FLOPS["B200"], 180e9),
    "a100": (PEAK_FLOPS["A100"], 80e9),
    "a100-40g": (PEAK_FLOPS["A100"], 40e9),
    "l40s": (PEAK_FLOPS["L40S"], 46e9),
    "4090": (PEAK_FLOPS["4090"], 24e9),
    "3090": (PEAK_FLOPS["3090"], 24e9),
}
# Bytes/s, assumed: of several ranks each copies its part into the CPU's memory and goes on; one
# rank alone waits until its file is written.
COPIED = 3e9
WRITTEN = 1e9
VOCABULARY = 32_000  # of a model from scratch whose token set is not there yet
TINYLLAMA = Config(32000, 2048, 5632, 22, 32, 4)
MISTRAL = Config(32000, 4096, 14336, 32, 32, 8, sliding_window=4096, model_type="mistral")
SMOLLM = Config(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)
KNOWN = {
    "TinyLlama/TinyLlama_v1.1": TINYLLAMA,
    "microsoft/rho-math-1b-v0.1": TINYLLAMA,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "microsoft/rho-math-7b-v0.1": MISTRAL,
    "HuggingFaceTB/SmolLM2-135M": SMOLLM,
    "meta-llama/Llama-2-7b-hf": Config(32000, 4096, 11008, 32, 32, 32),
}


class Plan:
    """Follows the files from stage to stage: sizes of token sets, shapes of models.

    `rows`: what each stage takes, in the order of `add`.
    """

    def __init__(self, gpu, n_gpus, mfu=0.3, price=0.0, tokens=()):
        self.flops, self.bytes = GPUS[gpu]
        self.n_gpus = n_gpus
        self.mfu = mfu
        self.price = price
        self.sets = dict(tokens)
        self.models = dict(KNOWN)
        self.rows = []

    def add(self, words):
        """One command of the recipe, as a list of words."""
        name, args = stage_of(words)
        row = {
            "stage": name,
            "out": None,
            "tokens": 0,
            "flops": 0.0,
            "hours": 0.0,
            "cost": 0.0,
            "disk": 0,
        }
        self.rows.append(row)
        if args is None:
            return
        row["out"] = args.out
        if name == "prepare.py":
            self.add_preparing(row, args)
        elif name == "score.py":
            self.add_scoring(row, args)
        else:
            self.add_training(row, args)

    def add_preparing(self, row, args):
        known = all((Path(source) / "meta.json").exists() for source in args.source)
        if args.out and (Path(args.out) / "meta.json").exists():
            self.sets[args.out] = header_of(args.out).count
        elif args.max_tokens:
            self.sets[args.out] = args.max_tokens
        elif args.out not in self.sets and known:
            self.sets[args.out] = sum(self.size(source) for source in args.source)
        row["tokens"] = self.size(args.out)
        masked = args.mask_prompt or any(source.startswith("hf:") for source in args.source)
        made = args.out and (Path(args.out) / "meta.json").exists()
        of_token = np.dtype(header_of(args.out).dtype).itemsize if made else 2
        row["disk"] = row["tokens"] * (of_token + (1 if masked else 0))

    def add_scoring(self, row, args):
        config = self.config(args.model, args)
        row.update(config=config, parameters=counts(config)[0])
        row["tokens"] = self.size(args.data)
        row["disk"] = row["tokens"] * (4 if args.entropy else 2)
        forward = flops_per_token(config, args.context or args.seq_len) / 3
        # Pieces of a short context overlap by half: each token is read twice.
        row["flops"] = row["tokens"] * forward * (2 if args.context else 1)
        self.add_hours(row, row["flops"])

    def add_training(self, row, args):
        config = self.config(args.init, args)
        n = counts(config)[0]
        per_step = args.batch_size * args.seq_len
        if not args.steps:
            tokens = int((args.epochs or 1) * self.size(args.data))
            args.steps = -(-tokens // per_step)
        row.update(config=config, parameters=n, steps=args.steps, tokens=args.steps * per_step)
        row["state"] = 4 * n + moments_of(config, args.moments)
        # Two states, and a third while it is written; each model takes 4 bytes a parameter.
        row["disk"] = 3 * row["state"] + 4 * max(1, args.snapshots) * n
        self.models[args.out] = config
        self.fit(row, args)
        row["flops"] = row["tokens"] * flops_per_token(config, args.seq_len)
        forward = row["flops"] / 3
        self.add_hours(
            row, row["flops"] + forward * (args.checkpointing + ranks_first(args, row["micro"]))
        )
        self.add_saves(row, args)

    def add_saves(self, row, args):
        """How often a state is saved, and the seconds that training stands still for it."""
        row["saves"] = -(-args.steps // args.save_every)
        if args.save_minutes:
            between = row["hours"] * 60 / row["saves"]
            row["saves"] *= 1 + int(between / args.save_minutes)
        share = row["state"] / self.n_gpus
        row["still"] = row["saves"] * share / (COPIED if self.n_gpus > 1 else WRITTEN)

    def add_hours(self, row, flops):
        row["gpu_hours"] = flops / (self.flops * self.mfu) / 3600
        row["hours"] = row["gpu_hours"] / self.n_gpus
        row["cost"] = row["gpu_hours"] * self.price

    # ----------------------------------------------------------------------------------------------
    # sizes and shapes

    def size(self, folder):
        """Tokens of a token set. Raises UserError where nothing says how many."""
        if folder in self.sets:
            return self.sets[folder]
        if folder and (Path(folder) / "meta.json").exists():
            return header_of(folder).count
        raise UserError(
            f"{folder}: how many tokens it will have is not known; say it with --tokens {folder}=N"
        )

    def config(self, name, args):
        """The model of --init or --model: a folder, a hub id, an earlier --out, or scratch."""
        if name == "scratch":
            known = (Path(args.data) / "meta.json").exists()
            return Config(
                header_of(args.data).vocab_size if known else VOCABULARY,
                args.d_model,
                args.d_ff or width_of_mlp(args.d_model),
                args.n_layer,
                args.n_head,
                args.n_kv_head or args.n_head,
                tie_word_embeddings=True,
                qk_norm=bool(args.qk_norm),
            )
        if name not in self.models:
            self.models[name] = read_config(name, args.revision)
        return self.models[name]

    # ----------------------------------------------------------------------------------------------
    # memory

    def fit(self, row, args):
        """Memory of a training stage as it is commanded; where it does not fit, the smallest change
        that makes it fit."""
        micro = self.micro_batch(args)
        if args.shard_size and self.n_gpus % args.shard_size:
            raise UserError(
                f"--shard-size: got {args.shard_size}, wanted a divisor of {self.n_gpus} GPUs"
            )

        def need(size, head, moments, checkpointing, reshard, parallel):
            """(bytes by part, peak)."""
            return memory(
                row["config"],
                size,
                args.seq_len,
                self.n_gpus,
                parallel,
                accumulate=args.batch_size > size * self.n_gpus,
                head=head,
                moments=moments,
                reshard=reshard,
                checkpointing=checkpointing,
                shards=args.shard_size,
                k=getattr(args, "k", 1.0),
                bf16=args.dtype != "float32",
                told=told(args),
                backward=getattr(args, "backward", "exact"),
            )

        asked = (args.head, args.moments, args.checkpointing)
        asked += (args.reshard_after_forward, args.parallel)
        row["micro"] = micro
        row["memory"], row["peak"] = need(micro, *asked)
        row["fits"] = row["peak"] <= self.bytes
        row["change"] = None if row["fits"] else self.smallest_change(row, args, need)

    def micro_batch(self, args):
        """Windows per GPU per forward pass: what was asked for, or less where that is too many."""
        share = max(1, args.batch_size // self.n_gpus)
        micro = min(args.micro_batch_size or share, share)
        while args.batch_size % (micro * self.n_gpus) and micro > 1:
            micro -= 1
        if args.batch_size % (micro * self.n_gpus):
            raise UserError(
                f"--batch-size {args.batch_size}: is not shared out evenly over {self.n_gpus} GPUs"
            )
        return micro

    def smallest_change(self, row, args, need):
        """The flags that make a training stage fit, the cheapest that do."""
        micro = row["micro"]
        parallel = [args.parallel, "fsdp"] if self.n_gpus > 1 else [args.parallel]
        choices = product(  # the cheapest change first: the last of these changes fastest
            dict.fromkeys(parallel),
            dict.fromkeys([args.moments, "bfloat16"]),
            dict.fromkeys([args.reshard_after_forward, "default"]),
            dict.fromkeys([args.checkpointing, True]),
            dict.fromkeys([args.head, "lean"]),
            halvings(micro),
        )
        for how, moments, reshard, checkpointing, head, size in choices:
            _, peak = need(size, head, moments, checkpointing, reshard, how)
            if peak > self.bytes:
                continue
            changes = {
                f"--micro-batch-size {size}": size != micro,
                f"--head {head}": head != args.head,
                f"--reshard-after-forward {reshard}": reshard != args.reshard_after_forward,
                f"--moments {moments}": moments != args.moments,
                "--checkpointing": checkpointing != args.checkpointing,
                f"--parallel {how}": how != args.parallel,
            }
            return " ".join(flag for flag, changed in changes.items() if changed)
        states = 12 * row["parameters"]
        return (
            f"more GPUs: weights, gradients and optimiser alone are {states / 1e9:.0f} GB, "
            f"bfloat16 moments and all, shared with FSDP2"
        )


def told(args):
    """Is it known before the losses how many tokens a training stage keeps?"""
    if not hasattr(args, "score"):  # train_ref.py
        return True
    selection = selection_of(args)
    if isinstance(selection.method, slm.Weight):
        return False
    return selection.counted != "losses" or selection.scope == "batch"


def ranks_first(args, micro):
    """Is a step's batch ranked in a forward pass of its own, before that of the gradient?

    micro: windows of a micro-batch, of one rank.
    """
    if not hasattr(args, "score"):  # train_ref.py
        return False
    selection = selection_of(args)
    unknown = args.backward == "pruned" and selection.counted == "losses"
    looks = selection.scope == "batch" and not selection.static
    return looks and (args.batch_size > micro or unknown)


def halvings(n):
    """n, n / 2, n / 4, ... while they are whole."""
    out = [n]
    while out[-1] % 2 == 0:
        out.append(out[-1] // 2)
    return out


def read_config(name, revision):
    """The shape of a model that is in a folder or on the hub."""
    from hf.config import config_from_hf
    from hf.downloads import get

    if Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        path = get(name, "config.json", revision)
    if not path:
        raise UserError(f"{name}: has no config.json, so its shape is not known")
    return config_from_hf(read_json(path, "model"), str(path))


def flops_per_token(config, seq_len):
    """FLOPs of one token of training."""
    return flops_of(config, counts(config)[0], seq_len)
