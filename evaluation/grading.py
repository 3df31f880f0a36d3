"""Verdicts on a model's answers: what was answered, and is it the true answer?

    pred, published, strict = grade("gsm8k", "... The answer is 18.", "18")
    python eval_math.py --regrade outputs.jsonl --tasks math --out DIR   # a whole file, no model

`published` follows the rules behind the Rho-1 paper's numbers: a percent may be 100 times off,
brackets of one kind pass for another, units and names do not count. `strict` holds only where the
answer as it was written is right without that help; it is never laxer.

answers.py reads what was answered, equality.py compares by the published rules, strict.py by the
strict ones, worker.py runs what needs algebra.
"""

import atexit
import os
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue
from threading import Lock

from tqdm import tqdm

from evaluation.answers import (
    ANOTHER,
    MAX_CHARS,
    as_written,
    behind_hashes,
    extract,
    normalize,
    one_letter,
)
from evaluation.equality import cheap
from evaluation.strict import quick
from evaluation.tasks import task_of
from evaluation.worker import SECONDS, Worker

# --------------------------------------------------------------------------------------------------
# one sample


def verdict(worker, task, text, gt, seconds=SECONDS, truth=None):
    """One sample's {pred, gt, published, strict, reason}. Never raises because of text or truth.

    truth: the true answer as it was written, where gt has lost something (a unit, say).
    seconds: processor time for a comparison that needs algebra.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = str(text or "")
    gt = as_text(gt)
    spec = task_of(task)
    if spec.choice:
        return choice_verdict(text, gt.strip().upper())
    if spec.own:
        return own_verdict(text, gt)
    written = as_written(text), gt if truth is None else as_text(truth)
    gt = normalize(gt)
    answer = extract(text)
    if not answer:
        return result("", gt, False, False, "no answer found")
    pred = normalize(answer)
    found = result(pred, gt, *judge(worker, pred, gt, seconds, written))
    return found if written[1] == gt else found | {"truth": written[1]}


def as_text(truth):
    try:
        return str(truth)
    except ValueError:  # an int of thousands of digits
        return hex(truth)


def result(pred, gt, published, strict, reason):
    return {"pred": pred, "gt": gt, "published": published, "strict": strict, "reason": reason}


def choice_verdict(text, gt):
    """Of a multiple-choice task: letters are compared."""
    pred = extract(text, choice=True)
    if not pred:
        return result("", gt, False, False, "no answer found")
    published = pred == gt
    return result(pred, gt, published, published and one_letter(text) == pred, "")


def own_verdict(text, gt):
    """Of a file of one's own: the number behind #### must be the true one.

    Strictly, it must not be a part of another number ("7/8") or stand beside another answer ("7 or
    8").
    """
    pred, alone, after = behind_hashes(text)
    alone = alone and not ANOTHER.search(after)
    right = pred != "" and pred == gt.replace(",", "")
    reason = "" if pred else "no answer found"
    return result(pred, gt, right, right and alone, reason)


def judge(worker, pred, gt, seconds=SECONDS, written=None):
    """(published, strict, reason) for two normalised answers.

    written: answer and truth before they were normalised, for `strict`; by default pred and gt.
    reason: why there was no comparison, or "".
    """
    reason = ""
    published = cheap(pred, gt)
    if published is None:
        published, reason = worker.compare(pred, gt, False, seconds)
    strict = published and quick(*(written or (pred, gt)))
    if strict is None:
        strict, reason = worker.compare(*(written or (pred, gt)), True, seconds)
    if not published and len(pred) > MAX_CHARS:
        reason = f"answer of {len(pred)} characters"
    return bool(published), bool(strict), reason


_worker = Worker()  # of grade(), started when first needed
atexit.register(_worker.stop)


def grade(task, text, gt, seconds=SECONDS):
    """(pred, published, strict) for one generation (str, or bytes of any kind).

    pred: the normalised answer. A comparison that takes longer, or dies, counts as wrong.
    Raises UserError for an unknown task or where math-verify is missing, and nothing for any text.
    """
    found = verdict(_worker, task, text, gt, seconds)
    return found["pred"], found["published"], found["strict"]


# --------------------------------------------------------------------------------------------------
# many samples


def grade_many(task, pairs, workers=None, seconds=SECONDS):
    """Verdicts for a list of (text, gt) or (text, gt, truth), in its order: see `verdict`.

    workers: processes, by default one per core up to 8. Raises UserError as grade() does.
    """

    def one(worker, pair):
        text, gt, *truth = pair
        return verdict(worker, task, text, gt, seconds, *truth)

    return spread(one, pairs, f"grading {task}", workers)


def spread(function, items, title, workers=None):
    """[function(worker, item) for item in items], on several workers at once."""
    with Pool(workers) as pool:
        done = [pool.submit(function, item) for item in items]
        bar = tqdm(done, desc=title, unit="sample", leave=False)
        return [future.result() for future in bar]


class Pool:
    """Workers, by default one per core up to 8. Each starts when it is first asked."""

    def __init__(self, n=None):
        n = n or min(8, os.cpu_count() or 1)
        self.workers = [Worker() for _ in range(n)]
        self.free = LifoQueue()  # one starts only when all that have are busy
        for worker in self.workers:
            self.free.put(worker)
        self.threads = ThreadPoolExecutor(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.stop()

    def submit(self, function, *arguments):
        """A future of function(worker, *arguments)."""
        return self.threads.submit(self._run, function, arguments)

    def _run(self, function, arguments):
        worker = self.free.get()
        try:
            return function(worker, *arguments)
        finally:
            self.free.put(worker)


class Grader:
    """Grades answers beside the decoding: some comparisons take seconds.

    An answer's key is (place of its problem, number of the sample).
    """

    def __init__(self, task, examples, main=True):
        """`main`: on the other ranks nothing is graded, the first one grades all answers."""
        self.main = main
        self.task = task
        self.examples = examples
        self.pool = Pool()
        self.verdicts = {}  # by key; of futures
        self.counting = Lock()
        self.graded = 0
        self.right = 0

    def __enter__(self):
        spec = task_of(self.task)
        needs_algebra = not (spec.choice or spec.own)
        if self.main and needs_algebra:  # before anything is decoded: it may be missing
            self.pool.workers[-1].start()  # the first that is asked
        return self

    def __exit__(self, *_):
        self.pool.__exit__()

    def add(self, key, text):
        """Queue the text of an answer."""
        if self.main:
            self.verdicts[key] = self.pool.submit(self.grade, text, self.examples[key[0]])

    def grade(self, worker, text, example):
        found = verdict(worker, self.task, text, example.gt, truth=example.truth_raw)
        with self.counting:
            self.graded += 1
            self.right += found["published"]
        return found

    def accuracy(self):
        """Per cent of the answers graded so far, as text."""
        return f"{100 * self.right / max(self.graded, 1):.1f}%"

    def verdict(self, key):
        """An answer's verdict, waited for."""
        return self.verdicts[key].result()
