"""Seconds of calls that take turns, and ratios within a round: the machine's moods cancel out."""

import random
import statistics
import time

import torch


def timed(run, args, env):
    """Seconds that one call of `run` takes.

    On CPU with one thread they are CPU seconds, so that other work on the machine hardly counts.
    """
    on_gpu = env.device.type == "cuda"
    if not on_gpu and args.threads == 1:
        clock = time.process_time
    else:
        clock = time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def interleaved(runs, args, env):
    """{name: [seconds of each round]} of the callables in `runs`, after one round of warm-up.

    Every round calls all of them, in an order of its own.
    """
    seconds = {name: [] for name in runs}
    for i in range(1 + args.repeats):
        order = random.Random(i).sample(list(runs), len(runs))
        for name in order:
            took = timed(runs[name], args, env)
            if i > 0:
                seconds[name].append(took)
    return seconds


def ratio(times, base):
    """Median, lowest and highest of the rounds' ratios times / base."""
    each = [a / b for a, b in zip(times, base)]
    return statistics.median(each), min(each), max(each)
