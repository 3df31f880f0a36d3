"""What prepare.py's workers do: documents -> token ids, masks and labels, in parallel and in order.

`in_order` runs `tokenise` on one job of reading.py after the other, in --workers processes, and gives the results in the
jobs' order: the token set is the same for any number of workers.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from common.errors import UserError
from demo import corpus
from hf.tokenizer import Tokenizer
from text import reading

UNLABELLED = "unlabelled"  # kind of the tokens of a source without labels


def start_worker(tokenizer, todo, options):
    """Keep what a worker needs beside its jobs. tokenizer: a Tokenizer, or the folder where it is saved."""
    tokenise.shared = (
        tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer),
        todo,
        options,
    )
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reading process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenise(job):
    """One job -> ({array: its piece}, {"documents", "bytes", "bad": counts}, the job without its records).

    Raises UserError for a broken record or a damaged file."""
    if "error" in job:
        raise UserError(job["error"])
    tokenizer, todo, options = tokenise.shared
    source, arrays = todo[job["source"]], options["arrays"]
    if source["type"] == "set":
        pieces, counts = copy_set(job, source, options)
    else:
        made = (
            demo_pages(job, source, tokenizer, options)
            if source["type"] == "demo"
            else file_documents(job, source, tokenizer, options)
        )
        front, pieces = options["front"], {name: [] for name in arrays}
        counts = {"documents": 0, "bytes": 0, "bad": int("damage" in job), "contaminated": 0}
        for document in made:
            if document is None or document == "contaminated":
                counts["contaminated" if document else "bad"] += 1
                continue
            ids, n_bytes, mask, kind = document
            counts["documents"] += 1
            counts["bytes"] += n_bytes
            pieces["tokens"] += front, ids, options["end"]
            if "loss_mask" in arrays:
                mask = np.ones(len(ids) + 1, np.uint8) if mask is None else mask
                pieces["loss_mask"] += np.zeros(len(front), np.uint8), mask
            if "kind" in arrays:
                unlabelled = (
                    np.full(len(front) + len(ids) + 1, options["kinds"].index(UNLABELLED))
                    if kind is None
                    else kind
                )
                pieces["kind"].append(unlabelled)
        dtypes = {"tokens": np.uint32, "loss_mask": np.uint8, "kind": np.uint8}
        pieces = {
            name: np.concatenate(pieces[name] or [[]]).astype(dtypes[name]) for name in arrays
        }
    return pieces, counts, {key: value for key, value in job.items() if key != "records"}


def file_documents(job, source, tokenizer, options):
    """(ids, bytes, loss mask of ids and EOS or None, None) of each record; None for a broken one, "contaminated" for one
    that --decontaminate leaves out."""
    check = options.get("decontaminator")
    for texts in reading.documents(source, job, options["skip_bad"]):
        if texts is None:
            yield None
            continue
        text = "".join(texts)
        if check and check.problems_in(text):
            yield "contaminated"
            continue
        ids, mask = tokenizer.encode(text), None
        if len(texts) > 1 and (options["mask_prompt"] or source["form"] == "chat"):
            mask = targets(texts, ids, tokenizer)
        yield ids, len(text.encode()), mask, None


def targets(texts, ids, tokenizer):
    """Which of a document's tokens and its EOS are to be learnt, (len(ids) + 1,), where its texts are so by turns. What
    belongs to the texts before a border is what is the same whatever comes after it: a token that reaches across a border,
    such as from a prompt into a response, belongs to what comes after."""
    mask, start, before = np.zeros(len(ids) + 1, np.uint8), 0, ""
    for learnt, text in enumerate(texts[:-1]):
        before += text
        alone = tokenizer.encode(before)
        length = min(len(alone), len(ids))
        differs = np.flatnonzero(alone[:length] != ids[:length])
        end = max(start, int(differs[0]) if len(differs) else length)
        mask[start:end], start = learnt % 2, end
    mask[start:] = (len(texts) - 1) % 2
    return mask


def demo_pages(job, source, tokenizer, options):
    """(ids, bytes, None, kinds) of each generated page: a token has the kind of the span that its first byte lies in."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)])
    for i in job["records"]:
        spans = corpus.page(source["path"], options["seed"], i)
        text = "".join(text for text, _ in spans)
        ids = tokenizer.encode(text)
        ends = np.cumsum([len(text.encode()) for text, _ in spans])
        starts = np.cumsum(lengths[ids]) - lengths[ids]
        kind = np.array([kind for _, kind in spans])[np.searchsorted(ends, starts, side="right")]
        yield ids, len(text.encode()), None, np.append(kind, corpus.END_OF_TEXT)


def copy_set(job, source, options):
    """A piece of a token set: what it lacks is filled in, its kinds are renumbered."""
    tokens, piece = reading.open_set(source["path"]), slice(job["first"], job["next"])
    length = piece.stop - piece.start
    pieces = {"tokens": tokens.tokens[piece]}
    if "loss_mask" in options["arrays"]:
        pieces["loss_mask"] = (
            np.ones(length, np.uint8) if tokens.loss_mask is None else tokens.loss_mask[piece]
        )
    if "kind" in options["arrays"]:
        names, kind = [UNLABELLED], np.zeros(length, np.uint8)
        if tokens.kind is not None:
            names, kind = tokens.kinds, tokens.kind[piece]
        pieces["kind"] = np.array([options["kinds"].index(name) for name in names], np.uint8)[kind]
    size = tokens.meta.get("text_bytes", 0)
    counts = {
        "documents": int(np.count_nonzero(pieces["tokens"] == options["end"][0])),
        "bad": 0,
        "contaminated": 0,
        "bytes": size * piece.stop // tokens.count - size * piece.start // tokens.count,
    }
    return pieces, counts


def in_order(jobs, workers, shared):
    """tokenise(job) for each job, in the jobs' order, with at most 2 * workers + 1 of them under way."""
    if workers == 1:
        start_worker(*shared)
        yield from map(tokenise, jobs)
        return
    fork = sys.platform == "linux"  # a forked worker shares the tokenizer, others load it
    if not fork:
        shared = shared[2]["folder"], *shared[1:]
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork" if fork else "spawn"), start_worker, shared
    )
    under_way = deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(tokenise, job))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: a worker process was killed, perhaps for lack of memory; the same "
            f"command with fewer --workers goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
