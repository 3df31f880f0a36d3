"""See the method: which tokens are kept, how losses move, what a run costs.

    python -m tools.explore tokens --run out/demo/slm --data data/demo/corpus \\
        --ref-loss out/demo/ref_loss.bin --out page.html    # a page that shows text token by token
    python -m tools.explore dynamics --run out/demo/clm --data data/demo/corpus \\
        --out figures/dynamics
    python -m tools.explore curves --run CLM=out/demo/clm --run SLM=out/demo/slm --baseline CLM \\
        --out figures/curves

A run is a folder of train_ref.py or train_slm.py; `--snapshots N` there leaves the models on the
way that `tokens` and `dynamics` look at. Figures are written as PNG and SVG, and need matplotlib.
"""

import argparse

import common.device  # noqa: F401  first: it sets how torch's threads wait

from common.command_line import add_machine
from common.errors import cli
from common.owned import refuse_taken
from tools.explore import curves, dynamics, page

ENDS = ("", "-sets", "-training", "-accuracy", "-kept")  # of the figures of `curves`
COMMANDS = {
    "tokens": page.main,
    "dynamics": dynamics.main,
    "curves": curves.main,
}

OUTPUTS = {  # what stands behind --out in the names of the files that are written
    "tokens": [""],
    "dynamics": [".json", ".png", ".svg"],
    "curves": [".json", *(name + end for name in ENDS for end in (".png", ".svg"))],
}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    tokens_arguments(commands)
    dynamics_arguments(commands)
    curves_arguments(commands)
    return parser.parse_args()


def tokens_arguments(commands):
    said = "one HTML file that shows documents token by token"
    parser = commands.add_parser("tokens", help=said, description=said)
    add = parser.add_argument
    add("--run", required=True, help="run folder, of train_slm.py or train_ref.py")
    add("--data", required=True, help="token set to show (folder), with stored reference losses")
    add("--ref-loss", required=True, help="the reference's stored losses on it (FILE)")
    add("--out", required=True, help="the page (FILE.html)")
    add("--windows", type=int, default=200, help="windows shown; whole micro-batches are taken")
    add(
        "--models",
        type=int,
        default=5,
        help="snapshots shown at most, first and last among them",
    )
    add("--passage", metavar="FILE.svg", help="draw some documents as a picture too")
    add(
        "--documents",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="which, by their numbers on the page; drawn as the first model shown sees them",
    )
    add_machine(parser.add_argument_group("machine"))


def dynamics_arguments(commands):
    parser = commands.add_parser("dynamics", help="the four categories of token (section 2.1)")
    add = parser.add_argument
    add("--run", required=True, help="run folder with snapshots")
    add("--data", required=True, help="token set whose tokens are followed (folder)")
    add("--tokens", type=int, default=320_000, help="targets that are followed, at most")
    add("--examples", type=int, default=5, help="example tokens shown of each category")
    add("--out", required=True, help="start of the names of what is written: .json .png .svg")
    add_machine(parser.add_argument_group("machine"))


def curves_arguments(commands):
    parser = commands.add_parser(
        "curves", help="losses and accuracy against tokens and against cost"
    )
    add = parser.add_argument
    add(
        "--run",
        action="append",
        required=True,
        metavar="[LABEL=]FOLDER[,FOLDER...]",
        help="a line of the figures; several folders are its seeds; without a label it has the "
        "folder's name. Give it once for each line",
    )
    add("--baseline", metavar="LABEL", help="the line whose final loss the others are to reach")
    add(
        "--reference",
        metavar="FOLDER[,FOLDER...]",
        help="the reference's run, one for all seeds or one for each; default: looked for beside "
        "the stored losses, by its hash",
    )
    add(
        "--kept-of",
        metavar="LABEL",
        help="the line whose kept kinds are drawn; default: the first that selects",
    )
    add("--out", required=True, help="start of the names of what is written: .json .png .svg")


def main():
    args = arguments()
    if args.out:  # before anything is computed
        refuse_taken(args.out + suffix for suffix in OUTPUTS[args.command])
    COMMANDS[args.command](args)


if __name__ == "__main__":
    cli(main)
