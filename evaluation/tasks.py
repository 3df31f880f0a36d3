"""The maths test sets of the Rho-1 paper: download, question texts, few-shot prompts and true answers.

    from evaluation.tasks import load, prompt
    for example in load("gsm8k"):                 # fetched once into ~/.cache/rho-slm (or $RHO_CACHE)
        text = prompt(example, "cot")             # the few-shot prompt that the paper's numbers were made with
    load("math", data_dir="my-copy")              # no network: my-copy/eval/*.jsonl and my-copy/prompts/*.md
    load("demo", data_dir="data/demo/test.jsonl") # the demo's own problems, no few-shot prompt

Rho-1 evaluates with a public harness; test sets and prompts are read from it at one pinned commit (TabMWP from its own
repository), and every file must have the checksum below. To add a task: one line in TASKS, the files it reads in
FILES, and a function if its questions or answers need one.
"""

import ast
import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from common.errors import UserError
from evaluation.answers import extract, normalize

GITHUB = "https://raw.githubusercontent.com"
HARNESS = "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
PROMPTPG = "lupantech/PromptPG/7cf61b1bec07222fc24b4f5a1410911f77c2d2c9"
LETTERS = "ABCDE"

STOP = {  # greedy decoding ends where one of these appears
    "cot": ["</s>", "\n\nQuestion:", "\n\nProblem:"],
    "tool": ["</s>", "\n\n---", "```output"],
}

FILES = {  # name in the data folder: (address at the source, sha256)
    "eval/gsm8k.jsonl": (
        f"{HARNESS}/data/gsm8k/test.jsonl",
        "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394",
    ),
    "eval/math_oai.jsonl": (
        f"{HARNESS}/data/math_oai/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    ),
    "eval/svamp.jsonl": (
        f"{HARNESS}/data/svamp/test.jsonl",
        "d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d",
    ),
    "eval/asdiv.jsonl": (
        f"{HARNESS}/data/asdiv/test.jsonl",
        "5759580385e706f961a30d4c07d6925b35c3f7c86d6c50bc413957169693dad2",
    ),
    "eval/mawps.jsonl": (
        f"{HARNESS}/data/mawps/test.jsonl",
        "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b",
    ),
    "eval/mathqa.jsonl": (
        f"{HARNESS}/data/mathqa/test.jsonl",
        "136de4608366708d01d4c38890437e722c9209e9a66ef5d119cb01f6f88dfec6",
    ),
    "eval/mmlu_stem.jsonl": (
        f"{HARNESS}/data/mmlu_stem/test.jsonl",
        "fd7c16f96067d285638abb5aaef9cd8a063b11454e14cb64df93141a58691478",
    ),
    "eval/sat_math.jsonl": (
        f"{HARNESS}/data/sat_math/test.jsonl",
        "96720a1dc496ea72f80db55250290cf9c48e95b657ac2183b7deb1dc4627351f",
    ),
    "eval/gsm_hard.jsonl": (
        f"{HARNESS}/data/gsm_hard/test.jsonl",
        "45db606263a4902580aba3974e8b7fb3f66012877889209af206b1c1b2f208f5",
    ),
    "eval/tabmwp_test1k.json": (
        f"{PROMPTPG}/data/tabmwp/problems_test1k.json",
        "bf34a84d359c48ba8f401c49f65363858a8a63530921d319b175550e1f352f69",
    ),
    "prompts/gsm8k.md": (
        f"{HARNESS}/prompts/cot/gsm8k.md",
        "f7b267f942be471e4ea8013cdba4c4df3cad1f969774c073e9165c568043a7b8",
    ),
    "prompts/minerva_math.md": (
        f"{HARNESS}/prompts/cot/minerva_math.md",
        "6637ad6e3ece303c059196bebdc3607ab9f617f4a57f73ac44afeb7f4320c829",
    ),
    "prompts/mathqa.md": (
        f"{HARNESS}/prompts/cot/mathqa.md",
        "ba599b1fda1932b423e368b6a43643a10763cec1753dcdaca51375fdcd33c0cb",
    ),
    "prompts/mmlu_stem.md": (
        f"{HARNESS}/prompts/cot/mmlu_stem.md",
        "c5e61e1f80bbf4b08d60db5abaa55dcdc1a211093ce33e2a591ae9647bf8907a",
    ),
}


@dataclass(frozen=True)
class Task:
    """One test set: its file, its few-shot file, and how a row of it becomes a question and a true answer."""

    file: str
    shots: str
    question: Callable[[dict], str]
    truth: Callable[[dict], str]
    choice: bool = False  # the answer is a letter


@dataclass(frozen=True)
class Example:
    """One problem. `prompt` is the whole chain-of-thought prompt, `gt` the true answer as it is compared."""

    idx: int
    question: str
    prompt: str
    truth_raw: str
    gt: str
    raw: dict


# ---------------------------------------------------------------------------------------------------------------------
# question texts and true answers


def with_choices(question, options):
    return f"{question.strip()}\nWhat of the following is the right choice? Explain your answer.\n{options}"


def svamp_question(row):
    body = row["Body"].strip()
    return f"{body if body.endswith('.') else body + '.'} {row['Question'].strip()}"


def tabmwp_question(row):
    regarding = f'regarding "{row["table_title"]}" ' if row["table_title"] else ""
    choices = (
        f" Please select from the following options: {row['choices']}" if row["choices"] else ""
    )
    return f"Read the following table {regarding}and answer a question:\n{row['table']}\n{row['question']}{choices}"


def tabmwp_truth(row):
    """Numbers become one decimal number: 3/10 is 0.3, 4,656 is 4656 and 5% is 0.05. Other answers stay as they are."""
    answer = row["answer"]
    if row["ans_type"] not in ("integer_number", "decimal_number"):
        return answer
    if "/" in answer:
        numerator, denominator = answer.split("/")
        return str(int(numerator) / int(denominator))
    if answer.endswith("%"):
        return str(float(answer[:-1].replace(",", "")) / 100)
    return str(float(answer.replace(",", "")))


def mathqa_question(row):
    problem, options = row["problem"].strip(), row["options"].strip()
    if options.startswith("["):  # some rows hold a Python list in a string
        options = ", ".join(ast.literal_eval(options))
    options = re.sub(r"([a-e]) \) \1 \) ", r"\1 ) ", options)
    options = re.sub(r"([a-e]) \) ", lambda label: f"({label[1].upper()}) ", options)
    return with_choices(problem[:1].upper() + problem[1:], options.replace(" , ", ", "))


def mmlu_question(row):
    return with_choices(
        row["question"],
        ", ".join(f"({letter}) {text.strip()}" for letter, text in zip(LETTERS, row["choices"])),
    )


def sat_question(row):
    options = re.sub(r" ([B-E])\) ", r" (\1) ", row["options"].strip())
    return with_choices(row["question"], options if options.startswith("(") else "(" + options)


TASKS = {
    "gsm8k": Task(
        "eval/gsm8k.jsonl",
        "prompts/gsm8k.md",
        lambda row: row["question"],
        lambda row: row["answer"].split("####")[-1],
    ),
    "math": Task(
        "eval/math_oai.jsonl",
        "prompts/minerva_math.md",
        lambda row: row["problem"],
        lambda row: extract(row["solution"]),
    ),
    "svamp": Task(
        "eval/svamp.jsonl", "prompts/gsm8k.md", svamp_question, lambda row: str(row["Answer"])
    ),
    "asdiv": Task(
        "eval/asdiv.jsonl",
        "prompts/gsm8k.md",
        lambda row: f"{row['body'].strip()} {row['question'].strip()}",
        lambda row: re.sub(r"\([^)]*\)", "", row["answer"]),
    ),
    "mawps": Task(
        "eval/mawps.jsonl",
        "prompts/gsm8k.md",
        lambda row: row["input"],
        lambda row: str(row["target"]),
    ),
    "tabmwp": Task("eval/tabmwp_test1k.json", "prompts/gsm8k.md", tabmwp_question, tabmwp_truth),
    "mathqa": Task(
        "eval/mathqa.jsonl",
        "prompts/mathqa.md",
        mathqa_question,
        lambda row: row["correct"].upper(),
        choice=True,
    ),
    "mmlu_stem": Task(
        "eval/mmlu_stem.jsonl",
        "prompts/mmlu_stem.md",
        mmlu_question,
        lambda row: LETTERS[row["answer"]],
        choice=True,
    ),
    "sat": Task(
        "eval/sat_math.jsonl",
        "prompts/mmlu_stem.md",
        sat_question,
        lambda row: row["Answer"],
        choice=True,
    ),
    "gsm_hard": Task(
        "eval/gsm_hard.jsonl",
        "prompts/gsm8k.md",
        lambda row: row["input"],
        lambda row: str(row["target"]),
    ),
    "demo": Task("", "", lambda row: row["question"], lambda row: str(row["answer"])),
}


# ---------------------------------------------------------------------------------------------------------------------
# files


def cache_dir():
    return Path(os.environ.get("RHO_CACHE") or Path.home() / ".cache" / "rho-slm")


def find(name, data_dir=None, base_url=GITHUB):
    """Path of a data file such as "eval/gsm8k.jsonl": in `data_dir`, else in the cache, else downloaded into it.

    Raises UserError where data_dir lacks the file, the network cannot be reached, or the checksum is wrong. A file of
    the user's own data_dir that differs from the published one is used, with a warning.
    """
    address, sha256 = FILES[name]
    if data_dir is not None:
        path = Path(data_dir) / name
        if not path.is_file():
            raise UserError(
                f"--data-dir: got {data_dir}, wanted a folder that holds {name}; "
                f"name the folder that has eval/ and prompts/, or leave --data-dir out to download"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            print(
                f"warning: {path} is not the published file (its sha256 differs): "
                f"numbers made with it do not compare with the paper's",
                file=sys.stderr,
            )
        return path
    path = cache_dir() / name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    content = download(f"{base_url}/{address}", name)
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise UserError(
            f"{base_url}/{address}: got a file with sha256 {got}, wanted {sha256}; "
            f"it was refused: try again, or give a good copy with --data-dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path


def download(url, name, timeout=30):
    """Bytes behind `url`. Raises UserError when it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            parts = []
            with tqdm(
                total=size or None, unit="B", unit_scale=True, desc=name, leave=False, delay=1
            ) as bar:
                while part := answer.read(1 << 16):
                    parts.append(part)
                    bar.update(len(part))
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UserError(
            f"{name}: got no file from {url} ({error}), wanted the public test set; connect to the "
            f"network, or name a folder that holds eval/ and prompts/ with --data-dir"
        ) from error
    return b"".join(parts)


def read_rows(path):
    """Rows of a .jsonl file, or the values of a .json object. Raises UserError with file and line number."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: got {error}, wanted a readable file") from error
    if path.suffix == ".json":
        return list(json.loads(text).values())
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__}, not an object")
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: got broken JSON ({error}), wanted one JSON object a line; "
                    f"mend or delete the line"
                ) from error
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what a stage calls


def check(task):
    if task not in TASKS:
        raise UserError(f"--tasks: got {task}, wanted some of {' '.join(TASKS)}")
    return TASKS[task]


def prefix(task, data_dir=None, base_url=GITHUB):
    """The few-shot text that all prompts of a task begin with, up to the question ("" for demo)."""
    shots = check(task).shots
    return (
        find(shots, data_dir, base_url).read_text(encoding="utf-8").strip() + "\n\n\n"
        if shots
        else ""
    )


def load(task, data_dir=None, limit=None, base_url=GITHUB):
    """The problems of a task as a list of Example, in the file's order.

    data_dir: folder with eval/ and prompts/; for demo the path of its jsonl file (fields question, answer).
    limit: only the first so many problems. Raises UserError on unknown tasks and on files that cannot be had or read.
    """
    spec = check(task)
    if task == "demo":
        if data_dir is None or not Path(data_dir).is_file():
            raise UserError(
                f"demo: got {data_dir}, wanted its file of problems (data/demo/test.jsonl); "
                f"python prepare.py --source demo writes it"
            )
        path = Path(data_dir)
    else:
        path = find(spec.file, data_dir, base_url)
    shots = prefix(task, data_dir, base_url)
    examples = []
    for idx, row in enumerate(read_rows(path)[:limit]):
        try:
            question, truth = spec.question(row), spec.truth(row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{path}, problem {idx + 1}: got no usable {error}, wanted the fields of {task}; "
                f"mend or delete the problem"
            ) from error
        gt = truth.strip() if spec.choice else normalize(truth)
        if task == "demo":
            examples.append(Example(idx, question, question, truth, gt, row))
            continue
        question = question.strip()
        if gt.lower() in ("true", "false"):
            question += " (True or False)"
        if gt.lower() in ("yes", "no"):
            question += " (Yes or No)"
        ask = (
            "Question: {}\nAnswer:"
            if spec.shots.endswith("gsm8k.md")
            else "Problem:\n{}\nSolution:"
        )
        examples.append(Example(idx, question, shots + ask.format(question), truth, gt, row))
    return examples


def prompt(example, mode="cot"):
    """The text a model continues: few-shot chain of thought ("cot") or zero-shot tool-integrated ("tool")."""
    if mode not in STOP:
        raise UserError(f"--mode: got {mode}, wanted cot or tool")
    return example.prompt if mode == "cot" else f"<|user|>\n{example.question}\n<|assistant|>\n"
