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

BYTES = 16 << 20  # of records that are under way, for each worker

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

    At most 2 * workers + 1 of them are under way; fewer where their records are long. Raises
    UserError.
    """
    if workers == 1:
        yield from map(shared.piece, jobs)
        return
    # A forked worker shares the tokenizer's memory; elsewhere each one loads it.
    way = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(way)
    pool = ProcessPoolExecutor(workers, context, start_worker, (shared,))
    under_way = deque()  # (bytes of a job's records, its piece to come)
    n_bytes = 0
    most = BYTES * workers
    try:
        for job in jobs:
            while under_way and (len(under_way) > 2 * workers or n_bytes + job.n_bytes > most):
                size, piece = under_way.popleft()
                n_bytes -= size
                yield piece.result()
            under_way.append((job.n_bytes, pool.submit(work, job)))
            n_bytes += job.n_bytes
            del job  # a long one is not kept until the next
        while under_way:
            yield under_way.popleft()[1].result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: a worker process was killed, perhaps for lack of memory; the "
            f"same command with fewer --workers goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
