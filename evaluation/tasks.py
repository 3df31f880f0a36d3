"""The maths tasks of the Rho-1 paper, and any file of problems: questions, prompts, true answers.

    from evaluation.tasks import load, prompt
    for example in load("gsm8k"):               # fetched once, see pinned.py
        text = prompt(example, "cot")           # the few-shot prompt behind the paper's numbers
    load("math", data_dir="my-copy")            # my-copy/eval/*.jsonl and my-copy/prompts/*.md
    load("problems.jsonl")                      # a file of one's own: question and answer a line

To add a published task: its files' checksums in pinned.py, an entry in TASKS, and a function if
its questions or answers need one.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from evaluation.answers import extract, normalize, number_of
from evaluation.pinned import find, read_rows

LETTERS = "ABCDE"
CHOICE = "What of the following is the right choice? Explain your answer."

STOP = {  # greedy decoding ends where one of these appears
    "cot": ["</s>", "\n\nQuestion:", "\n\nProblem:"],
    "tool": ["</s>", "\n\n---", "```output"],
}


@dataclass(frozen=True)
class Task:
    """One test set: its file, and how a row of it becomes a question and a true answer."""

    file: str
    shots: str  # the few-shot file; "" for none
    question: Callable[[dict], str]
    truth: Callable[[dict], str]
    choice: bool = False  # the answer is a letter
    own: bool = False  # a file of the user's: the question is the prompt, the answer behind ####


@dataclass(frozen=True)
class Example:
    """One problem. `prompt`: the chain-of-thought prompt; `gt`: the true answer as compared."""

    idx: int
    question: str
    prompt: str
    truth_raw: str
    gt: str
    raw: dict


# --------------------------------------------------------------------------------------------------
# question texts and true answers


def field(name):
    """What stands in a field of the row."""
    return lambda row: row[name]


def text_of(name):
    """What stands in a field of the row, as text."""
    return lambda row: str(row[name])


def with_choices(question, options):
    return f"{question.strip()}\n{CHOICE}\n{options}"


def after_hashes(row):
    return str(row["answer"]).split("####")[-1]


def own_truth(row):
    return number_of(row["answer"])


def math_truth(row):
    return extract(row["solution"])


def svamp_question(row):
    body = row["Body"].strip()
    if not body.endswith("."):
        body += "."
    return f"{body} {row['Question'].strip()}"


def asdiv_question(row):
    return f"{row['body'].strip()} {row['question'].strip()}"


def asdiv_truth(row):
    return re.sub(r"\([^)]*\)", "", row["answer"])  # "9 (apples)"


def tabmwp_question(row):
    regarding = f'regarding "{row["table_title"]}" ' if row["table_title"] else ""
    question = row["question"]
    if row["choices"]:
        question += f" Please select from the following options: {row['choices']}"
    return f"Read the following table {regarding}and answer a question:\n{row['table']}\n{question}"


def tabmwp_truth(row):
    """Numbers become one decimal number: 3/10 is 0.3, 4,656 is 4656.0 and 5% is 0.05."""
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
    problem = row["problem"].strip()
    options = row["options"].strip()
    if options.startswith("["):  # some rows hold a Python list in a string
        options = ", ".join(ast.literal_eval(options))
    options = re.sub(r"([a-e]) \) \1 \) ", r"\1 ) ", options)
    options = re.sub(r"([a-e]) \) ", lambda label: f"({label[1].upper()}) ", options)
    return with_choices(problem[:1].upper() + problem[1:], options.replace(" , ", ", "))


def mathqa_truth(row):
    return row["correct"].upper()


def mmlu_question(row):
    options = [f"({letter}) {text.strip()}" for letter, text in zip(LETTERS, row["choices"])]
    return with_choices(row["question"], ", ".join(options))


def mmlu_truth(row):
    return LETTERS[row["answer"]]


def sat_question(row):
    options = re.sub(r" ([B-E])\) ", r" (\1) ", row["options"].strip())
    if not options.startswith("("):
        options = "(" + options
    return with_choices(row["question"], options)


GSM8K = "prompts/gsm8k.md"
MINERVA = "prompts/minerva_math.md"
MATHQA = "prompts/mathqa.md"
MMLU = "prompts/mmlu_stem.md"

TASKS = {
    "gsm8k": Task("eval/gsm8k.jsonl", GSM8K, field("question"), after_hashes),
    "math": Task("eval/math_oai.jsonl", MINERVA, field("problem"), math_truth),
    "svamp": Task("eval/svamp.jsonl", GSM8K, svamp_question, text_of("Answer")),
    "asdiv": Task("eval/asdiv.jsonl", GSM8K, asdiv_question, asdiv_truth),
    "mawps": Task("eval/mawps.jsonl", GSM8K, field("input"), text_of("target")),
    "tabmwp": Task("eval/tabmwp_test1k.json", GSM8K, tabmwp_question, tabmwp_truth),
    "mathqa": Task("eval/mathqa.jsonl", MATHQA, mathqa_question, mathqa_truth, choice=True),
    "mmlu_stem": Task("eval/mmlu_stem.jsonl", MMLU, mmlu_question, mmlu_truth, choice=True),
    "sat": Task("eval/sat_math.jsonl", MMLU, sat_question, field("Answer"), choice=True),
    "gsm_hard": Task("eval/gsm_hard.jsonl", GSM8K, field("input"), text_of("target")),
}


# what a row that is not a problem's does to the functions above
UNUSABLE = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    SyntaxError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


# --------------------------------------------------------------------------------------------------
# what a stage calls


def task_of(task):
    """The Task behind a name or a path. Raises UserError for an unknown name."""
    if str(task).endswith(".jsonl"):
        return Task(str(task), "", field("question"), own_truth, own=True)
    if task not in TASKS:
        raise UserError(
            f"--tasks: got {task}, wanted some of {' '.join(TASKS)}, or a .jsonl file of problems"
        )
    return TASKS[task]


def label(task):
    """What a task is called in results: its name, or its file's ("test" for a/test.jsonl)."""
    return Path(task).stem if task_of(task).own else task


def prefix(task, data_dir=None):
    """The few-shot text that all prompts of a task begin with, "" for a file of one's own."""
    shots = task_of(task).shots
    if not shots:
        return ""
    return find(shots, data_dir).read_text(encoding="utf-8", errors="replace").strip() + "\n\n\n"


def load(task, data_dir=None, limit=None, answers=True, shots=True):
    """The problems of a task as a list of Example, in the file's order.

    task: a name in TASKS, or the path of a .jsonl file with the fields question and answer.
    data_dir: the folder with eval/ and prompts/. limit: only the first so many problems.
    answers: without, a file of one's own need hold none that can be graded. shots: without,
    `prompt` is not to be used, and their file need not be there.
    Raises UserError on unknown tasks and on files that cannot be had or read.
    """
    spec = task_of(task)
    if spec.own:
        path = Path(task)
        if not path.is_file():
            raise UserError(
                f"--tasks: got {task}, which is not there, "
                f"wanted a .jsonl file with a question and an answer a line"
            )
    else:
        path = find(spec.file, data_dir)
    shots = prefix(task, data_dir) if shots else ""
    examples = []
    for idx, row in enumerate(read_rows(path)[:limit]):
        try:
            examples.append(example(spec, shots, idx, row, answers))
        except UNUSABLE as error:
            raise UserError(
                f"{path}, problem {idx + 1}: got no usable {error}, wanted the fields of "
                f"{label(task)}; mend or delete the problem"
            ) from error
    if not examples:
        raise UserError(f"--tasks: {path} has no problem, wanted one a line")
    return examples


def example(spec, shots, idx, row, answers=True):
    """The problem in a row, asked as the harness asks it."""
    question = spec.question(row)
    truth = spec.truth(row) if answers or not spec.own else ""
    if spec.own:
        if not isinstance(question, str):
            raise TypeError("question")
        question.encode()  # ValueError: half of a surrogate pair is no text
        return Example(idx, question, question, truth, truth, row)
    gt = truth.strip() if spec.choice else normalize(truth)
    question = question.strip()
    if gt.lower() in ("true", "false"):
        question += " (True or False)"
    if gt.lower() in ("yes", "no"):
        question += " (Yes or No)"
    asked = f"Problem:\n{question}\nSolution:"
    if spec.shots == GSM8K:
        asked = f"Question: {question}\nAnswer:"
    return Example(idx, question, shots + asked, truth, gt, row)


def prompt(example, mode="cot"):
    """The text a model continues: chain of thought ("cot"), or zero-shot with tools ("tool")."""
    if mode not in STOP:
        raise UserError(f"--mode: got {mode}, wanted cot or tool")
    if mode == "cot":
        return example.prompt
    return f"<|user|>\n{example.question}\n<|assistant|>\n"
