"""Verdicts on a model's answers: what was answered, and is it the true answer?

    pred, published, strict = grade("gsm8k", "... The answer is 18.", "18")
    python eval_math.py --regrade outputs.jsonl --tasks math --out DIR     # grades a file again, no model needed

`published` follows the rules behind the Rho-1 paper's numbers: a percent may be 100 times off, brackets of one kind
pass for another. `strict` holds only where the answer is right without that help. What was answered is read by answers.py. Cheap
comparisons run here; whatever needs algebra goes to a worker process (this file, run as a script) with a time and a memory limit,
for a single answer such as 9**9**9 can hang or kill a process. Nothing here imports torch.
"""

import atexit
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from common.errors import UserError
from evaluation.answers import MAX_CHARS, choice_text, extract, normalize
from evaluation.tasks import check

MEMORY = 2 << 30  # bytes of address space that a worker may use
SECONDS = 5.0  # of processor time for one comparison, so that a busy machine changes no verdict
PATIENCE = 6  # times as long on the clock, and the worker counts as hung
ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# equality


def number(text, strict=False):
    """A decimal number as a float, else None. Commas are dropped; strictly, only where they part thousands."""
    if strict and "," in text and not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d*)?", text):
        return None
    text = text.replace(",", "")
    percent = text.endswith("%")
    text = text.rstrip("%").removesuffix("\\")
    if len(text) > 400 or not re.fullmatch(
        r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE
    ):
        return None
    return float(text) / 100 if percent else float(text)


def close(pred, gt, strict=False):
    """Published: within 1e-4, also 100 times larger or smaller. Strict: that only for decimals, whole numbers exact."""
    if strict:
        return math.isclose(pred, gt, rel_tol=1e-9 if gt == round(gt, 0) else 1e-4)
    return any(math.isclose(pred, value, rel_tol=1e-4) for value in (gt / 100, gt, gt * 100))


def cheap(pred, gt, strict=False):
    """True or False where strings and numbers decide, else None."""
    if pred == gt:
        return bool(pred) or not strict  # of "east", a unit to the harness, nothing is left
    if not pred or not gt or max(len(pred), len(gt)) > MAX_CHARS:
        return False
    if len(pred) > 3 and len(gt) > 3 and pred.isalpha() and gt.isalpha():
        return pred.lower() == gt.lower()  # words; algebra would take them for products of letters
    values = number(pred, strict), number(gt, strict)
    if None not in values:
        return all(map(math.isfinite, values)) and close(*values, strict)
    return None


def split_parts(inside):
    """The parts between commas outside all brackets: "(1,2),3" has two."""
    parts, depth = [""], 0
    for char in inside:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def bases(text):
    return sorted(re.findall(r"_\{?(\w+)", text))


def equal(pred, gt, strict=False):
    """Are two normalised answers the same? The published rules in their order, algebra last. May run very long."""
    decided = cheap(pred, gt, strict)
    if decided is not None:
        return decided
    if (
        not strict
        and re.sub(r"[(){}\[\]]", "", pred).lower() == re.sub(r"[(){}\[\]]", "", gt).lower()
    ):
        return True
    matrix = r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}"
    if (left := re.fullmatch(matrix, pred)) and (right := re.fullmatch(matrix, gt)):
        rows = [
            [row.split("&") for row in side[1].removesuffix("\\\\").split("\\\\")]
            for side in (left, right)
        ]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return False
        return all(equal(a, b, strict) for one, two in zip(*rows) for a, b in zip(one, two))
    bracketed = r"[(\[{].+[)\]}]"
    if re.fullmatch(bracketed, pred) and re.fullmatch(bracketed, gt):
        parts = split_parts(pred[1:-1]), split_parts(gt[1:-1])
        same_brackets = (pred[0], pred[-1]) == (gt[0], gt[-1])
        if len(parts[0]) == len(parts[1]) > 1 and all(equal(a, b, strict) for a, b in zip(*parts)):
            return same_brackets or not strict
        if strict and not same_brackets and len(parts[1]) > 1:
            return False
    if strict and (re.search(r"\\(?![A-Za-z{}])", gt) or bases(pred) != bases(gt)):
        return False  # a plus-minus sign whose "pm" went as a unit; another number base
    if pred.count("=") != gt.count("="):
        return False  # an equation is no number: "80+150=230" did not pass for 230
    if pred.count("=") == 1:
        sides = [f"{left}-({right})" for left, right in (pred.split("="), gt.split("="))]
        return symbolic(sides[0], sides[1]) or symbolic(f"-({sides[0]})", sides[1])
    return symbolic(pred, gt)


def symbolic(pred, gt):
    """math-verify's verdict: both read as LaTeX or plain expressions, compared by sympy. Its own time-outs are off."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = (LatexExtractionConfig(), ExprExtractionConfig())
    sides = [re.sub(r"(?<=\d)\(", r"\\cdot(", side) for side in (gt, pred)]  # 2(3) is a product
    parsed = [parse(f"${side}$", extraction_config=config, parsing_timeout=None) for side in sides]
    return bool(verify(*parsed, timeout_seconds=None))


# ---------------------------------------------------------------------------------------------------------------------
# workers: a process each; one comparison in, one verdict out, as lines of JSON


def work():
    """The worker's side: answer comparisons [pred, gt, strict, seconds] from stdin until it closes."""
    import logging
    import resource

    import math_verify  # noqa: F401  now, so that no comparison pays for the import

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError):
        pass  # macOS has no such limit
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pred, gt, strict, seconds = json.loads(line)
        signal.setitimer(
            signal.ITIMER_PROF, seconds
        )  # its default action ends the process, even in a long C call
        try:
            reply = [equal(pred, gt, strict), ""]
        except Exception as error:
            reply = [False, f"not comparable ({type(error).__name__})"]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)


def start_worker():
    """A worker process that is ready for its first comparison."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "evaluation.grading"],
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if read_line(worker, 600)[0].strip() != "ready":
        stop_worker(worker)
        raise UserError(
            "grading: got a worker process that does not start, wanted math-verify to be importable; "
            "pip install -r requirements.txt"
        )
    return worker


def stop_worker(worker):
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        try:
            pipe.close()
        except BrokenPipeError:
            pass  # a line that it never read


def read_line(worker, seconds):
    """(line, timed_out): the worker's next line, "" when it died or, after `seconds`, was killed."""
    expired = threading.Event()
    timer = threading.Timer(seconds, lambda: (expired.set(), worker.kill()))
    timer.start()
    try:
        line = worker.stdout.readline()
    finally:
        timer.cancel()
    return (line, False) if line.endswith("\n") else ("", expired.is_set())


def ask(slot, pred, gt, strict, seconds):
    """(equal, reason) from the worker in the one-element list `slot`; a worker that died is replaced at the next call.

    The reason is "" for a verdict, else why there is none (and equal is False).
    """
    slot[0] = slot[0] or start_worker()
    try:
        slot[0].stdin.write(json.dumps([pred, gt, strict, seconds]) + "\n")
        slot[0].stdin.flush()
        line, expired = read_line(slot[0], PATIENCE * seconds)
    except OSError:  # it died between two comparisons
        line, expired = "", False
    if line:
        return tuple(json.loads(line))
    worker, slot[0] = slot[0], None
    stop_worker(worker)
    expired = expired or worker.returncode == -signal.SIGPROF
    return (
        False,
        f"no verdict within {seconds:g} s"
        if expired
        else f"worker died (exit code {worker.returncode})",
    )


# ---------------------------------------------------------------------------------------------------------------------
# grading


def judge(slot, pred, gt, seconds=SECONDS):
    """(published, strict, reason) for two normalised answers; reason says why there was no comparison, or is ""."""
    reason = ""
    published = cheap(pred, gt)
    if published is None:
        published, reason = ask(slot, pred, gt, False, seconds)
    strict = published and cheap(pred, gt, strict=True)
    if strict is None:
        strict, reason = ask(slot, pred, gt, True, seconds)
    if not published and len(pred) > MAX_CHARS:
        reason = f"answer of {len(pred)} characters"
    return bool(published), bool(strict), reason


def verdict(slot, task, text, gt, seconds=SECONDS):
    """One sample's {pred, gt, published, strict, reason}. Never raises on account of the text or the truth."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text or "")
    if check(task).choice:
        pred, gt = extract(text, choice=True), str(gt).strip().upper()
        published, reason = pred == gt != "", "" if pred else "no answer found"
        first = re.search(r"answer is \(?[a-e](.?)", choice_text(text))
        strict = published and not first[1].isalpha()  # "the answer is correct" names no letter
    else:
        answer = extract(text)
        pred, gt = normalize(answer), normalize(gt)
        published, strict, reason = (
            judge(slot, pred, gt, seconds) if answer else (False, False, "no answer found")
        )
    return {"pred": pred, "gt": gt, "published": published, "strict": strict, "reason": reason}


_slot = [None]  # the worker of grade(), started when first needed
atexit.register(lambda: _slot[0] and stop_worker(_slot[0]))


def grade(task, text, gt, seconds=SECONDS):
    """(pred, published, strict) for one generation (str, or bytes of any kind) against a true answer.

    pred is the normalised answer. A comparison that takes longer than `seconds`, or dies, counts as wrong.
    Raises UserError for an unknown task or where math-verify is missing, and nothing for any text.
    """
    result = verdict(_slot, task, text, gt, seconds)
    return result["pred"], result["published"], result["strict"]


def grade_many(task, pairs, workers=None, seconds=SECONDS):
    """Verdicts for a list of (text, gt), in its order: dicts with pred, gt, published, strict and reason.

    reason is "" or why a sample has no comparison (and is wrong): time-out, dead worker, no answer. workers: processes,
    by default one per core up to 8. Raises UserError as grade() does.
    """
    return spread(
        lambda slot, pair: verdict(slot, task, *pair, seconds), pairs, workers, f"grading {task}"
    )


def spread(function, items, workers, title):
    """[function(slot, item) for item in items] on several workers at once, each of them one slot."""
    workers = workers or min(8, os.cpu_count() or 1)
    slots, free = [[None] for _ in range(workers)], SimpleQueue()
    for slot in slots:
        free.put(slot)

    def one(item):
        slot = free.get()
        try:
            return function(slot, item)
        finally:
            free.put(slot)

    pool = ThreadPoolExecutor(workers)
    try:
        return list(
            tqdm(pool.map(one, items), total=len(items), desc=title, unit="sample", leave=False)
        )
    finally:
        pool.shutdown(cancel_futures=True)
        for slot in slots:
            if slot[0]:
                stop_worker(slot[0])


if __name__ == "__main__":
    work()
