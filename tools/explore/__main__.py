"""See the method: which tokens are kept, how tokens' losses move, what a run costs, which k to take.

    python -m tools.explore tokens --run out/demo/slm --data data/demo/corpus --ref-loss out/demo/ref_loss.bin \\
        --out page.html                                              # a page that shows text token by token
    python -m tools.explore dynamics --run out/demo/clm --data data/demo/corpus --out figures/dynamics
    python -m tools.explore curves --run CLM=out/demo/clm --run SLM=out/demo/slm --baseline CLM --out figures/curves
    python -m tools.explore pick-k --ref-loss out/demo/ref_loss.bin --data data/demo/corpus --model out/demo/base

A run is a folder of train_ref.py or train_slm.py; `--snapshots N` there leaves the models on the way that `tokens`
and `dynamics` look at. Figures are written as PNG and SVG, and need matplotlib.
"""

import argparse

import common.device  # first: it sets how torch's threads wait

from common.errors import cli
from tools.explore import curves, dynamics, page, pick_k


def machine(parser):
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the forward pass",
    )
    group.add_argument("--threads", type=int, help="CPU threads")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="tokens|dynamics|curves|pick-k"
    )

    tokens = commands.add_parser("tokens", help="one HTML file that shows documents token by token")
    tokens.add_argument("--run", required=True, help="run folder, of train_slm.py or train_ref.py")
    tokens.add_argument(
        "--data", required=True, help="token set to show (folder), with stored reference losses"
    )
    tokens.add_argument(
        "--ref-loss", required=True, help="the reference's stored losses on it (FILE)"
    )
    tokens.add_argument("--out", required=True, help="the page (FILE.html)")
    tokens.add_argument(
        "--windows", type=int, default=200, help="windows shown; whole micro-batches are taken"
    )
    tokens.add_argument(
        "--models", type=int, default=5, help="snapshots shown at most, first and last among them"
    )
    tokens.add_argument(
        "--passage", metavar="FILE.svg", help="draw some documents as a picture too"
    )
    tokens.add_argument(
        "--documents",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="which, by their numbers on the page; drawn as the first model shown sees them",
    )
    machine(tokens)

    dynamics = commands.add_parser("dynamics", help="the four categories of token (section 2.1)")
    dynamics.add_argument("--run", required=True, help="run folder with snapshots")
    dynamics.add_argument(
        "--data", required=True, help="token set whose tokens are followed (folder)"
    )
    dynamics.add_argument(
        "--tokens", type=int, default=320_000, help="targets that are followed, at most"
    )
    dynamics.add_argument(
        "--examples", type=int, default=5, help="example tokens shown of each category"
    )
    dynamics.add_argument(
        "--out", required=True, help="start of the names of what is written: .json .png .svg"
    )
    machine(dynamics)

    curves = commands.add_parser(
        "curves", help="losses and accuracy against tokens and against cost"
    )
    curves.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="LABEL=FOLDER[,FOLDER...]",
        help="a line of the figures; several folders are its seeds. Give it once for each line",
    )
    curves.add_argument(
        "--baseline", metavar="LABEL", help="the line whose final loss the others are to reach"
    )
    curves.add_argument(
        "--reference",
        metavar="FOLDER[,FOLDER...]",
        help="the reference's run, one for all seeds or one for each; default: looked for beside the "
        "stored losses, by its hash",
    )
    curves.add_argument(
        "--kept-of",
        metavar="LABEL",
        help="the line whose kept kinds are drawn; default: the first that selects",
    )
    curves.add_argument(
        "--out", required=True, help="start of the names of what is written: .json .png .svg"
    )

    pick = commands.add_parser("pick-k", help="suggest k from a sample's excess losses")
    pick.add_argument("--ref-loss", required=True, help="the reference's stored losses (FILE)")
    pick.add_argument("--data", required=True, help="token set that they belong to (folder)")
    pick.add_argument("--model", required=True, help="where the student starts (folder or hub id)")
    pick.add_argument(
        "--windows", type=int, default=400, help="windows in the sample, evenly spaced"
    )
    pick.add_argument("--out", help="start of the names of a figure: .png .svg")
    machine(pick)
    return parser.parse_args()


def main():
    args = arguments()
    {"tokens": page.main, "dynamics": dynamics.main, "curves": curves.main, "pick-k": pick_k.main}[
        args.command
    ](args)


if __name__ == "__main__":
    cli(main)
