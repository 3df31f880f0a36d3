"""Data and report of runs/real_text.sh: real text, split so that the curated half can be a target of its own.

    python runs/real_text.py fetch --out data/real/raw                          # the pinned public files, checksummed
    python runs/real_text.py split --data data/real/raw --out data/real         # base, corpus, curated, val .jsonl
    python runs/real_text.py test --data data/real/raw                          # prints where GSM8K's test split lies
    python runs/real_text.py report --data data/real --out out/real --seeds 0   # Markdown, from the runs' own logs

GSM8K's training problems are put in the order of a hash of their question. Half of them is mixed with LaTeX mathematics
(sections of the Stacks project); every second problem and section of this goes into `base`, which the common starting
model learns from, the others into `corpus`. Of the other half 90 % are the curated set and 10 % validation.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError, cli  # noqa: E402
from common.files import read_json, write_atomic  # noqa: E402
from demo.chain import records, tokens_to_reach  # noqa: E402
from evaluation import pinned  # noqa: E402

# Both files are pinned by commit AND by the sha256 of the bytes that are used. The archive's own checksum is not
# pinned, since GitHub does not promise that it stays; the text that is taken from it is.
GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/train.jsonl"
)
STACKS = "https://codeload.github.com/stacks/stacks-project/tar.gz/4ac4815d5a00dc2eacab7824cf4e4baafe2773ac"
SHA256 = {
    "gsm8k_train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "stacks_project.jsonl": "65c6e8bd5a3cb5b101df1d1edad7250845340049c1cc1fb99d034844bfa66ba2",
}
METHODS = {"clm": "CLM, every token", "slm": "SLM, k = 0.6", "random": "random 60 %"}
CHAPTERS = """moduli-curves spaces-topologies spaces-properties algebraization stacks-perfect more-algebra resolve
    derham duality desirables guide proetale derived pione schemes cotangent spaces-cohomology dpa algebraic sdga
    categories stacks-limits formal-spaces spaces-chow spaces-morphisms functors groupoids topologies sites-cohomology
    examples chow descent homology injectives spaces spaces-flat cohomology introduction defos stacks-properties
    relative-cycles spaces-more-cohomology examples-defos curves bootstrap spaces-simplicial spaces-more-morphisms
    decent-spaces varieties""".split()


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["fetch", "split", "test", "best", "report"])
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the two files (split, test) or of the token sets (report)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (fetch, split) or of the runs (report)"
    )
    parser.add_argument(
        "--latex-bytes", type=int, default=1_900_000, help="LaTeX that is taken, of 13 MB there are"
    )
    parser.add_argument(
        "--method", choices=METHODS, help="best: of which the best learning rate is wanted"
    )
    parser.add_argument("--seeds", nargs="+", default=["0"], help="the students' seeds")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["2e-3", "4e-3"],
        help="learning rates that the first seed tried",
    )
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# the files


def check(name, content):
    """`content`, if it is the pinned file. Raises UserError where its sha256 differs."""
    got = hashlib.sha256(content).hexdigest()
    if got != SHA256[name]:
        raise UserError(
            f"{name}: got sha256 {got}, wanted {SHA256[name]}; it is refused: download it again, or give a "
            f"folder with good copies as DATA"
        )
    return content


def fetch(out):
    """Download what `out` lacks. Raises UserError without a network, or where a checksum is wrong."""
    for name, url, make in (
        ("gsm8k_train.jsonl", GSM8K, bytes),
        ("stacks_project.jsonl", STACKS, sections),
    ):
        if (out / name).exists():
            check(name, (out / name).read_bytes())
            continue
        try:
            content = pinned.download(url, Path(url).name)
        except UserError as error:
            raise UserError(
                f"{name}: got no answer from {url} ({error.__cause__ or error}), wanted the file; connect "
                f"to the network, or name a folder that holds {' and '.join(SHA256)} as DATA"
            ) from error
        write_atomic(out / name, check(name, make(content)))


def sections(archive):
    """The sections of CHAPTERS in a .tar.gz of the Stacks project, as .jsonl: cut before each \\section at the start of
    a line, stripped, left out where shorter than 200 characters."""
    lines = []
    try:
        files = tarfile.open(fileobj=io.BytesIO(archive))
    except tarfile.TarError as error:
        raise UserError(
            f"stacks_project.tar.gz: not a whole .tar.gz ({error}); download it again"
        ) from None
    with files:
        member = {Path(name).name: name for name in files.getnames() if name.count("/") == 1}
        for chapter in CHAPTERS:
            if f"{chapter}.tex" not in member:
                raise UserError(
                    f"stacks_project.tar.gz: holds no {chapter}.tex; is it another commit?"
                )
            text = files.extractfile(member[f"{chapter}.tex"]).read().decode()
            for i, part in enumerate(re.split(r"^(?=\\section\{)", text, flags=re.MULTILINE)):
                if len(part.strip()) >= 200:
                    lines.append(
                        json.dumps({"text": part.strip(), "source": f"{chapter}.tex#{i}"}) + "\n"
                    )
    return "".join(lines).encode()


# ---------------------------------------------------------------------------------------------------------------------
# the split


def by_hash(texts):
    """Without repetitions, in the order of their sha256: a shuffle that depends on nothing but the texts."""
    return sorted(dict.fromkeys(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def split(problems, latex, latex_bytes):
    """{set: [text]} for base, corpus, curated, val. problems: [(question, answer)]; latex: [text].

    A question is in one set only, whatever answers it has; so is a LaTeX section.
    """
    answers = dict(problems)
    questions = by_hash(answers)
    half = len(questions) // 2
    ninety = half + (len(questions) - half) * 9 // 10
    taken, size = [], 0
    for text in by_hash(latex):
        if size < latex_bytes:
            taken.append(text)
            size += len(text.encode())
    sets = {
        "base": questions[:half:2] + taken[::2],
        "corpus": questions[1:half:2] + taken[1::2],
        "curated": questions[half:ninety],
        "val": questions[ninety:],
    }
    return {
        name: [f"{text}\n{answers[text]}" if text in answers else text for text in by_hash(texts)]
        for name, texts in sets.items()
    }


def write_split(data, out, latex_bytes):
    for name in SHA256:
        if not (data / name).is_file():
            raise UserError(f"DATA={data}: holds no {name}; leave DATA out to download both files")
        if hashlib.sha256((data / name).read_bytes()).hexdigest() != SHA256[name]:
            print(
                f"warning: {data / name} is not the pinned file; the numbers will not compare",
                file=sys.stderr,
            )
    problems = [
        (row["question"], row["answer"]) for row in pinned.read_rows(data / "gsm8k_train.jsonl")
    ]
    latex = [row["text"] for row in pinned.read_rows(data / "stacks_project.jsonl")]
    for name, texts in split(problems, latex, latex_bytes).items():
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        path = out / f"{name}.jsonl"
        if not path.exists() or path.read_text() != content:
            write_atomic(path, content)
        print(
            f"{path}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes"
        )


def find_test(data):
    """GSM8K's test split: eval/gsm8k.jsonl beside `data`, or the pinned download."""
    beside = data is not None and (data.resolve().parent / "eval" / "gsm8k.jsonl").exists()
    return pinned.find("eval/gsm8k.jsonl", data.resolve().parent if beside else None)


# ---------------------------------------------------------------------------------------------------------------------
# the report


def run_folder(out, method, rate, seed):
    return out / f"{method}-lr{rate}-seed{seed}"


def done(folder):
    return (folder / "summary.json").exists()


def best_rate(out, method, rates, seed):
    """The learning rate of the lowest final validation loss, among those that `seed` has finished. The test split has
    no say. Raises UserError where there is none."""
    tried = [rate for rate in rates if done(run_folder(out, method, rate, seed))]
    if not tried:
        raise UserError(
            f"{out}: got no finished run of {method} with seed {seed}, wanted one at {' or '.join(rates)}"
        )
    return min(tried, key=lambda rate: summary(run_folder(out, method, rate, seed))["val_loss"])


def summary(folder):
    return read_json(folder / "summary.json", "run")


def stored_mean(path):
    """Mean of the losses that score.py stored, in nats; None where it stored none. The first token is no target."""
    return float(np.fromfile(path, "<f2")[1:].astype(np.float64).mean()) if path.exists() else None


def number(value, form=".3f"):
    return "-" if value is None else format(value, form)


def table(*rows):
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *rest, ""]


def report(data, out, rates, seeds):
    """Markdown from the runs that are finished: the runs, the validation loss on the way, and what SLM costs.

    Tokens to the target: read by a student until its validation loss is CLM's final one (best rate, same seed). With
    all costs counted, SLM is also charged with each token that the reference was trained on, and with a third of each
    token of the corpus for scoring it: a forward pass is a third of a training step. CLM and random need neither.
    """
    clm_rate = best_rate(out, "clm", rates, seeds[0])
    reference = summary(out / "ref")["tokens_seen"]
    scoring = read_json(data / "corpus" / "meta.json", "token set")["count"] / 3
    rows = [
        [
            "run",
            "learning rate",
            "seed",
            "validation loss",
            "GSM8K test loss",
            "tokens read",
            "tokens to CLM's loss",
            "the same, all costs counted",
        ]
    ]

    def row(label, folder, *costs):
        args = read_json(folder / "args.json", "run")
        rows.append(
            [
                label,
                f"{args['lr']:g}",
                str(args["seed"]),
                number(summary(folder)["val_loss"]),
                number(stored_mean(folder / "test_loss.bin")),
                number(summary(folder)["tokens_seen"], ","),
                *costs,
            ]
        )

    row("base, where all start", out / "base", "", "")
    row("the reference", out / "ref", "", "")
    shares = sorted(
        {folder.name.split("-lr")[0] for folder in out.glob("slm-k*-lr*-seed*")}
    )  # of KS
    for seed in seeds:
        baseline = run_folder(out, "clm", clm_rate, seed)
        target = summary(baseline)["val_loss"] if done(baseline) else None
        for method, label in {
            **METHODS,
            **{name: f"SLM, k = {name[5:]}" for name in shares},
        }.items():
            for rate in rates:
                folder = run_folder(out, method, rate, seed)
                if not done(folder):
                    continue
                reached = None if target is None else tokens_to_reach(folder, target)
                cost = (
                    None
                    if reached is None
                    else reached + (reference + scoring) * method.startswith("slm")
                )
                row(label, folder, number(reached, ",.0f"), number(cost, ",.0f"))
    lines = table(*rows)
    curves = {}
    for method, label in METHODS.items():
        if any(done(run_folder(out, method, rate, seeds[0])) for rate in rates):
            rate = best_rate(out, method, rates, seeds[0])
            curves[f"{label} ({rate})"] = {
                record["tokens_seen"]: record["val_loss"]
                for record in records(run_folder(out, method, rate, seeds[0]))
                if "val_loss" in record
            }
    seen = sorted(set().union(*curves.values()))
    lines += [
        f"Validation loss by tokens read, seed {seeds[0]}, each method's best learning rate:",
        "",
    ]
    lines += table(
        ["tokens", *(f"{count:,}" for count in seen)],
        *([name, *(number(curve.get(count)) for count in seen)] for name, curve in curves.items()),
    )
    lines.append(
        f"Charged to SLM: {reference:,} tokens of the reference's training and {scoring:,.0f} for scoring (a "
        f"third of the corpus). Validation: 10 % of the curated half of GSM8K's training problems."
    )
    return "\n".join(lines)


def main():
    args = arguments()
    if args.action == "fetch":
        fetch(args.out)
    elif args.action == "split":
        write_split(args.data, args.out, args.latex_bytes)
    elif args.action == "test":
        print(find_test(args.data))
    elif args.action == "best":
        print(best_rate(args.out, args.method, args.rates, args.seeds[0]))
    else:
        print(report(args.data, args.out, args.rates, args.seeds))


if __name__ == "__main__":
    cli(main)
