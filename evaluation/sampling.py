"""Several samples of each problem: how tokens are drawn, and what is counted in the answers.

Each token has a number of its own in [0, 1) that follows from seed, problem, sample and place. So a
sample is the same in any batch, in any order, and when a run goes on after an interruption.
"""

import hashlib
import math
from collections import Counter

import torch

NOT_FINITE = -1  # in place of an id


def chance(seed, key, position):
    """The number in [0, 1) of the token at `position` of the row `key`."""
    digest = hashlib.blake2b(f"{seed} {key} {position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32


def draw(logits, temperature, chances):
    """An id for each row of logits (B, V): the one in whose share of [0, 1) its number lies, (B,).

    chances: the rows' numbers, (B,) fp64. NOT_FINITE where a logit is nan or +inf.
    """
    ends = (logits.double() / temperature).softmax(-1).cumsum(-1)
    wanted = chances[:, None] * ends[:, -1:]
    ids = torch.searchsorted(ends, wanted, right=True)[:, 0]
    return ids.where(ends[:, -1].isfinite(), NOT_FINITE)


def likeliest(logits):
    """The first of the highest in each row of logits (B, V), (B,); NOT_FINITE as in `draw`."""
    ids = logits.argmax(-1)  # of a nan, where there is one
    highest = logits.gather(-1, ids[:, None])[:, 0]
    return ids.where(highest.isfinite(), NOT_FINITE)


# --------------------------------------------------------------------------------------------------
# what is counted


def sizes(n):
    """The k of pass@k and maj@k for n samples: 1, 2, 4, ... and n itself."""
    return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})


def pass_at(k, right):
    """pass@k of one problem: the chance that one of k of its samples is right.

    right: a truth value for each sample. Without bias (Chen et al. 2021, arXiv 2107.03374,
    equation 1): the share of all choices of k samples that hold a right one.
    """
    n, wrong = len(right), len(right) - sum(right)
    return 1 - math.comb(wrong, k) / math.comb(n, k)


def maj_at(k, answers, right):
    """maj@k of one problem: how often the answer that most of k samples give is right.

    The mean over the groups of k samples that follow each other; what is left over is not used.
    """
    groups = [range(at, at + k) for at in range(0, len(answers) - k + 1, k)]
    votes = [vote([answers[i] for i in group]) for group in groups]
    won = [right[group[place]] for group, place in zip(groups, votes) if place is not None]
    return sum(won) / len(groups)


def vote(answers):
    """The place of the first of the most frequent answers; None where there is none.

    "" is no answer. Of equally frequent ones the one that came first wins.
    """
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return None
    most = max(counts.values())
    return next(i for i, answer in enumerate(answers) if counts[answer] == most)


def summarize(problems):
    """{"samples", "pass": {k: shares}, "maj": {k: shares}} of [[verdict of each sample]].

    shares: {published, published_se, strict, strict_se} in percent, over the problems.
    """
    n = len(problems[0])
    found = {"samples": n, "pass": {}, "maj": {}}
    for k in sizes(n):
        passed, voted = {}, {}
        for name in ("published", "strict"):
            right = [[verdict[name] for verdict in verdicts] for verdicts in problems]
            answers = [[verdict["pred"] for verdict in verdicts] for verdicts in problems]
            passed |= percent(name, [pass_at(k, each) for each in right])
            voted |= percent(name, [maj_at(k, *pair) for pair in zip(answers, right)])
        found["pass"][str(k)] = passed
        found["maj"][str(k)] = voted
    return found


def percent(name, shares):
    """{NAME, NAME_se}: the mean of the problems' shares and its standard error, in percent."""
    n = max(len(shares), 1)
    mean = sum(shares) / n
    variance = sum(share * share for share in shares) / n - mean * mean
    error = math.sqrt(max(variance, 0) / n)
    return {name: round(100 * mean, 2), f"{name}_se": round(100 * error, 2)}
