"""What a recipe costs before the first GPU hour is spent: parameters, tokens, FLOPs, memory per GPU, disk, hours, money.

    python -m tools.plan runs/rho_math_1b.sh --gpu h100 --n-gpus 32 --price-per-hour 2.50
    python -m tools.plan runs/rho_math_1b.sh --gpu 4090 --n-gpus 1 --mfu 0.4
    python -m tools.plan --command "train_slm.py --init TinyLlama/TinyLlama_v1.1 --data d --k 0.6 --seq-len 2048 \\
        --batch-size 512 --micro-batch-size 4" --tokens d=1e9 --gpu h100

Reads the commands that the recipe would run (PLAN=1 bash RECIPE prints them, and nothing runs), with the stages' own
parsers. TinyLlama's, Mistral-7B's, Llama-2-7B's and Rho-1's shapes are known here; of other hub ids config.json is fetched.

Arithmetic is 6 N per token of training plus attention, 12 L d T (not halved for causality), a third of it for scoring;
checkpointing computes the forward pass twice and takes a third longer. Hours follow from the MFU that you state: it is an
assumption, not a measurement. What selection saves in the backward pass, preparing text and evaluation are not counted.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

from common.device import PEAK_FLOPS  # first: it sets how torch's threads wait

import prepare
import score
import train_ref
import train_slm
from common.errors import UserError, cli
from common.files import read_json
from model import Config
from tools.plan.memory import counts, memory
from training.arguments import check_arguments

GPUS = {  # PEAK_FLOPS' name; bytes: a little less than there is, for the CUDA context and the allocator's gaps
    "h100": ("H100", 80e9),
    "h200": ("H200", 141e9),
    "b200": ("B200", 180e9),
    "a100": ("A100", 80e9),
    "a100-40g": ("A100", 40e9),
    "l40s": ("L40S", 46e9),
    "4090": ("4090", 24e9),
    "3090": ("3090", 24e9),
}
GPUS = {gpu: (PEAK_FLOPS[name], size) for gpu, (name, size) in GPUS.items()}
TINYLLAMA = Config(32000, 2048, 5632, 22, 32, 4)
MISTRAL = Config(32000, 4096, 14336, 32, 32, 8, sliding_window=4096, model_type="mistral")
KNOWN = {
    "TinyLlama/TinyLlama_v1.1": TINYLLAMA,
    "microsoft/rho-math-1b-v0.1": TINYLLAMA,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "microsoft/rho-math-7b-v0.1": MISTRAL,
    "meta-llama/Llama-2-7b-hf": Config(32000, 4096, 11008, 32, 32, 32),
}
STAGES = {
    "prepare.py": prepare,
    "train_ref.py": train_ref,
    "score.py": score,
    "train_slm.py": train_slm,
}


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a recipe of runs/ that knows PLAN=1; or:")
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        help="one stage's command (may be given several times)",
    )
    parser.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="SET=N",
        help="size of a token set, where "
        "neither its folder nor --max-tokens of the command that makes it says",
    )
    parser.add_argument("--gpu", default="h100", choices=[*GPUS])
    parser.add_argument("--n-gpus", type=int, default=8)
    parser.add_argument(
        "--price-per-hour", type=float, default=2.5, help="of one GPU, in any currency"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.3,
        help="share of the GPU's peak that is reached (an assumption)",
    )
    args = parser.parse_args(argv)
    if not args.recipe and not args.command:
        raise UserError(
            "tools.plan: got neither a recipe nor --command; name one, such as runs/rho_math_1b.sh"
        )
    if args.n_gpus < 1 or not 0 < args.mfu <= 1:
        raise UserError(
            f"--n-gpus {args.n_gpus} --mfu {args.mfu}: wanted at least one GPU, and a share above 0 up to 1"
        )
    return args


def commands_of(recipe, n_gpus):
    """The stages' commands that a recipe would run, [[script, flag, ...]]; raises UserError where it fails."""
    if not Path(recipe).exists():
        raise UserError(f"{recipe}: no such recipe; they are in runs/")
    if not re.search(r"\bPLAN\b|/common\.sh", Path(recipe).read_text()):  # it would run instead
        raise UserError(
            f"{recipe}: does not know PLAN=1; only the recipes of the paper's experiments do"
        )
    done = subprocess.run(
        ["bash", recipe],
        capture_output=True,
        text=True,
        env={**os.environ, "PLAN": "1", "GPUS": str(n_gpus)},
    )
    if done.returncode:
        raise UserError(
            f"{recipe}: PLAN=1 stopped with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"
        )
    lines = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    if not lines:
        raise UserError(f"{recipe}: prints no commands under PLAN=1")
    return lines


def stage_of(words):
    """(stage's file name, its parsed arguments), or (name, None) where there is nothing to plan."""
    at = next((i for i, word in enumerate(words) if Path(word).name in STAGES), None)
    if at is None:
        return next((Path(w).name for w in words if w.endswith(".py")), words[0]), None
    name, argv = Path(words[at]).name, words[at + 1 :]
    saved, sys.argv = sys.argv, [words[at], *argv]
    try:
        args = prepare.arguments(argv) if name == "prepare.py" else STAGES[name].arguments()
        for flag in ("data", "init" if hasattr(args, "init") else "model"):
            if name != "prepare.py" and not getattr(args, flag):
                raise UserError(f"{' '.join(words[at:])[:200]}: wanted a --{flag}")
        args.out = args.out or "(no --out)"
        if hasattr(args, "init"):
            check_arguments(args)
        return name, args
    except SystemExit:
        raise UserError(
            f"{' '.join(words[at:])[:200]}: {name} does not take these flags (see above)"
        ) from None
    finally:
        sys.argv = saved


class Plan:
    """Follows the files from stage to stage: sizes of token sets, shapes of models. `rows`: what each stage takes."""

    def __init__(self, gpu, n_gpus, mfu=0.3, price=0.0, tokens=()):
        self.flops, self.bytes = GPUS[gpu]
        self.n_gpus, self.mfu, self.price = n_gpus, mfu, price
        self.sets, self.models, self.rows = dict(tokens), dict(KNOWN), []

    def size(self, folder):
        """Tokens of a token set. Raises UserError where nothing says how many."""
        if folder in self.sets:
            return self.sets[folder]
        if folder and (Path(folder) / "meta.json").exists():
            return read_json(Path(folder) / "meta.json", "token set")["count"]
        raise UserError(
            f"{folder}: how many tokens it will have is not known; say it with --tokens {folder}=N"
        )

    def config(self, args):
        """The model that a stage works on."""
        name = getattr(args, "model", None) or args.init
        if name == "scratch":
            return Config(
                32000,
                args.d_model,
                args.d_ff or max(16, args.d_model * 8 // 3 // 16 * 16),
                args.n_layer,
                args.n_head,
                args.n_kv_head or args.n_head,
                tie_word_embeddings=True,
            )
        if name not in self.models:
            from hf.config import config_from_hf
            from hf.downloads import get

            path = (
                Path(name) / "config.json"
                if Path(name).is_dir()
                else get(name, "config.json", args.revision)
            )
            if not path:
                raise UserError(f"{name}: has no config.json, so its shape is not known")
            self.models[name] = config_from_hf(read_json(path, "model"), str(path))
        return self.models[name]

    def add(self, words):
        """One command of the recipe."""
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
            if args.max_tokens:
                self.sets[args.out] = args.max_tokens
            elif args.out not in self.sets and all(
                (Path(s) / "meta.json").exists() for s in args.source
            ):
                self.sets[args.out] = sum(self.size(s) for s in args.source)
            row["tokens"] = self.size(args.out)
            masks = bool(args.mask_prompt or any(s.startswith("hf:") for s in args.source))
            row["disk"] = row["tokens"] * (2 + masks)
            return
        config = self.config(args)
        n = counts(config)[0]
        row.update(config=config, parameters=n)
        if name == "score.py":
            row["tokens"], parts = self.size(args.data), 1 / 3  # the forward pass alone
            row["disk"] = row["tokens"] * (4 if args.entropy else 2)
        else:
            parts = 1
            per_step = args.batch_size * args.seq_len
            if not args.steps:
                args.steps = -(-int((args.epochs or 1) * self.size(args.data)) // per_step)
            row.update(steps=args.steps, tokens=args.steps * per_step)
            row["disk"] = (
                16 + 4 * max(0, args.snapshots - 1)
            ) * n  # train_state.pt 12, each model 4
            self.models[args.out] = config
            self.fit(row, args)
        row["flops"] = row["tokens"] * flops_per_token(config, args.seq_len) * parts
        again = 4 / 3 if getattr(args, "checkpointing", False) else 1
        row["gpu_hours"] = row["flops"] * again / (self.flops * self.mfu) / 3600
        row["hours"], row["cost"] = row["gpu_hours"] / self.n_gpus, row["gpu_hours"] * self.price

    def fit(self, row, args):
        """Memory of a training stage as it is commanded, and where it does not fit the smallest change that makes it."""
        asked = args.micro_batch_size or max(1, args.batch_size // self.n_gpus)
        micro = min(asked, max(1, args.batch_size // self.n_gpus))
        while args.batch_size % (micro * self.n_gpus) and micro > 1:
            micro -= 1
        if args.batch_size % (micro * self.n_gpus):
            raise UserError(
                f"--batch-size {args.batch_size}: is not shared out evenly over {self.n_gpus} GPUs"
            )
        halvings = [micro // 2**i for i in range(micro.bit_length()) if micro % 2**i == 0]
        heads, every = dict.fromkeys([args.head, "lean"]), dict.fromkeys([args.moments, "bfloat16"])
        parallel = dict.fromkeys([args.parallel, "fsdp"] if self.n_gpus > 1 else [args.parallel])
        settings = dict(k=getattr(args, "k", 1.0), backward=getattr(args, "backward", "exact"))

        def need(size, head, moments, checkpointing, how):
            return memory(
                row["config"],
                size,
                args.seq_len,
                self.n_gpus,
                how,
                args.batch_size > size * self.n_gpus,
                head=head,
                moments=moments,
                checkpointing=checkpointing,
                **settings,
            )

        row["micro"] = micro
        row["memory"], row["peak"] = need(
            micro, args.head, args.moments, args.checkpointing, args.parallel
        )
        row["fits"], row["change"] = row["peak"] <= self.bytes, None
        if row["fits"]:
            return
        choices = product(
            parallel, every, dict.fromkeys([args.checkpointing, True]), heads, halvings
        )
        for how, moments, checkpointing, head, size in choices:  # the cheapest change first
            if need(size, head, moments, checkpointing, how)[1] <= self.bytes:
                changes = {
                    f"--micro-batch-size {size}": size != micro,
                    f"--head {head}": head != args.head,
                    f"--moments {moments}": moments != args.moments,
                    "--checkpointing": checkpointing != args.checkpointing,
                    f"--parallel {how}": how != args.parallel,
                }
                row["change"] = " ".join(flag for flag, changed in changes.items() if changed)
                return
        states = 12 * row["parameters"]
        row["change"] = (
            f"more GPUs: weights, gradients and optimiser alone are {states / 1e9:.0f} GB, bfloat16 moments "
            f"and all, shared with FSDP2"
        )


def flops_per_token(config, seq_len):
    """Of one training step: 6 for each parameter but an untied input embedding, and attention (PaLM, appendix B)."""
    n = counts(config)[0] - (
        0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    )
    width = config.num_attention_heads * config.head_dim
    return 6.0 * n + 12.0 * config.num_hidden_layers * width * min(
        seq_len, config.sliding_window or seq_len
    )


def show(plan, args):
    print(
        f"{args.n_gpus} x {args.gpu}, {plan.bytes / 1e9:.0f} GB each; MFU {args.mfu:.0%} and "
        f"{args.price_per_hour:g} per GPU hour are assumptions\n"
    )
    names, widths = (
        ("param", "tokens", "steps", "FLOPs", "hours", "cost", "disk GB"),
        (7, 9, 8, 9, 8, 9, 9),
    )
    head = f"{'stage':<13}{'out':<34}" + "".join(
        f"{name:>{width}}" for name, width in zip(names, widths)
    )
    print(head + "\n" + "-" * len(head))
    for row in plan.rows:
        if not row["tokens"]:
            print(f"{row['stage']:<13}(not planned)")
            continue
        cells = [
            f"{row['parameters'] / 1e9:.2f}B" if "parameters" in row else "",
            f"{row['tokens'] / 1e9:.3g}B",
            f"{row['steps']:,}" if "steps" in row else "",
            f"{row['flops']:.2g}" if row["flops"] else "",
            f"{row['hours']:.2f}" if row["flops"] else "",
            f"{row['cost']:,.0f}" if row["flops"] else "",
            f"{row['disk'] / 1e9:.1f}",
        ]
        print(
            f"{row['stage']:<13}{row['out'][-33:]:<34}"
            + "".join(f"{c:>{w}}" for c, w in zip(cells, widths))
        )
    total = {name: sum(row[name] for row in plan.rows) for name in ("hours", "cost", "disk")}
    print(
        f"{'total':<71}{'':>9}{total['hours']:>8.2f}{total['cost']:>9,.0f}{total['disk'] / 1e9:>9.1f}"
    )
    print(f"\nGPU hours: {total['hours'] * args.n_gpus:,.0f}\n\nmemory per GPU, GB:")
    for row in plan.rows:
        if "memory" in row:
            parts = ", ".join(
                f"{name} {size / 1e9:.1f}" for name, size in row["memory"].items() if size > 5e7
            )
            print(
                f"  {row['out']}: peak {row['peak'] / 1e9:.1f} of {plan.bytes / 1e9:.0f}, micro-batch {row['micro']} "
                f"({parts}): "
                + ("fits" if row["fits"] else f"DOES NOT FIT; it does with {row['change']}")
            )


def main(argv=None):
    args = arguments(argv)
    tokens = {}
    for item in args.tokens:
        name, _, number = item.partition("=")
        try:
            tokens[name] = int(float(number))
        except (ValueError, OverflowError):
            raise UserError(f"--tokens {item}: wanted SET=N, such as data/owm=14e9") from None
    plan = Plan(args.gpu, args.n_gpus, args.mfu, args.price_per_hour, tokens)
    try:
        given = [shlex.split(command) for command in args.command]
    except ValueError as error:
        raise UserError(f"--command: {error}") from None
    if [] in given:
        raise UserError("--command: got an empty one, wanted a stage and its flags")
    for words in [*(commands_of(args.recipe, args.n_gpus) if args.recipe else []), *given]:
        plan.add(words)
    show(plan, args)


if __name__ == "__main__":
    cli(main)
