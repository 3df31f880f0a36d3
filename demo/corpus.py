"""The embedded default's text: noisy "web mathematics", generated, every span labelled with its kind.

A page is a list of spans `(text, kind)`, kind an index into KINDS. It is a pure function of (set, seed, i), so any
number of workers writes the same data. The labels never reach training: they only show which kinds SLM keeps.

    base     noisy pages that the base model (the start of reference and student alike) was pre-trained on
    corpus   more noisy pages of the same distribution: what CLM and SLM continue on
    curated  clean problems, but of the COVERED templates only: a curated set never spans the whole task
    val      clean problems of every template: the distribution that the student is meant to learn

A problem is a key (template, a, b, c). Which split a key belongs to is drawn from the key alone, so nothing in `val`
or in the test problems can occur in a training page, whatever the seed.

    python demo/corpus.py               # print a few pages
"""

import random
from functools import cache

KINDS = [
    "problem",
    "solution",
    "wrong_digits",
    "after_error",
    "typo",
    "id_hash",
    "number_table",
    "boilerplate",
    "chatter",
    "end_of_text",
]
(
    PROBLEM,
    SOLUTION,
    WRONG_DIGITS,
    AFTER_ERROR,
    TYPO,
    ID_HASH,
    NUMBER_TABLE,
    BOILERPLATE,
    CHATTER,
    END_OF_TEXT,
) = range(10)
CLEAN = (
    PROBLEM,
    SOLUTION,
    AFTER_ERROR,
    END_OF_TEXT,
)  # after an error the steps still follow from what is written

PAGES = {"base": 14200, "corpus": 18900, "curated": 800, "val": 300}  # about 66 tokens a noisy page
PAGE_MIX = {
    "problem": 0.76,
    "ids": 0.06,
    "table": 0.06,
    "boilerplate": 0.06,
    "chatter": 0.06,
}  # shares of noisy pages
P_WRONG, P_TYPOS, P_HEADER, P_FOOTER = 0.6, 0.2, 0.4, 0.3  # of a noisy problem page

OPERANDS = range(2, 10)
FIRST = {
    "+": OPERANDS,
    "-": range(12, 20),
}  # the first number, by step 1: a difference needs a larger one
TEST_SHARE, VAL_SHARE = 0.24, 0.08  # of the problem keys
STARTS = [  # the first sentence, and step 1
    ("{n} has {a} {o} and buys {b} more.", "a+b"),
    ("{n} had {a} {o} and lost {b}.", "a-b"),
    ("A box holds {a} red and {b} blue {o}.", "a+b"),
    ("{n} picked {a} {o} on Monday and {b} on Friday.", "a+b"),
]
ENDS = [  # the rest, and step 2; x is the result of step 1
    ("Then {m} takes {c} away. How many {o} are left?", "x-c"),
    ("Then {m} brings {c} more. How many {o} is that now?", "x+c"),
    ("After that {c} {o} are sold. How many {o} remain?", "x-c"),
]
TEMPLATES = [(start + " " + end, step1, step2) for start, step1 in STARTS for end, step2 in ENDS]
COVERED = (
    0,
    1,
    4,
    5,
    8,
    9,
)  # templates of the curated set: every sentence of STARTS and ENDS, but 6 of the 12 pairs

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ian Joy Kai Lena Milo Nora Otto Pia Ron Sue Tim Uma".split()
)
OBJECTS = "apples pens coins shells cards stamps eggs cakes balls books".split()
HEX, UPPER = "0123456789abcdef", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS = UPPER.lower()
BASE64 = UPPER + LETTERS + "0123456789+/"
BANNERS = [
    "Home | Forum | About us | Log in | Help\n",
    "This site uses cookies. Accept all or change your settings.\n",
    "All rights reserved. Terms of use. Privacy policy.\n",
    "Share: Facebook Twitter Email Print\n",
    "Join our newsletter and never miss a lesson!\n",
    "Please enable JavaScript to load the comments.\n",
]
CHAT = [
    ["lol", "so", "well", "btw", "hmm", "ok"],
    [
        "my sister",
        "the coach",
        "that dog",
        "some guy",
        "her phone",
        "the train",
        "our band",
        "this game",
    ],
    [
        "really liked",
        "never saw",
        "forgot about",
        "talked about",
        "is waiting for",
        "broke",
        "hated",
        "wants",
    ],
    [
        "the old car",
        "dinner",
        "a new song",
        "last summer",
        "the match",
        "nothing",
        "green tea",
        "homework",
    ],
    [".", "!", "...", " :)"],
]


def split_of(key):
    """'train', 'val' or 'test': drawn from the key (template, a, b, c) and nothing else."""
    u = random.Random(f"split {key}").random()
    return "test" if u < TEST_SHARE else "val" if u < TEST_SHARE + VAL_SHARE else "train"


def compute(left, op, right):
    return left + right if op == "+" else left - right


def solve(key):
    """[(left, op, right, result), (left, op, right, result)]: the two steps of a problem, ints and one character."""
    values, steps = dict(zip("abc", key[1:])), []
    for left, op, right in TEMPLATES[key[0]][1:]:
        left, right = values[left], values[right]
        values["x"] = compute(left, op, right)
        steps.append((left, op, right, values["x"]))
    return steps


@cache
def keys(split):
    """For every template the shuffled tuple of its keys in `split`; no result of a step is below 1."""
    table = []
    for t in range(len(TEMPLATES)):
        every = [
            (t, a, b, c) for a in FIRST[TEMPLATES[t][1][1]] for b in OPERANDS for c in OPERANDS
        ]
        fit = [
            key
            for key in every
            if split_of(key) == split and all(step[3] > 0 for step in solve(key))
        ]
        table.append(tuple(random.Random(f"order {split} {t}").sample(fit, len(fit))))
    return tuple(table)


def question(rng, key):
    name, other = rng.sample(NAMES, 2)
    numbers = dict(zip("abc", key[1:]))
    return (
        "Q: "
        + TEMPLATES[key[0]][0].format(n=name, m=other, o=rng.choice(OBJECTS), **numbers)
        + "\nA:"
    )


def misprint(rng, value):
    """A wrong number in place of `value`: half of them near it, half anywhere below 100."""
    while True:
        wrong = (
            value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
            if rng.random() < 0.5
            else rng.randint(1, 99)
        )
        if wrong > 0 and wrong != value:
            return wrong


def wrong_number(right, wrong, kind):
    """Spans of the number `wrong`: only the digits from the first one that differs are labelled wrong."""
    right, wrong = str(right), str(wrong)
    same = next(
        (i for i, (r, w) in enumerate(zip(right, wrong)) if r != w), min(len(right), len(wrong)) - 1
    )
    return [(text, k) for text, k in ((wrong[:same], kind), (wrong[same:], WRONG_DIGITS)) if text]


def solution(rng, key, wrong):
    """Spans of the worked solution. Where `wrong`, one or two of its three numbers (the steps' results and the
    answer) are misprinted, and what comes later follows from the misprint."""
    misprinted = rng.choice(((0,), (1,), (2,), (0, 1), (1, 2))) if wrong else ()
    values, spans, kind = dict(zip("abc", key[1:])), [], SOLUTION
    for i, (left, op, right) in enumerate((*TEMPLATES[key[0]][1:], ("x", "", ""))):
        if op:
            left, right = values[left], values[right]
            spans.append((f" {left}{op}{right}=", kind))
            values["x"] = compute(left, op, right)
        else:
            spans.append((" #### ", kind))
        if i in misprinted:
            honest, values["x"] = values["x"], misprint(rng, values["x"])
            spans += wrong_number(honest, values["x"], kind)
            kind = AFTER_ERROR
        else:
            spans.append((str(values["x"]), kind))
        spans.append(("\n", kind))
    return spans


def some(rng, alphabet, n):
    return "".join(rng.choice(alphabet) for _ in range(n))


def id_line(rng):
    style = rng.randrange(4)
    if style == 0:
        return f"sha1 {some(rng, HEX, 24)}\n"
    if style == 1:
        return f"sid={some(rng, BASE64, 22)}\n"
    if style == 2:
        return f"{some(rng, HEX, 8)}-{some(rng, HEX, 4)} {some(rng, UPPER, 6)}\n"
    return f"key: {some(rng, BASE64, 30)}==\n"


def number_table(rng):
    columns = rng.randint(3, 5)
    row = lambda: (
        "|".join(str(rng.randrange(10 ** rng.randint(2, 5))) for _ in range(columns)) + "\n"
    )
    return "".join(row() for _ in range(rng.randint(2, 4)))


def chatter(rng):
    sentence = lambda: "{} {} {} {}{} ".format(*map(rng.choice, CHAT))
    return "".join(sentence() for _ in range(rng.randint(2, 4))) + "\n"


def typos(rng, text):
    """Spans of `text` with about four words in ten damaged: letters only, the numbers stay."""
    spans = []
    for i, word in enumerate(text.split(" ")):
        kind = PROBLEM
        if len(word) > 2 and word.isalpha() and rng.random() < 0.4:
            kind, word = TYPO, list(word)
            for _ in range(max(1, len(word) // 3)):
                word[rng.randrange(len(word))] = rng.choice(LETTERS + "10|")
        spans.append((" " * (i > 0) + "".join(word), kind))
    return spans


def problem_page(rng, key):
    """A clean problem with its correct solution."""
    return [(question(rng, key), PROBLEM), *solution(rng, key, wrong=False)]


def noisy_page(rng):
    page = rng.choices(list(PAGE_MIX), PAGE_MIX.values())[0]
    if page == "ids":
        return [("".join(id_line(rng) for _ in range(rng.randint(2, 3))), ID_HASH)]
    if page == "table":
        return [(number_table(rng), NUMBER_TABLE)]
    if page == "boilerplate":
        return [("".join(rng.sample(BANNERS, rng.randint(2, 3))), BOILERPLATE)]
    if page == "chatter":
        return [(chatter(rng), CHATTER)]
    key, spans = rng.choice(rng.choice(keys("train"))), []
    if rng.random() < P_HEADER:
        date = f"20{rng.randint(10, 24)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        spans.append((f"#{some(rng, HEX, 8)} user_{some(rng, BASE64, 6)} {date}\n", ID_HASH))
    text = question(rng, key)
    spans += typos(rng, text) if rng.random() < P_TYPOS else [(text, PROBLEM)]
    spans += solution(rng, key, wrong=rng.random() < P_WRONG)
    if rng.random() < P_FOOTER:
        spans.append((f"[ref {some(rng, BASE64, 12)}]\n", ID_HASH))
    return spans


def page(name, seed, i):
    """Spans of page i of the set `name` ("base", "corpus", "curated" or "val"). The document is their joined text;
    whoever writes tokens puts the end-of-text token (kind END_OF_TEXT) after it.

    `val` is the same for every seed, and its problems are all different: one yardstick for every run. Raises KeyError
    for another name, IndexError where `val` has no problem i.
    """
    PAGES[name]
    rng = random.Random(f"{name} {0 if name == 'val' else seed} {i}")
    if name == "val":
        return problem_page(rng, keys("val")[i % len(TEMPLATES)][i // len(TEMPLATES)])
    if name == "curated":
        return problem_page(rng, rng.choice(keys("train")[rng.choice(COVERED)]))
    return noisy_page(rng)


def test_problems(n=1000):
    """n test problems, each another (template, a, b, c), equally many of every template, none of them in a training
    page; the same for every seed, so that exact matches compare. `answer` is the final number, what should follow
    "####". Raises IndexError where a template has too few keys."""
    problems = []
    for i in range(n):
        t = i % len(TEMPLATES)
        key = keys("test")[t][i // len(TEMPLATES)]
        problems.append(
            {
                "question": question(random.Random(f"test {i}"), key),
                "answer": str(solve(key)[-1][3]),
                "template": t,
                "covered": t in COVERED,
                "key": key,
            }
        )
    return problems


if __name__ == "__main__":
    for i in range(8):
        print("".join(f"[{KINDS[kind]}]{text}" for text, kind in page("corpus", 0, i)))
