"""Text and table of runs/real_model.sh: a pretrained model continued on real text.

python runs/real_model.py sets --out data/real_model              # corpus, curated, val, test.jsonl
python runs/real_model.py report --data data/real_model --out out/real_model --seeds 0
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.device  # noqa: F401  first: it sets how torch's threads wait

from common.command_line import Parser, whole
from common.errors import UserError, cli
from common.files import write_atomic
from data import header_of
from evaluation import pinned
from evaluation.results import read_entries
from runs.real_text import SHA256, fetch, find_test, split, write_texts
from runs.real_text_report import stored_mean
from tools import local_hub
from tools.results import files
from tools.results.collect import collected
from tools.results.tables import render

NAME = "real-model"
COMMAND = "bash runs/real_model.sh"
METHODS = ("clm", "random", "slm", "clm-tuned", "slm-tuned")
OWN = ("corpus", "curated", "val")


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("action", choices=["sets", "report"])
    group = parser.add_argument_group("sets")
    group.add_argument("--out", type=Path, required=True, help="folder to write to, or of the runs")
    group.add_argument(
        "--data", type=Path, help="the two files of runs/real_text.sh; or token sets"
    )
    group.add_argument("--text", type=Path, help="text of your own: corpus, curated and val.jsonl")
    group.add_argument("--data-dir", type=Path, help="folder that holds eval/gsm8k.jsonl")
    group.add_argument(
        "--made", action="store_true", help="without --data and --text: a little text made here"
    )
    group = parser.add_argument_group("report")
    group.add_argument("--model", help="where all runs start")
    group.add_argument("--name", default="", help="what the runs are called beside the model")
    group.add_argument("--seeds", nargs="+", type=whole(0), default=[0], help="of the students")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------
# text


def write_sets(args):
    """Four .jsonl files."""
    if args.text:
        texts = own_text(args.text)
    elif args.made and not args.data:
        texts = made_text()
    else:
        texts = real_text(args)
    texts["test"] = test_text(args)
    for name, documents in texts.items():
        write_texts(documents, args.out / f"{name}.jsonl")


def own_text(folder):
    missing = [name for name in OWN if not (folder / f"{name}.jsonl").exists()]
    if missing:
        raise UserError(f"TEXT={folder}: holds no {' and no '.join(missing)}.jsonl")
    return {name: [as_text(row) for row in rows_of(folder, name)] for name in OWN}


def rows_of(folder, name):
    return pinned.read_rows(folder / f"{name}.jsonl")


def as_text(row):
    if not isinstance(row.get("text"), str):
        raise UserError(f'TEXT: a line has the fields {", ".join(row)}, wanted a "text"')
    return row["text"]


def real_text(args):
    """All of the Stacks project and of GSM8K's training problems: what runs/real_text.sh calls
    base is a part of the corpus here, since the base of this experiment is trained already."""
    data = args.data or args.out / "raw"
    if not args.data:
        fetch(data)
    for name in SHA256:
        if not (data / name).is_file():
            raise UserError(f"DATA={data}: holds no {name}; leave DATA out to download it")
    rows = pinned.read_rows(data / "gsm8k_train.jsonl")
    problems = [(row["question"], row["answer"]) for row in rows]
    latex = [row["text"] for row in pinned.read_rows(data / "stacks_project.jsonl")]
    sets = split(problems, latex, sum(len(text.encode()) for text in latex))
    corpus = [*sets["base"], *sets["corpus"]]
    return {"corpus": corpus, "curated": sets["curated"], "val": sets["val"]}


def made_text():
    """A little of the local hub's text, for SCALE=tiny: problems among noisy pages."""
    problems = []
    for i in range(80):
        question, a, b = local_hub.problem(i)
        problems.append((question, local_hub.solution(a, b)))
    pages = [local_hub.page(i) for i in range(40)]
    sets = split(problems, pages, sum(map(len, pages)))
    return {"corpus": sets["base"] + sets["corpus"], "curated": sets["curated"], "val": sets["val"]}


def test_text(args):
    """GSM8K's test split, question and answer."""
    if args.data_dir:
        path = pinned.find("eval/gsm8k.jsonl", args.data_dir)
    else:
        path = find_test(args.data)
    return [f"{row['question']}\n{row['answer']}" for row in pinned.read_rows(path)]


# --------------------------------------------------------------------------------------------------
# the table


def report(args):
    """Add every run to results/real-model.json and return the table made from it, as Markdown."""
    if files.path_of(NAME).exists():
        experiment = files.load(NAME)
    else:
        experiment = files.Experiment(NAME, COMMAND)
    scored = header_of(args.data / "corpus").count
    runs = [measured(args, "ref", 0, args.out / "ref")]
    for seed in args.seeds:
        for method in METHODS:
            runs.append(measured(args, method, seed, args.out / f"{method}-seed{seed}"))
    runs.append(base_of(args, runs[1]))
    for run in runs:
        run.numbers["scored_tokens"] = scored if run.method == "slm" else None
        files.add(experiment, run)
    files.save(experiment)
    return "\n".join(render(NAME, experiment))


def measured(args, method, seed, folder):
    """A finished run with its GSM8K numbers; the seed of the reference is 0."""
    run = collected(folder, method, variant_of(args))
    return replace(run, seed=seed, numbers=run.numbers | gsm8k(args.out, folder.name))


def base_of(args, student):
    """The model that `student` started from, as a run: its loss is that of step 0."""
    numbers = {"val_loss": student.curve[0][1], "tokens_seen": 0, **gsm8k(args.out, "base")}
    inputs = {"init": student.inputs["init"]}
    made = student.made
    return files.Run("base", 0, variant_of(args), numbers, [], {"model": args.model}, inputs, made)


def variant_of(args):
    return f"{Path(args.model).name} {args.name}".strip()


def gsm8k(out, name):
    """{number: value} of the test split: mean loss in nats, few-shot accuracy in percent."""
    entry = read_entries(out / f"{name}-eval").get("gsm8k")
    if entry is None:
        raise UserError(f"{out}/{name}-eval: holds no GSM8K; {COMMAND} goes on where it stopped")
    return {
        "gsm8k_loss": stored_mean(out / f"{name}-test_loss.bin"),
        "gsm8k_accuracy": entry["published"],
        "gsm8k_problems": entry["n"],
    }


def main():
    args = arguments()
    if args.action == "sets":
        write_sets(args)
        return
    if not (args.model and args.data):
        raise UserError("report: wanted --data and --model")
    text = report(args)
    write_atomic(args.out / "report.md", text + "\n")
    print(text)


if __name__ == "__main__":
    cli(main)
