"""Data and report of runs/real_text.sh: real text, split so that the curated half can be a target.

    python runs/real_text.py fetch --out data/real/raw      # the pinned public files, checksummed
    python runs/real_text.py split --data data/real/raw --out data/real    # the four sets, .jsonl
    python runs/real_text.py test --data data/real/raw    # prints where GSM8K's test split lies
    python runs/real_text.py report --data data/real --out out/real --seeds 0    # Markdown

GSM8K's training problems are put in the order of a hash of their question. Half of them is mixed
with LaTeX mathematics (sections of the Stacks project); every second problem and section of this
goes into `base`, which the common starting model learns from, the others into `corpus`. Of the
other half 90 % are the curated set and 10 % validation.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError, cli
from common.files import write_atomic
from evaluation import pinned
from runs.real_text_report import METHODS, best_rate, report

# Both files are pinned by commit AND by the sha256 of the bytes that are used. The archive's own
# checksum is not pinned, since GitHub does not promise that it stays; the text taken from it is.
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl"
STACKS = "https://codeload.github.com/stacks/stacks-project/tar.gz/4ac4815d5a00dc2eacab7824cf4e4baafe2773ac"
SHA256 = {
    "gsm8k_train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "stacks_project.jsonl": "65c6e8bd5a3cb5b101df1d1edad7250845340049c1cc1fb99d034844bfa66ba2",
}
CHAPTERS = """
    moduli-curves spaces-topologies spaces-properties algebraization stacks-perfect more-algebra
    resolve derham duality desirables guide proetale derived pione schemes cotangent
    spaces-cohomology dpa algebraic sdga categories stacks-limits formal-spaces spaces-chow
    spaces-morphisms functors groupoids topologies sites-cohomology examples chow descent homology
    injectives spaces spaces-flat cohomology introduction defos stacks-properties relative-cycles
    spaces-more-cohomology examples-defos curves bootstrap spaces-simplicial spaces-more-morphisms
    decent-spaces varieties
""".split()
SHORTEST = 200  # characters of a section that is taken


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("action", choices=["fetch", "split", "test", "best", "report"])
    add(
        "--data",
        type=Path,
        help="folder of the two files (split, test) or of the token sets (report)",
    )
    add("--out", type=Path, help="folder to write to (fetch, split) or of the runs (report)")
    add("--latex-bytes", type=int, default=1_900_000, help="LaTeX that is taken, of 13 MB")
    add("--method", choices=METHODS, help="best: of which the best learning rate is wanted")
    add("--seeds", nargs="+", default=["0"], help="the students' seeds")
    add(
        "--rates",
        nargs="+",
        default=["2e-3", "4e-3"],
        help="learning rates that the first seed tried",
    )
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------
# the files


def check(name, content):
    """`content`, if it is the pinned file. Raises UserError where its sha256 differs."""
    got = hashlib.sha256(content).hexdigest()
    if got != SHA256[name]:
        raise UserError(
            f"{name}: got sha256 {got}, wanted {SHA256[name]}; it is refused: download it again, "
            f"or give a folder with good copies as DATA"
        )
    return content


def fetch(out):
    """Download what `out` lacks. Raises UserError without a network or for a wrong checksum."""
    fetch_one(out / "gsm8k_train.jsonl", GSM8K, bytes)
    fetch_one(out / "stacks_project.jsonl", STACKS, sections)


def fetch_one(path, url, make):
    """`make` turns what is downloaded into the file's content."""
    name = path.name
    if path.exists():
        check(name, path.read_bytes())
        return
    try:
        content = pinned.download(url, Path(url).name)
    except UserError as error:
        raise UserError(
            f"{name}: got no answer from {url} ({error.__cause__ or error}), wanted the file; "
            f"connect to the network, or name a folder that holds {' and '.join(SHA256)} as DATA"
        ) from error
    write_atomic(path, check(name, make(content)))


def sections(archive):
    """The sections of CHAPTERS in a .tar.gz of the Stacks project, as .jsonl.

    Chapters are cut before each \\section at the start of a line; the parts are stripped, and left
    out where shorter than SHORTEST.
    """
    lines = []
    with pinned.whole_archive(archive, "stacks_project.tar.gz") as files:
        members = {Path(name).name: name for name in files.getnames() if name.count("/") == 1}
        for chapter in CHAPTERS:
            name = f"{chapter}.tex"
            if name not in members:
                raise UserError(f"stacks_project.tar.gz: holds no {name}; is it another commit?")
            text = files.extractfile(members[name]).read().decode()
            parts = re.split(r"^(?=\\section\{)", text, flags=re.MULTILINE)
            for i, part in enumerate(map(str.strip, parts)):
                if len(part) >= SHORTEST:
                    lines.append(json.dumps({"text": part, "source": f"{name}#{i}"}) + "\n")
    return "".join(lines).encode()


# --------------------------------------------------------------------------------------------------
# the split


def by_hash(texts):
    """Without repetitions, in the order of their sha256: a shuffle by nothing but the texts."""
    return sorted(dict.fromkeys(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def split(problems, latex, latex_bytes):
    """{set: [text]} for base, corpus, curated, val. problems: [(question, answer)]; latex: [text].

    A question is in one set only, whatever answers it has; so is a LaTeX section.
    """
    answers = dict(problems)
    questions = by_hash(answers)
    half = len(questions) // 2
    ninety = half + (len(questions) - half) * 9 // 10
    taken = []
    size = 0
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
    out = {}
    for name, texts in sets.items():
        mixed = by_hash(texts)
        out[name] = [f"{text}\n{answers[text]}" if text in answers else text for text in mixed]
    return out


def write_split(data, out, latex_bytes):
    """Write the four sets."""
    for name, wanted in SHA256.items():
        if not (data / name).is_file():
            raise UserError(f"DATA={data}: holds no {name}; leave DATA out to download both files")
        if hashlib.sha256((data / name).read_bytes()).hexdigest() != wanted:
            print(
                f"warning: {data / name} is not the pinned file; the numbers will not compare",
                file=sys.stderr,
            )
    rows = pinned.read_rows(data / "gsm8k_train.jsonl")
    problems = [(row["question"], row["answer"]) for row in rows]
    latex = [row["text"] for row in pinned.read_rows(data / "stacks_project.jsonl")]
    for name, texts in split(problems, latex, latex_bytes).items():
        write_texts(texts, out / f"{name}.jsonl")


def write_texts(texts, path):
    """A .jsonl file with a document a line; one that is there with this content is not touched."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not path.exists() or path.read_text() != content:
        write_atomic(path, content)
    print(f"{path}: {len(texts):,} documents, {len(content):,} bytes")


def find_test(data):
    """GSM8K's test split: eval/gsm8k.jsonl beside `data`, or the pinned download."""
    if data is not None:
        folder = data.resolve().parent
        if (folder / "eval" / "gsm8k.jsonl").exists():
            return pinned.find("eval/gsm8k.jsonl", folder)
    return pinned.find("eval/gsm8k.jsonl", None)


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
