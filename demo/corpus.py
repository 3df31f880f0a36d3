"""The demo's text: noisy "web mathematics", generated, with every span labelled by its kind.

A page is a list of spans (text, kind), where kind is an index into KINDS. It depends on its set,
the seed and its number alone, so any number of workers writes the same data. The labels never
reach training. They only show which kinds SLM keeps.

    base     noisy pages for pre-training the base model, from which reference and student start
    corpus   more noisy pages of the same distribution: what CLM and SLM continue on
    curated  clean problems of the COVERED templates: a curated set never spans the whole task
    val      clean problems of every template: the distribution that the student should learn

A problem is a key (template, a, b, c). Which split a key belongs to is drawn from the key alone.
So no problem of `val` or of the test occurs in a training page, whatever the seed.

    python demo/corpus.py               # print a few pages
"""

import itertools
import random
from functools import cache

KINDS = [
    "problem",  # a question as it should be
    "solution",  # steps and answer, as long as they are right
    "wrong_digits",  # of a misprinted number, from the first digit that differs
    "after_error",  # steps after a misprint: they still follow from what is written
    "typo",  # a damaged word of a question
    "id_hash",
    "number_table",
    "boilerplate",
    "chatter",
    "end_of_text",
]
PROBLEM, SOLUTION, WRONG_DIGITS, AFTER_ERROR, TYPO = range(5)
ID_HASH, NUMBER_TABLE, BOILERPLATE, CHATTER, END_OF_TEXT = range(5, 10)

PAGES = {"base": 14200, "corpus": 18900, "curated": 800, "val": 300}  # a noisy page: 66 tokens
PAGE_MIX = {"problem": 0.76, "ids": 0.06, "table": 0.06, "boilerplate": 0.06, "chatter": 0.06}
# Shares of the noisy problem pages
P_WRONG = 0.75
P_TYPOS = 0.2
P_HEADER = 0.4
P_FOOTER = 0.3
# Shares of the problem keys
TEST_SHARE = 0.24
VAL_SHARE = 0.08

# ------------------------------------------------------------------------------------------------
# What problems and noise are made of

OPERANDS = range(2, 10)
# The first number, by the operator of step 1: a difference needs a larger one.
FIRST = {"+": OPERANDS, "-": range(12, 20)}
# The first sentence, and step 1.
STARTS = [
    ("{n} has {a} {o} and buys {b} more.", "a+b"),
    ("{n} had {a} {o} and lost {b}.", "a-b"),
    ("A box holds {a} red and {b} blue {o}.", "a+b"),
    ("{n} picked {a} {o} on Monday and {b} on Friday.", "a+b"),
]
# The rest, and step 2. x is the result of step 1.
ENDS = [
    ("Then {m} takes {c} away. How many {o} are left?", "x-c"),
    ("Then {m} brings {c} more. How many {o} is that now?", "x+c"),
    ("After that {c} {o} are sold. How many {o} remain?", "x-c"),
]
TEMPLATES = [
    (f"{start} {end}", step1, step2)  # text, steps
    for start, step1 in STARTS
    for end, step2 in ENDS
]
# Templates of the curated set: each sentence of STARTS and ENDS, but 6 of the 12 pairs.
COVERED = (0, 1, 4, 5, 8, 9)
# Which of a wrong solution's three numbers are misprinted: two results and the answer.
MISPRINTED = ((0,), (1,), (2,), (0, 1), (1, 2))

PEOPLE = "Ada Ben Cleo Dan Eva Finn Gus Hana Ian Joy Kai Lena Milo Nora Otto Pia Ron Sue Tim Uma"
NAMES = PEOPLE.split()
OBJECTS = "apples pens coins shells cards stamps eggs cakes balls books".split()

HEX = "0123456789abcdef"
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
OPENERS = "lol so well btw hmm ok".split()
SUBJECTS = "my sister,the coach,that dog,some guy,her phone,the train,our band,this game"
VERBS = "really liked,never saw,forgot about,talked about,is waiting for,broke,hated,wants"
THINGS = "the old car,dinner,a new song,last summer,the match,nothing,green tea,homework"
STOPS = [".", "!", "...", " :)"]
CHAT = [OPENERS, SUBJECTS.split(","), VERBS.split(","), THINGS.split(","), STOPS]


# ------------------------------------------------------------------------------------------------
# Problems. Each draw moves the generator on, so their order is part of what a page says.


def split_of(key):
    """'train', 'val' or 'test': drawn from the key (template, a, b, c) and nothing else."""
    u = random.Random(f"split {key}").random()
    if u < TEST_SHARE:
        return "test"
    if u < TEST_SHARE + VAL_SHARE:
        return "val"
    return "train"


def operands(key):
    """{"a": its number, "b": ..., "c": ...}"""
    return dict(zip("abc", key[1:]))


def calculate(step, values):
    """A step such as "x-c" in numbers: (left, operator, right, result)."""
    a, op, b = step
    left = values[a]
    right = values[b]
    result = left + right if op == "+" else left - right
    return left, op, right, result


def solve(key):
    """The two steps of a problem, [(left, operator, right, result)]."""
    values = operands(key)
    steps = []
    for step in TEMPLATES[key[0]][1:]:
        steps.append(calculate(step, values))
        values["x"] = steps[-1][3]
    return steps


def is_positive(key):
    return all(result > 0 for *_, result in solve(key))


@cache
def keys(split):
    """For every template the tuple of its keys in `split`, shuffled; no step goes below 1."""
    table = []
    for t, (_, step1, _) in enumerate(TEMPLATES):
        every = itertools.product([t], FIRST[step1[1]], OPERANDS, OPERANDS)
        fit = [key for key in every if split_of(key) == split and is_positive(key)]
        table.append(tuple(random.Random(f"order {split} {t}").sample(fit, len(fit))))
    return tuple(table)


def question(rng, key):
    """The question's text, with names and objects drawn."""
    name, other = rng.sample(NAMES, 2)
    objects = rng.choice(OBJECTS)
    text = TEMPLATES[key[0]][0].format(n=name, m=other, o=objects, **operands(key))
    return f"Q: {text}\nA:"


def misprint(rng, value):
    """A wrong number in place of `value`: half of them near it, half anywhere below 100."""
    while True:
        if rng.random() < 0.5:
            wrong = value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
        else:
            wrong = rng.randint(1, 99)
        if wrong > 0 and wrong != value:
            return wrong


def wrong_number(right, wrong, kind):
    """Spans of the number `wrong`. Its digits before the first one that differs are of `kind`.

    Where one number begins with the other, at least the last digit that they share is wrong.
    """
    right = str(right)
    wrong = str(wrong)
    same = 0
    while same < min(len(right), len(wrong)) - 1 and right[same] == wrong[same]:
        same += 1
    spans = [(wrong[:same], kind), (wrong[same:], WRONG_DIGITS)]
    return [(text, k) for text, k in spans if text]


def solution(rng, key, wrong):
    """Spans of the worked solution: two steps and the answer.

    Where `wrong`, one or two of the three numbers are misprinted (MISPRINTED), and what comes
    later follows from the misprint.
    """
    misprinted = rng.choice(MISPRINTED) if wrong else ()
    values = operands(key)
    kind = SOLUTION
    spans = []
    for i, step in enumerate((*TEMPLATES[key[0]][1:], "answer")):
        if step == "answer":
            spans.append((" #### ", kind))
        else:
            left, op, right, values["x"] = calculate(step, values)
            spans.append((f" {left}{op}{right}=", kind))
        if i in misprinted:
            honest = values["x"]
            values["x"] = misprint(rng, honest)
            spans += wrong_number(honest, values["x"], kind)
            kind = AFTER_ERROR
        else:
            spans.append((str(values["x"]), kind))
        spans.append(("\n", kind))
    return spans


def problem_page(rng, key):
    """A clean problem with its correct solution."""
    return [(question(rng, key), PROBLEM), *solution(rng, key, wrong=False)]


# ------------------------------------------------------------------------------------------------
# Noise


def some(rng, alphabet, n):
    """n characters, drawn one by one."""
    return "".join(rng.choice(alphabet) for _ in range(n))


def id_line(rng):
    """A hash, a session, a serial number or a key: nothing that could be learnt."""
    style = rng.randrange(4)
    if style == 0:
        return f"sha1 {some(rng, HEX, 24)}\n"
    if style == 1:
        return f"sid={some(rng, BASE64, 22)}\n"
    if style == 2:
        return f"{some(rng, HEX, 8)}-{some(rng, HEX, 4)} {some(rng, UPPER, 6)}\n"
    return f"key: {some(rng, BASE64, 30)}==\n"


def table_row(rng, columns):
    numbers = [rng.randrange(10 ** rng.randint(2, 5)) for _ in range(columns)]
    return "|".join(map(str, numbers)) + "\n"


def number_table(rng):
    columns = rng.randint(3, 5)
    return "".join(table_row(rng, columns) for _ in range(rng.randint(2, 4)))


def chat_sentence(rng):
    return "{} {} {} {}{} ".format(*[rng.choice(part) for part in CHAT])


def chatter(rng):
    return "".join(chat_sentence(rng) for _ in range(rng.randint(2, 4))) + "\n"


def damaged(rng, word):
    """`word` with a letter in three replaced, at least one."""
    letters = list(word)
    for _ in range(max(1, len(word) // 3)):
        new = rng.choice(LETTERS + "10|")
        letters[rng.randrange(len(word))] = new
    return "".join(letters)


def typos(rng, text):
    """Spans of `text` with about four words in ten damaged: letters only, the numbers stay."""
    spans = []
    for word in text.split(" "):
        space = " " if spans else ""
        if len(word) > 2 and word.isalpha() and rng.random() < 0.4:
            spans.append((space + damaged(rng, word), TYPO))
        else:
            spans.append((space + word, PROBLEM))
    return spans


def header(rng):
    """The line above a post: id, user, date."""
    date = f"20{rng.randint(10, 24)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return f"#{some(rng, HEX, 8)} user_{some(rng, BASE64, 6)} {date}\n"


def noisy_problem(rng):
    """A problem as it is found on the web: often wrong, now and then with typos, ids around it."""
    key = rng.choice(rng.choice(keys("train")))
    spans = []
    if rng.random() < P_HEADER:
        spans.append((header(rng), ID_HASH))
    text = question(rng, key)
    if rng.random() < P_TYPOS:
        spans += typos(rng, text)
    else:
        spans.append((text, PROBLEM))
    spans += solution(rng, key, wrong=rng.random() < P_WRONG)
    if rng.random() < P_FOOTER:
        spans.append((f"[ref {some(rng, BASE64, 12)}]\n", ID_HASH))
    return spans


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
    return noisy_problem(rng)


def page(name, seed, i):
    """Spans of page i of the set `name`: "base", "corpus", "curated" or "val".

    The document is their joined text. Whoever writes tokens puts the end-of-text token (kind
    END_OF_TEXT) after it. `val` is the same for every seed, one yardstick for every run, and its
    problems are all different.

    Raises KeyError for another name, IndexError where `val` has no problem i.
    """
    if name not in PAGES:
        raise KeyError(name)
    if name == "val":
        seed = 0
    rng = random.Random(f"{name} {seed} {i}")
    if name == "val":
        return problem_page(rng, keys("val")[i % len(TEMPLATES)][i // len(TEMPLATES)])
    if name == "curated":
        return problem_page(rng, rng.choice(keys("train")[rng.choice(COVERED)]))
    return noisy_page(rng)


def test_problems(n=1000):
    """n test problems, all different, equally many of every template, none in a training page.

    They are the same for every seed, so that exact matches compare. `answer` is the final number,
    what should follow "####". Raises IndexError where a template has too few keys.
    """
    problems = []
    for i in range(n):
        t = i % len(TEMPLATES)
        key = keys("test")[t][i // len(TEMPLATES)]
        problem = {
            "question": question(random.Random(f"test {i}"), key),
            "answer": str(solve(key)[-1][3]),
            "template": t,
            "covered": t in COVERED,
            "key": key,
        }
        problems.append(problem)
    return problems


if __name__ == "__main__":
    for i in range(8):
        print("".join(f"[{KINDS[kind]}]{text}" for text, kind in page("corpus", 0, i)))
