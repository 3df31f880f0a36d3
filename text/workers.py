"""Worker processes for prepare.py, which give their results in order.

`in_order` hands one job of reading.py after the other to them, and gives the pieces in the jobs'
order: the token set is the same for any number of workers.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from common.errors import UserError

preparation = None  # a worker process's own


def start_worker(shared):
    global preparation
    preparation = shared
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reading process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def work(job):
    return preparation.piece(job)


def in_order(jobs, workers, shared):
    """shared.piece(job) for each job, in the jobs' order.

    At most 2 * workers + 1 of them are under way. Raises UserError.
    """
    if workers == 1:
        yield from map(shared.piece, jobs)
        return
    # A forked worker shares the tokenizer's memory; elsewhere each one loads it.
    way = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(way)
    pool = ProcessPoolExecutor(workers, context, start_worker, (shared,))
    under_way = deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(work, job))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: a worker process was killed, perhaps for lack of memory; the "
            f"same command with fewer --workers goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
