"""Results, tables and figure of runs/when_it_pays.sh, from the runs that are finished.

python runs/when_it_pays.py --data data/pays --out out/pays --seeds 0 1 2

Writes results/when-it-pays.json, OUT/report.md, and OUT/when-it-pays.png and .svg: each reference's
lead over CLM's end, and what SLM gains over CLM.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.device  # noqa: F401  first: it sets how torch's threads wait

from common.command_line import Parser, whole
from common.errors import UserError, cli
from common.files import write_atomic
from common.records import read_record
from data import Note, TokenSet, header_of
from tools.explore.lines import parameters
from tools.results import figures, files
from tools.results.collect import collected
from tools.results.tables import render
from training.finished import is_finished
from training.identity import hash_of_validation

NAME = "when-it-pays"
COMMAND = "bash runs/when_it_pays.sh"
REFERENCES = ("quarter", "once", "twice", "six", "smaller", "larger", "clm")
TABLES = (NAME, f"{NAME} others")


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the token sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", nargs="+", type=whole(0), required=True, help="of the students")
    return parser.parse_args()


class Runs:
    """The finished runs in a folder, as records for results/."""

    def __init__(self, data, out, seeds):
        self.out = out
        self.seeds = seeds
        self.corpus = header_of(data / "corpus").count
        self.val = hash_of_validation([TokenSet(data / "val")])

    def all(self):
        found = [collected(self.out / "base", "base")]
        for method in ("clm", "random", "oracle", "clm-tuned"):
            found += self.by_seed(method, method)
        for name in REFERENCES:
            folder = self.out / f"ref-{name}"
            if is_finished(folder):
                found.append(collected(folder, "ref", name))
                found += self.of_reference(name, folder)
        found += self.made_again()
        return found

    def by_seed(self, method, name, variant=""):
        """The runs `name`-seedS of the seeds that are finished."""
        folders = {seed: self.out / f"{name}-seed{seed}" for seed in self.seeds}
        return [
            collected(folder, method, variant) for folder in folders.values() if is_finished(folder)
        ]

    def of_reference(self, name, folder):
        """SLM of a reference, at every k."""
        reference = {
            "reference_loss": self.reference_loss(name),
            "extra_tokens": self.cost(name, folder),
        }
        found = []
        students = self.out.glob(f"slm-{name}-k*-seed{self.seeds[0]}")
        for student in sorted(students):
            k = student.name.split("-k")[1].partition("-")[0]
            runs = self.by_seed("slm", f"slm-{name}-k{k}", f"{name} {k}")
            found += [replace(run, numbers=run.numbers | reference) for run in runs]
        return found

    def reference_loss(self, name):
        """The reference's validation loss, as score.py --val noted it beside the stored losses."""
        path = self.out / f"{name}_ref_loss.json"
        for known in read_record(path, Note, "stored losses").validation:
            if known.data == self.val:
                return known.loss
        raise UserError(f"{path}: knows no loss on the validation set; {COMMAND} adds it")

    def cost(self, name, folder):
        """Tokens of plain training of the student that a reference and scoring with it cost."""
        trained = self.tokens(folder)
        if name in ("smaller", "larger"):
            trained += self.tokens(self.out / f"base-{name}")
        if name == "clm":
            trained += self.tokens(self.out / f"clm-seed{self.seeds[0]}")
        share = parameters(folder) / parameters(self.out / "base")
        return (trained + self.corpus / 3) * share

    def tokens(self, folder):
        return collected(folder, "ref").numbers["tokens_seen"]

    def made_again(self):
        """SLM of "twice" up to the middle, then of it ("old") or of one made from there ("again").

        Each is one run: the curve of the first half, then that of the second.
        """
        found = []
        for seed in self.seeds:
            first = self.out / f"slm-twice-k0.6-seed{seed}"
            again = self.out / f"ref-again-seed{seed}"
            for name, losses in (("old", "twice"), ("again", f"again-seed{seed}")):
                second = self.out / f"{name}-seed{seed}"
                if not (is_finished(second) and is_finished(first)):
                    continue
                cost = self.cost("twice", self.out / "ref-twice")
                if name == "again":
                    cost += self.cost("again", again)
                more = {"reference_loss": self.reference_loss(losses), "extra_tokens": cost}
                found.append(joined(first, second, seed, f"twice, then {name} 0.6", more))
        return found


def joined(first, second, seed, variant, more):
    """Two runs, the second from the middle of the first, as one."""
    start, end = collected(first, "slm"), collected(second, "slm")
    half = start.numbers["tokens_seen"] / 2
    curve = [point for point in start.curve if point[0] <= half]
    curve += [[tokens + half, loss] for tokens, loss in end.curve if tokens > 0]
    numbers = end.numbers | more
    for key in ("tokens_seen", "tokens_selected", "seconds"):
        numbers[key] = end.numbers[key] + start.numbers[key] / 2
    return replace(end, seed=seed, variant=variant, numbers=numbers, curve=curve)


def main():
    args = arguments()
    runs = Runs(args.data, args.out, args.seeds).all()
    if not any(run.method == "slm" for run in runs):
        raise UserError(f"--out {args.out}: holds no finished SLM; {COMMAND} makes them")
    experiment = files.load_or_new(NAME, COMMAND)
    for run in runs:
        files.add(experiment, run)
    files.save(experiment)
    text = "\n".join("\n".join([*render(name, experiment), ""]) for name in TABLES)
    write_atomic(args.out / "report.md", text)
    print(text)
    figures.write(NAME, args.out / NAME)


if __name__ == "__main__":
    cli(main)
