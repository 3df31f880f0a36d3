"""Which documents hold a problem of a test set? Reports them, or writes the others.

    python -m tools.decontaminate --source train.jsonl --tasks gsm8k math --data-dir my-copy           # counts, examples
    python -m tools.decontaminate --source web-*.parquet --tasks gsm8k --out clean.jsonl --report report.json
    python prepare.py ... --decontaminate gsm8k math                                # while preparing, on all workers

A document is contaminated if it shares a run of 13 words with a problem's question; a question of 8 to 12 words must stand
in it whole; shorter ones cannot be checked and are counted. Words are runs of letters and digits, without case, so
spacing and punctuation make no difference. Memory holds the problems' runs of words, never the documents.
"""

import argparse
import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, cli
from common.files import renamed_when_whole, write_atomic
from evaluation import tasks
from text import reading

N, SHORTEST = 13, 8  # words
PROBE = 4  # words that are looked up first, every STRIDE-th: a run of 8 holds one of them whole
STRIDE = SHORTEST - PROBE + 1
assert SHORTEST == 2 * PROBE
LETTERS = bytes(byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256))
NO_LETTER = re.compile(r"[^\w\x00-\x7f]+")  # beyond ASCII


def words_of(text):
    """The runs of letters and digits, without case, as UTF-8: [b"one", b"two"]. Bytes, for the sake of speed."""
    text = (
        text.lower()
        if text.isascii()
        else NO_LETTER.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    )
    return text.encode().translate(LETTERS).split()


class Decontaminator:
    """problems: [(task, number, question)]. `uncheckable`: how many questions are too short, by task."""

    def __init__(self, problems, n=N):
        self.probes, self.runs = (
            set(),
            defaultdict(set),
        )  # runs: {(words): problems}, by length in `lengths`
        self.checked, self.uncheckable = Counter(), Counter()
        digest = hashlib.sha256(f"{n} {SHORTEST}".encode())
        for task, number, question in problems:
            words = words_of(question)
            digest.update(b" ".join([task.encode(), *words, b"\n"]))
            if len(words) < SHORTEST:
                self.uncheckable[task] += 1
                continue
            self.checked[task] += 1
            length = min(n, len(words))
            for i in range(len(words) - length + 1):
                self.runs[b" ".join(words[i : i + length])].add((task, number))
            for i in range(len(words) - PROBE + 1):
                self.probes.add(b" ".join(words[i : i + PROBE]))
        self.lengths = sorted({run.count(b" ") + 1 for run in self.runs})
        self.hash = digest.hexdigest()

    @classmethod
    def of_tasks(cls, names, data_dir=None):
        """Of the kit's test sets. Raises UserError for unknown ones."""
        problems = []
        for name in dict.fromkeys(names):
            tasks.check(name)
            if name == "demo":
                raise UserError(
                    "--decontaminate demo: its test problems are kept apart already; name other tasks"
                )
            for example in tasks.load(
                name, data_dir
            ):  # the choices' fixed line is no part of a problem
                problems.append(
                    (
                        name,
                        example.idx,
                        example.question.replace(
                            "What of the following is the right choice? Explain your answer.", ""
                        ),
                    )
                )
        made = cls(problems)
        print(
            f"decontamination: {sum(made.checked.values()):,} problems of {', '.join(dict.fromkeys(names))}; "
            f"{sum(made.uncheckable.values()):,} more are under {SHORTEST} words and cannot be checked"
        )
        return made

    def problems_in(self, text):
        """{(task, number)} of the problems that a text holds."""
        words, found, looked = words_of(text), set(), -1
        for i in range(0, len(words) - PROBE + 1, STRIDE):
            # All runs of PROBE words of every problem are known, so those of 8 words around this one would be, too.
            if b" ".join(words[i : i + PROBE]) in self.probes and any(
                b" ".join(words[at : at + PROBE]) in self.probes
                and b" ".join(words[at + PROBE : at + SHORTEST]) in self.probes
                for at in range(max(0, i - PROBE), i + 1)
            ):
                for start in range(
                    max(looked + 1, i - N + 1), i + 1
                ):  # now look closely at every run around it
                    for length in self.lengths:
                        run = b" ".join(words[start : start + length])
                        if run in self.runs and start + length <= len(words):
                            found |= self.runs[run]
                looked = i
        return found


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", nargs="+", required=True, help="files, as prepare.py takes them"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"test sets: {' '.join(tasks.TASKS)}",
    )
    parser.add_argument(
        "--data-dir", help="folder with the test sets' eval/ (default: download them)"
    )
    parser.add_argument(
        "--text-field", help="field that holds the text (default: by the fields' names)"
    )
    parser.add_argument("--out", help="write the clean documents here (FILE.jsonl, field text)")
    parser.add_argument("--report", help="write counts and all finds here (FILE.json)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out broken records")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    check = Decontaminator.of_tasks(args.tasks, args.data_dir)
    with tempfile.TemporaryDirectory(
        dir=Path(args.out).parent if args.out else None
    ) as folder:  # of a hub's shard
        run(args, check, folder)


def run(args, check, folder):
    todo = reading.find(
        args.source, "text" if args.text_field else None, [args.text_field], args.skip_bad, folder
    )
    if any(source["type"] == "set" for source in todo):
        raise UserError(
            "tools.decontaminate: reads text; a token set is made again with prepare.py --decontaminate"
        )
    if args.out:
        with renamed_when_whole(args.out) as temporary, open(temporary, "w") as out:
            report = scan(todo, check, args, out)
    else:
        report = scan(todo, check, args)
    if args.report:
        write_atomic(args.report, json.dumps(report, indent=1))
    print(
        f"{report['documents']:,} documents, {report['contaminated']:,} contaminated "
        f"({report['contaminated'] / max(1, report['documents']):.2%})"
        + f"; the others: {args.out}"
        * bool(args.out)
    )
    for name in dict.fromkeys(args.tasks):
        print(
            f"  {name}: {report['problems_found'].get(name, 0):,} of {check.checked[name]:,} problems found, "
            f"{check.uncheckable[name]:,} under {SHORTEST} words not checked"
        )
    for find in report["finds"][:5]:
        print(f"  e.g. {find['problems'][0][0]} {find['problems'][0][1]}: {find['text'][:160]!r}")


def scan(todo, check, args, out=None):
    """Reads every document once. {"documents", "contaminated", "problems_found": {task: n}, "finds": [...]}"""
    n, contaminated, problems, finds = 0, 0, set(), []
    with tqdm(
        total=sum(source["size"] for source in todo), unit="B", unit_scale=True, disable=None
    ) as bar:
        state, behind = {"source": 0, "record": 0}, 0
        for job in reading.jobs(todo, state, len(todo), args.skip_bad):
            if "error" in job:
                raise UserError(job["error"])
            for texts in filter(None, reading.documents(todo[job["source"]], job, args.skip_bad)):
                text, n = "".join(texts), n + 1
                if found := check.problems_in(text):
                    contaminated, problems = contaminated + 1, problems | found
                    if len(finds) < 1000:
                        finds.append({"problems": sorted(found), "text": text[:1000]})
                elif out:
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            behind = sum(source["size"] for source in todo[: job["source"]])
            bar.update(behind + job["read"] - bar.n)
    return {
        "documents": n,
        "contaminated": contaminated,
        "problems_found": Counter(task for task, _ in problems),
        "finds": finds,
    }


if __name__ == "__main__":
    cli(main)
