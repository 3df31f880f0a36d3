"""Which documents hold a problem of a test set? Reports them, or writes the others.

    python -m tools.decontaminate --source train.jsonl --tasks gsm8k math --data-dir my-copy
    python -m tools.decontaminate --source web-*.parquet --tasks gsm8k --out clean.jsonl \\
        --report report.json
    python prepare.py ... --decontaminate gsm8k math        # while preparing, on all workers

The rule is that of text/decontaminate.py: a run of 13 words that a document shares with a problem.
"""

import argparse
import json
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common import files, locks, owned
from common.errors import UserError, cli, command
from common.files import renamed_when_whole, write_atomic
from evaluation import tasks
from prepare import decontaminator_of
from text import hub_datasets, reading
from text.decontaminate import SHORTEST
from text.sources import sources_of

FINDS = 1000  # that are kept for the report
SHOWN = 5  # of them that are printed


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


@dataclass
class Report:
    documents: int = 0
    contaminated: int = 0
    problems: set = field(default_factory=set)  # (task, number) that were found
    finds: list = field(default_factory=list)

    def add(self, text, found):
        """Count a document in which the problems `found` stand."""
        self.contaminated += 1
        self.problems |= found
        if len(self.finds) < FINDS:
            self.finds.append({"problems": sorted(found), "text": text[:1000]})

    def as_json(self):
        content = {
            "documents": self.documents,
            "contaminated": self.contaminated,
            "problems_found": Counter(task for task, _ in self.problems),
            "finds": self.finds,
        }
        return json.dumps(content, indent=1)


@contextmanager
def room_for_shards(out):
    """A folder for the hub's listing and one shard: beside `out`, where there is room; for a time.

    Another process that writes to `out` is refused (UserError); a killed one's folder is taken.
    """
    if not out:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
        return
    folder = Path(out).with_name(Path(out).name + ".shards")
    owned.own_folder(folder)
    locks.lock_folder(folder, "token set")  # as one that is made of the hub's
    try:
        yield folder
    finally:
        hub_datasets.delete_shard(folder)
        files.remove_folder(folder)
        locks.unlock(folder)


def refuse_outputs(args):
    """Raises UserError where an output would take the place of an input or of anybody's file."""
    for path in filter(None, (args.out, args.report)):
        owned.refuse_overlap(path, {"--source": args.source, "--data-dir": args.data_dir})
        owned.refuse_taken([path])
    if args.out and args.report and Path(args.out).resolve() == Path(args.report).resolve():
        raise UserError(f"--report {args.report}: is --out, too; name another file")


def main(argv=None):
    args = arguments(argv)
    refuse_outputs(args)
    check = decontaminator_of(args.tasks, args.data_dir)
    with ExitStack() as stack:
        folder = stack.enter_context(room_for_shards(args.out))
        form, fields = ("text", [args.text_field]) if args.text_field else (None, None)
        sources = sources_of(args.source, form, fields, args.skip_bad, folder)
        if any(source.kind == "set" for source in sources):
            words = ["--source", "TEXT", "--decontaminate", *args.tasks]
            if args.data_dir:
                words += ["--data-dir", args.data_dir]
            again = command("prepare.py", *words, "--tokenizer", "MODEL", "--out", "NEW")
            raise UserError(
                f"tools.decontaminate: reads text; a token set is made again with {again}"
            )
        out = None
        if args.out:
            temporary = stack.enter_context(renamed_when_whole(args.out))
            out = stack.enter_context(open(temporary, "w"))
        report = scan(sources, check, args.skip_bad, out)
    if args.report:
        write_atomic(args.report, report.as_json())
    show(report, check, args)


def scan(sources, check, skip_bad, out=None):
    """Read every document once; the clean ones go to the open file `out`. Returns the Report."""
    report = Report()
    size = sum(source.size for source in sources)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        number = 0  # the source that is read
        behind = 0  # the sizes of those before it
        for job in reading.jobs(sources, 0, 0, len(sources), skip_bad):
            if job.error:
                raise UserError(job.error)
            while number < job.source:
                behind += sources[number].size
                number += 1
            for texts in reading.documents(sources[job.source], job, skip_bad):
                if texts is None:
                    continue
                text = "".join(texts)
                report.documents += 1
                if found := check.problems_in(text):
                    report.add(text, found)
                elif out:
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            bar.update(behind + job.read - bar.n)
    return report


def show(report, check, args):
    share = report.contaminated / max(1, report.documents)
    where = f"; the others: {args.out}" if args.out else ""
    print(
        f"{report.documents:,} documents, {report.contaminated:,} contaminated ({share:.2%}){where}"
    )
    found = Counter(task for task, _ in report.problems)
    for name in dict.fromkeys(args.tasks):
        print(
            f"  {name}: {found[name]:,} of {check.checked[name]:,} problems found, "
            f"{check.uncheckable[name]:,} under {SHORTEST} words not checked"
        )
    for find in report.finds[:SHOWN]:
        task, number = find["problems"][0]
        print(f"  e.g. {task} {number}: {find['text'][:160]!r}")


if __name__ == "__main__":
    cli(main)
