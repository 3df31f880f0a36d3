"""What a recipe costs before the first GPU hour is spent.

Parameters, tokens, FLOPs, memory per GPU, disk, hours, money.

    python -m tools.plan runs/rho_math_1b.sh --gpu h100 --n-gpus 32 --price-per-hour 2.50
    python -m tools.plan runs/rho_math_1b.sh --gpu 4090 --n-gpus 1 --mfu 0.4
    K=0.7 python -m tools.plan my_runs.sh --gpu a100 --tokens data/corpus=2e9
    python -m tools.plan --command "train_slm.py --init TinyLlama/TinyLlama_v1.1 --data d --k 0.6 \\
        --seq-len 2048 --batch-size 512 --micro-batch-size 4" --tokens d=1e9 --gpu h100

Reads the commands that a shell file would run with the stages' own parsers; nothing runs. The kit's
recipes print them (PLAN=1 bash RECIPE). In any other file each command that stands there counts
once, with the variables that the file or the environment sets. TinyLlama's, Mistral-7B's,
Llama-2-7B's and Rho-1's shapes are known here; of other hub ids config.json is fetched.

Hours follow from the MFU that you state: it is an assumption, not a measurement. What selection
saves in the backward pass, preparing text and evaluation are not counted.
"""

import shlex

from common.command_line import Parser, not_negative, share, whole
from common.errors import UserError, cli
from tools.plan.recipe import commands_of
from tools.plan.stages import GPUS, Plan

COLUMNS = {  # name: width
    "param": 7,
    "tokens": 9,
    "steps": 8,
    "FLOPs": 9,
    "hours": 8,
    "cost": 9,
    "disk GB": 9,
}


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.usage = "python -m tools.plan [RECIPE] [--FLAG VALUE ...]"
    add = parser.add_argument
    add("recipe", nargs="?", help="a recipe of runs/, or a shell file of your own; or:")
    add(
        "--command",
        action="append",
        default=[],
        help="one stage's command (may be given several times)",
    )
    add(
        "--tokens",
        action="append",
        default=[],
        metavar="SET=N",
        help="size of a token set, where neither its folder nor --max-tokens of the command that "
        "makes it says",
    )
    add("--gpu", default="h100", choices=[*GPUS], help="its memory and its peak")
    add("--n-gpus", type=whole(1), default=8, help="of them")
    add("--price-per-hour", type=not_negative, default=2.5, help="of one GPU, in any currency")
    add(
        "--mfu",
        type=share,
        default=0.3,
        help="share of the GPU's peak that is reached (an assumption)",
    )
    args = parser.parse_args(argv)
    if not args.recipe and not args.command:
        raise UserError(
            "tools.plan: got neither a shell file nor --command; name one, such as "
            "runs/rho_math_1b.sh"
        )
    return args


def main(argv=None):
    args = arguments(argv)
    plan = Plan(args.gpu, args.n_gpus, args.mfu, args.price_per_hour, sizes_of(args.tokens))
    commands = given_commands(args.command)
    if args.recipe:
        commands = commands_of(args.recipe, args.n_gpus) + commands
    for words in commands:
        plan.add(words)
    show(plan, args)


def sizes_of(items):
    """{token set: tokens} of the values of --tokens."""
    sizes = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            sizes[name] = int(float(number))
        except (ValueError, OverflowError):
            raise UserError(f"--tokens {item}: wanted SET=N, such as data/owm=14e9") from None
    return sizes


def given_commands(texts):
    """The values of --command as lists of words."""
    try:
        commands = [shlex.split(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--command: {error}") from None
    if [] in commands:
        raise UserError("--command: got an empty one, wanted a stage and its flags")
    return commands


# --------------------------------------------------------------------------------------------------
# what is printed


def show(plan, args):
    print(
        f"{args.n_gpus} x {args.gpu}, {plan.bytes / 1e9:.0f} GB each; MFU {args.mfu:.0%} and "
        f"{args.price_per_hour:g} per GPU hour are assumptions\n"
    )
    head = f"{'stage':<13}{'out':<34}{aligned(COLUMNS)}"
    print(head + "\n" + "-" * len(head))
    for row in plan.rows:
        if not row["tokens"]:
            print(f"{row['stage']:<13}(not planned)")
        else:
            print(f"{row['stage']:<13}{row['out'][-33:]:<34}{aligned(cells_of(row))}")
    hours, cost, disk = (sum(row[name] for row in plan.rows) for name in ("hours", "cost", "disk"))
    total = ["", "", "", "", f"{hours:.2f}", f"{cost:,.0f}", f"{disk / 1e9:.1f}"]
    print(f"{'total':<47}{aligned(total)}")
    print(f"\nGPU hours: {hours * args.n_gpus:,.0f}\n\nmemory per GPU, GB:")
    for row in plan.rows:
        if "memory" in row:
            print(f"  {memory_line(row, plan.bytes)}")
    print("\nsaves (speeds of memory and disk are assumptions):")
    for row in plan.rows:
        if "saves" in row:
            print(f"  {saves_line(row, args.n_gpus)}")


def aligned(cells):
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values()))


def cells_of(row):
    """A planned row's cells, for COLUMNS."""
    computes = row["flops"] > 0
    return [
        f"{row['parameters'] / 1e9:.2f}B" if "parameters" in row else "",
        f"{row['tokens'] / 1e9:.3g}B",
        f"{row['steps']:,}" if "steps" in row else "",
        f"{row['flops']:.2g}" if computes else "",
        f"{row['hours']:.2f}" if computes else "",
        f"{row['cost']:,.0f}" if computes else "",
        f"{row['disk'] / 1e9:.1f}",
    ]


def memory_line(row, available):
    parts = [f"{name} {size / 1e9:.1f}" for name, size in row["memory"].items() if size > 5e7]
    verdict = "fits" if row["fits"] else f"DOES NOT FIT; it does with {row['change']}"
    return (
        f"{row['out']}: peak {row['peak'] / 1e9:.1f} of {available / 1e9:.0f}, "
        f"micro-batch {row['micro']} ({', '.join(parts)}): {verdict}"
    )


def saves_line(row, ranks):
    state = row["state"] / 1e9
    return (
        f"{row['out']}: {row['saves']:,} states of {state:.1f} GB, {state / ranks:.1f} a rank; "
        f"training stands still {row['still'] / 60:.1f} minutes in all"
    )


if __name__ == "__main__":
    cli(main)
