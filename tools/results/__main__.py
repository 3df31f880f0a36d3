"""Raw results in results/, and README's and docs' tables and figures made from them.

    python -m tools.results                     # make what changed again
    python -m tools.results --check             # only say whether a page differs from the files
    python -m tools.results --add roundings --command "bash runs/roundings.sh" \\
        --variant "1 thread" --run slm=out/demo/slm --run clm=out/demo/clm
    python -m tools.results --add roundings --not-run "avx512: this processor has none"

`--add` is what runs/*.sh call at the end of a run: it puts the run's numbers, arguments, versions
and machine into results/NAME.json, in place of an earlier run of that method, seed and variant.
"""

import common.device  # noqa: F401  first: it sets how torch's threads wait

from common.command_line import Parser
from common.errors import UserError, cli, command
from tools.results import figures, files, pages
from tools.results.collect import collected


def arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("tables and figures").add_argument
    add("--check", action="store_true", help="write nothing; exit code 2 where one differs")
    add = parser.add_argument_group("adding runs").add_argument
    add("--add", metavar="NAME", help="to results/NAME.json, which is made where it is not there")
    add("--command", help="what makes the experiment or goes on with it; for a new file")
    add("--variant", default="", help="what differs between runs of one method and seed")
    add(
        "--run",
        action="append",
        default=[],
        metavar="METHOD=FOLDER",
        help="a finished run (repeatable)",
    )
    add("--not-run", metavar="VARIANT: WHY", help="what could not be run here")
    return parser.parse_args(argv)


def main():
    args = arguments()
    if args.add:
        add(args)
        return
    differ = pages.update(args.check) + figures.update(args.check)
    if differ and args.check:
        raise UserError(
            f"{', '.join(differ)}: tables or figures are not those of results/; "
            f"make them again with {command('-m', 'tools.results')}"
        )
    print(
        f"made again: {', '.join(differ)}"
        if differ
        else "every table and figure is that of results/"
    )


def add(args):
    """Put runs into results/NAME.json. Raises UserError, before anything is written."""
    experiment = opened(args)
    for named in args.run:
        method, _, folder = named.partition("=")
        if not folder:
            raise UserError(f"--run: got {named!r}, wanted METHOD=FOLDER, as slm=out/demo/slm")
        files.add(experiment, collected(folder, method, args.variant))
        experiment.not_run.pop(args.variant, None)
    if args.not_run:
        variant, _, why = args.not_run.partition(": ")
        if not why:
            raise UserError(f"--not-run: got {args.not_run!r}, wanted VARIANT: WHY")
        if all(run.variant != variant for run in experiment.runs):  # another machine could
            experiment.not_run[variant] = why
    files.save(experiment)
    print(f"{files.path_of(args.add)}: {len(experiment.runs)} runs")


def opened(args):
    """The experiment that `--add` names, new where it has no file yet. Raises UserError."""
    if not args.command and not files.path_of(args.add).exists():
        raise UserError(
            f"--command: got none, wanted what makes {args.add}, as 'bash runs/{args.add}.sh'"
        )
    return files.load_or_new(args.add, args.command)


if __name__ == "__main__":
    cli(main)
