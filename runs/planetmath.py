"""PlanetMath as it is, and what a parser by hand makes of it: text of runs/when_it_pays.sh.

python runs/planetmath.py fetch --out data/pays/raw             # 20 MB, pinned and checksummed
python runs/planetmath.py sets --data data/pays/raw --out data/pays

An entry is a LaTeX file: metadata and a preamble, a third of its tokens, then the body. Entries are
put in the order of a hash of their name. `base` and `corpus` take them as they are, `bodies` holds
the bodies of `corpus` (what a perfect choice of tokens would keep), `curated` and `val` hold the
bodies of other entries, and `quarter` a quarter of `curated`.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zstandard

from common.command_line import Parser
from common.errors import UserError, cli
from common.files import write_atomic
from evaluation import pinned
from runs.real_text import write_texts

ARCHIVE = "https://codeload.github.com/planetmath/{name}/tar.gz/{commit}"
COMMITS = {
    "00_General": "f6b6fd1a507bf68001255dd23e173d82e41fb9ff",
    "03_Mathematical_logic_and_foundations": "2599a6dc47c4039af2227c0f18460010d679f1e3",
    "05_Combinatorics": "67cbdae45f3962728af91977f460099091540275",
    "11_Number_theory": "da34257fa8a961f4d6b8e289869901003a26dcf7",
    "15_Linear_and_multilinear_algebra_matrix_theory": "6b5b3a453b1eabf13a56a11f015889e1643bc182",
    "18_Category_theory_homological_algebra": "a73cdf5ad79c8813596ea0d7c888e87c305d6340",
    "20_Group_theory_and_generalizations": "42bdd9d135b06f31f898abd41d721ed9f6ee2bf9",
    "26_Real_functions": "d43833d3f1a2b2f42b1833b4a703dc111ad32a9f",
    "51_Geometry": "612c783d9ec05bb6fce1e35203a1b1623edae497",
    "54_General_topology": "2e11490cbf30d55ffccc2add1255a9f36ee3eecd",
}
# Of the entries below, one a line, in the order of repository and path: GitHub does not promise
# that an archive's own checksum stays.
SHA256 = "f119871fc84f82bb5b1ea13e765f7f71e715b824696cdf73f040f37536ce4f77"
FILE = "planetmath.jsonl"  # or packed, as FILE.zst
BODY = re.compile(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", re.DOTALL)
COMMENT = re.compile(r"^[ \t]*%.*\n?", re.MULTILINE)
SHARES = {"base": 0.50, "corpus": 0.38, "curated": 0.09, "val": 0.03}
SHORTEST = 200  # characters of a body that is curated or validated on


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("action", choices=["fetch", "sets"])
    parser.add_argument("--data", type=Path, help=f"sets: folder that holds {FILE} or {FILE}.zst")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------
# the file


def as_lines(entries):
    """[(repository, path, text)] as the file's content."""
    rows = [{"repo": repo, "path": path, "text": text} for repo, path, text in sorted(entries)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_pinned(entries):
    return hashlib.sha256(as_lines(entries).encode()).hexdigest() == SHA256


def fetch(out):
    """Download the ten archives, where `out` lacks the file. Raises UserError."""
    path = out / FILE
    if path.exists() and is_pinned(read(out)):
        return
    entries = []
    for name, commit in COMMITS.items():
        content = pinned.download(ARCHIVE.format(name=name, commit=commit), f"{name}.tar.gz")
        entries += entries_of(name, content)
    if not is_pinned(entries):
        raise UserError(
            f"{FILE}: the archives hold another text than the pinned one; it is refused: "
            f"download it again, or give a folder with a good copy as DATA"
        )
    write_atomic(path, as_lines(entries))


def entries_of(name, archive):
    """[(repository, path, text)] of the .tex files in a repository's .tar.gz."""
    found = []
    with pinned.whole_archive(archive, f"{name}.tar.gz") as files:
        for member in files.getmembers():
            _, _, path = member.name.partition("/")  # the archive's own folder
            if member.isfile() and path.endswith(".tex"):
                text = files.extractfile(member).read().decode()
                found.append((f"planetmath/{name}", path, text))
    return found


def read(folder):
    """[(repository, path, text)] of the file in `folder`, packed or not. Raises UserError."""
    plain, packed = folder / FILE, folder / f"{FILE}.zst"
    if not plain.exists() and not packed.exists():
        raise UserError(
            f"DATA={folder}: holds no {FILE} and no {FILE}.zst; leave DATA out to fetch"
        )
    path = plain if plain.exists() else packed
    entries = []
    try:
        opened = open(path, "rb") if path == plain else zstandard.open(path, "rb")
        with opened as file:
            # Not splitlines: an entry may hold other ends of a line.
            for line in file.read().decode().removesuffix("\n").split("\n"):
                row = json.loads(line)
                entries.append((row["repo"], row["path"], row["text"]))
    except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise UserError(
            f"{path}: no lines of repo, path and text ({error}); copy it again, or leave DATA out"
        ) from None
    return entries


# --------------------------------------------------------------------------------------------------
# the sets


def body(text):
    """What stands between an entry's \\begin{document} and its end, without lines of comment."""
    found = BODY.search(text)
    inside = found[1] if found else text
    return COMMENT.sub("", inside).strip()


def split(entries):
    """{set: [text]} of [(repository, path, text)]. An entry is in one of SHARES alone."""

    def place(entry):
        return hashlib.sha256(f"{entry[0]}/{entry[1]}".encode()).digest()

    ordered = sorted(entries, key=place)
    parts = {}
    taken = 0.0
    for name, share in SHARES.items():
        first = round(taken * len(ordered))
        taken += share
        parts[name] = [text for _, _, text in ordered[first : round(taken * len(ordered))]]
    sets = {name: parts[name] for name in ("base", "corpus")}
    sets["bodies"] = [body(text) for text in parts["corpus"] if body(text)]
    for name in ("curated", "val"):
        bodies = [body(text) for text in parts[name]]
        sets[name] = [text for text in bodies if len(text) >= SHORTEST]
    sets["quarter"] = sets["curated"][::4]
    return sets


def write_sets(data, out):
    """A .jsonl file for each set."""
    entries = read(data)
    if not is_pinned(entries):
        print(
            f"warning: {data}: not the pinned text; the numbers will not compare", file=sys.stderr
        )
    for name, texts in split(entries).items():
        write_texts(texts, out / f"{name}.jsonl")


def main():
    args = arguments()
    if args.action == "fetch":
        fetch(args.out)
    elif args.data is None:
        raise UserError("--data: got none, wanted the folder of fetch")
    else:
        write_sets(args.data, args.out)


if __name__ == "__main__":
    cli(main)
