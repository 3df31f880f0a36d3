"""Which documents hold a problem of a test set?

    Decontaminator([("gsm8k", 0, "Janet's ducks lay ..."), ...]).problems_in(text)

A document is contaminated if it shares a run of 13 words with a problem's question. A question of
8 to 12 words must stand in it whole; shorter ones cannot be checked and are counted. Words are runs
of letters and digits, without case, so spacing and punctuation make no difference. Memory holds the
problems' runs of words, never the documents.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict

N = 13  # words of a run
SHORTEST = 8  # words of a question that can be checked
PROBE = 4  # words that are looked up first ...
STRIDE = SHORTEST - PROBE + 1  # ... every so many: a run of SHORTEST words holds one of them whole
assert SHORTEST == 2 * PROBE
LETTERS = bytes(byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256))
NO_LETTER = re.compile(r"[^\w\x00-\x7f]+")  # beyond ASCII


def words_of(text):
    """The runs of letters and digits, without case, as UTF-8: [b"one", b"two"].

    Bytes, for the sake of speed.
    """
    if text.isascii():
        text = text.lower()
    else:
        text = NO_LETTER.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return text.encode().translate(LETTERS).split()


class Decontaminator:
    """Knows the runs of words of `problems`: [(task, number, question)].

    Attributes: `checked` and `uncheckable` (too short), both {task: questions}; `hash`.
    """

    def __init__(self, problems):
        self.runs = defaultdict(set)  # {run: {(task, number)}}
        self.probes = set()  # every run of PROBE words of every problem
        self.checked = Counter()
        self.uncheckable = Counter()
        digest = hashlib.sha256(f"{N} {SHORTEST}".encode())
        for task, number, question in problems:
            words = words_of(question)
            digest.update(b" ".join([task.encode(), *words, b"\n"]))
            if len(words) < SHORTEST:
                self.uncheckable[task] += 1
                continue
            self.checked[task] += 1
            for run in runs_of(words, min(N, len(words))):
                self.runs[run].add((task, number))
            self.probes.update(runs_of(words, PROBE))
        self.lengths = sorted({run.count(b" ") + 1 for run in self.runs})
        self.hash = digest.hexdigest()

    def problems_in(self, text):
        """{(task, number)} of the problems that a text holds."""
        words = words_of(text)
        found = set()
        # Every STRIDE-th probe is looked up, which is enough to meet any run of SHORTEST words.
        looked = -1  # runs that start up to here were looked at closely
        for i in range(0, len(words) - PROBE + 1, STRIDE):
            probe = b" ".join(words[i : i + PROBE])
            if probe in self.probes and self.likely_around(words, i):
                for start in range(max(looked + 1, i - N + 1), i + 1):
                    found |= self.problems_at(words, start)
                looked = i
        return found

    def likely_around(self, words, i):
        """Can a run of SHORTEST words around word i be a problem's?

        Then both its halves are probes. Most chance hits of one probe end here, at little cost.
        """
        for start in range(max(0, i - PROBE), i + 1):
            middle = start + PROBE
            first = b" ".join(words[start:middle])
            second = b" ".join(words[middle : start + SHORTEST])
            if first in self.probes and second in self.probes:
                return True
        return False

    def problems_at(self, words, start):
        """{(task, number)} of the problems with a run that begins here at word `start`."""
        found = set()
        for length in self.lengths:
            if start + length <= len(words):
                run = b" ".join(words[start : start + length])
                found |= self.runs.get(run, set())
        return found


def runs_of(words, length):
    """Every run of so many words."""
    for i in range(len(words) - length + 1):
        yield b" ".join(words[i : i + length])
