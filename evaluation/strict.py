"""The strict verdict: does an answer, as it was written, say what the truth says?

    same("2 cm", "2 km")              # False
    same("1\\frac{1}{2}", "1.5")       # True
    quick("x+x", "2x")                # None: needs algebra, so worker.py runs `same`

What cannot be read is right only where it is written as the truth is. Of a unit, a name or a
remark ("loss", "pm"), one side may say nothing; where both speak they must agree.
"""

import re

from evaluation.answers import MAX_CHARS, normalize
from evaluation.equality import cells, symbolic
from evaluation.exact import close, exact, same_clock
from evaluation.reading import Reading, read, split_answers, split_outside, tidy

MAX_DEPTH = 50  # of brackets; what is nested deeper is compared as text
MAX_UNORDERED = 30  # more answers than this must come in the truth's order
HUNDREDTHS = {("cm",): ("m",), ("cent",): ("dollar",), ("%",): ()}

# --------------------------------------------------------------------------------------------------
# whole answers


class NeedsAlgebra(Exception):
    """What `quick` cannot decide."""


def refer(*_, **__):
    raise NeedsAlgebra


def quick(answer, truth):
    """`same` where it needs no algebra, else None."""
    try:
        return same(answer, truth, refer)
    except NeedsAlgebra:
        return None


def same(answer, truth, algebra=symbolic):
    """Is the answer right? Both as they were written. May run very long in `algebra`."""
    if lost_a_term(truth):
        answer = normalize(answer)  # such a truth was normalised before it came here
    if max(len(answer), len(truth)) > MAX_CHARS:
        return without_blanks(answer) == without_blanks(truth)
    if r"\\" not in truth:  # where no row ends, models double the backslash of a command
        answer = re.sub(r"\\\\(?=[A-Za-z])", r"\\", answer)
    answer, truth = tidy(answer), tidy(truth)
    if alike(answer, truth):
        return True
    if not answer or not truth or max(depth(answer), depth(truth)) > MAX_DEPTH:
        return False
    # "1,250" is a number, or two answers if the other side says so.
    return any(
        same_answers(split_answers(answer, joined), split_answers(truth, joined), algebra)
        for joined in (True, False)
    )


def lost_a_term(truth):
    """(a+5)(b+2) became (+5)(b+2) in the authors' files: the article "a" is no unit."""
    return bool(re.search(r"[(\[{,]\+|[-+*/^][)\]},]", truth))


def without_blanks(text):
    return re.sub(r"\s", "", text)


def alike(answer, truth):
    """One text, but for blanks that part no two digits."""
    pattern = r"(?<!\d) | (?!\d)"
    return answer != "" and re.sub(pattern, "", answer) == re.sub(pattern, "", truth)


def depth(text):
    """How deep the brackets of `text` are nested."""
    deepest = now = 0
    for char in text:
        now += (char in "([{") - (char in ")]}")
        deepest = max(deepest, now)
    return deepest


def same_answers(answers, truths, algebra):
    """Are they the same, in whatever order?"""
    answers, truths = both_signs(answers), both_signs(truths)
    if len(answers) == len(truths) == 1:
        return same_reading(read(answers[0]), read(truths[0]), algebra)
    in_order = False
    if 1 in (len(answers), len(truths)):
        one, some = sorted((answers, truths), key=len)
        if not may_be_bare(one[0], some):
            return False
        in_order = ends(one[0]) != "{}"
        answers = answers if some is answers else in_brackets(one[0])
        truths = truths if some is truths else in_brackets(one[0])
    return len(answers) == len(truths) and matching(answers, truths, algebra, in_order)


def may_be_bare(bracketed, answers):
    """May the brackets be left out? Not an interval's, so of two values only those of a set.

    Or those of a point whose coordinates are named: "x=2, y=3".
    """
    names = [read(answer).name for answer in answers]
    named = all(names) and names == sorted(set(names))
    return ends(bracketed) == "{}" or len(answers) > 2 or (named and ends(bracketed) == "()")


def both_signs(answers):
    """ "1 \\pm 2" is the two answers 1 + 2 and 1 - 2."""
    signed = []
    for answer in answers:
        if answer.count(r"\pm") == 1:
            signed += [answer.replace(r"\pm", sign).removeprefix("+").strip() for sign in "+-"]
        else:
            signed.append(answer)
    return signed


def matching(answers, truths, algebra, in_order=False):
    """Can each answer be given a truth of its own?"""
    in_order = in_order or len(truths) > MAX_UNORDERED
    left = list(truths)
    for answer in answers:
        for truth in left[:1] if in_order else left:
            if same_reading(read(answer), read(truth), algebra):
                left.remove(truth)
                break
        else:
            return False
    return True


def same_reading(answer: Reading, truth: Reading, algebra):
    """One answer beside one truth: names, remarks, units, values."""
    if "=" in answer.text and "=" in truth.text and (answer.name, truth.name) != ("", ""):
        if answer.name != truth.name:
            return same_equation(answer.text, truth.text, algebra)
    if differ(answer.remark, truth.remark):
        return False
    if answer.name and truth.name and answer.name != truth.name:
        return False
    if HUNDREDTHS.get(answer.unit) == truth.unit and same_hundredth(answer, truth):
        return True
    if HUNDREDTHS.get(truth.unit) == answer.unit and same_hundredth(truth, answer):
        return True
    if differ(answer.unit, truth.unit):
        return False
    return same_value(answer.body, truth.body, algebra)


def differ(ours, theirs):
    return bool(ours and theirs and ours != theirs)


def same_hundredth(small, large):
    """Is "50 cents" as much as "0.5 dollars"?"""
    values = exact(small.body), exact(large.body)
    return None not in values and values[0].value / 100 == values[1].value


# --------------------------------------------------------------------------------------------------
# values


def same_value(answer, truth, algebra):
    """Two answers without names and units."""
    if alike(answer, truth):
        return True
    if not answer or not truth:
        return False
    values = exact(answer), exact(truth)
    if None not in values:
        return close(*values)
    for decide in (same_clock, same_words):
        decided = decide(answer, truth)
        if decided is not None:
            return decided
    for decide in (same_matrix, same_union, same_brackets):
        decided = decide(answer, truth, algebra)
        if decided is not None:
            return decided
    if "=" in answer and "=" in truth:
        return same_equation(answer, truth, algebra)
    return "=" not in answer + truth and same_expression(answer, truth, algebra)


def same_words(answer, truth):
    """Words are compared as words, though algebra would read "on" as o times n. None for others."""
    if not is_words(answer) and not is_words(truth):
        return None
    names = answer.isupper() and truth.isupper()
    return answer == truth if names else answer.lower() == truth.lower()


def is_words(text):
    """Letters and blanks that are no product: "no", "AB" or "no solution", but not "xy"."""
    if not re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+)*", text):
        return False
    letters = set(text.replace(" ", "").lower())
    short = all(len(word) <= 3 for word in text.split())
    product = letters <= set("abcxyz") or not letters & set("aeiou")
    return len(text) > 1 and not (short and product and text.islower())


# --------------------------------------------------------------------------------------------------
# matrices, unions, brackets

MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def same_matrix(answer, truth, algebra):
    """Of one shape, and equal cell by cell. None where neither is a matrix."""
    found = MATRIX.fullmatch(answer), MATRIX.fullmatch(truth)
    if not any(found):
        return None
    if not all(found):
        return False
    ours, theirs = (cells(match[1].strip()) for match in found)
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        return False
    pairs = [pair for rows in zip(ours, theirs) for pair in zip(*rows)]
    return all(same_value(a.strip(), b.strip(), algebra) for a, b in pairs)


def same_union(answer, truth, algebra):
    """The same parts in whatever order. None where neither is a union."""
    ours, theirs = (split_outside(text, {r"\cup"}) for text in (answer, truth))
    if len(ours) == len(theirs) == 1:
        return None
    return len(ours) == len(theirs) and matching(ours, theirs, algebra)


def same_brackets(answer, truth, algebra):
    """Points and intervals in order, sets in any. None where that does not decide."""
    ours, theirs = in_brackets(answer), in_brackets(truth)
    if len(ours) == 1 or len(theirs) == 1:  # around a single value they do not count
        answer = ours[0] if len(ours) == 1 else answer
        truth = theirs[0] if len(theirs) == 1 else truth
        return same_value(answer, truth, algebra)
    if not ours and not theirs or RELATION.search(answer) or RELATION.search(truth):
        return None
    if len(ours) != len(theirs) or ends(answer) != ends(truth):
        return False
    if ends(answer) == "{}":
        return matching(ours, theirs, algebra)
    return all(same_value(a, b, algebra) for a, b in zip(ours, theirs))


def in_brackets(text):
    """The parts between the brackets around all of `text`, [] where there are none."""
    bare = text.replace(r"\{", "{").replace(r"\}", "}")
    if len(bare) < 3 or bare[0] not in "([{" or bare[-1] not in ")]}":
        return []
    inside = 0
    for char in bare[:-1]:
        inside += (char in "([{") - (char in ")]}")
        if inside == 0:  # the first bracket ends before the last: "(x+1)(x-1)"
            return []
    return split_outside(bare[1:-1], {","})


def ends(text):
    return text.lstrip("\\")[:1] + text[-1:]


# --------------------------------------------------------------------------------------------------
# equations and expressions

RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-z])|[<>]")
LOG = re.compile(r"\\log ?_(?:\{\w+\}|\w)")
FUNCTIONS = {"sqrt", "sinh", "cosh", "tanh"}


def same_equation(answer, truth, algebra):
    """Is left minus right the same, or the same with the other sign?"""
    if not answer.count("=") == truth.count("=") == 1:
        return False
    ours, theirs = (f"{left} - ({right})" for left, right in (answer.split("="), truth.split("=")))
    other_sign = f"-({ours})"
    return same_expression(ours, theirs, algebra) or same_expression(other_sign, theirs, algebra)


def same_expression(answer, truth, algebra):
    """By algebra, where that can be trusted: every letter, index and relation in sight."""
    sides = [answer, truth]
    if not all(readable(side) for side in sides):
        return False
    if indices(answer) != indices(truth) or other_case(answer, truth):
        return False
    related = [bool(RELATION.search(side)) for side in sides]
    if any(related) and not all(related) and not any(map(in_brackets, sides)):
        return False
    return algebra(*map(latex, sides), exactly=True)


# What math-verify drops or misreads: blanks between digits, clock times, primes, currencies, ...
STRANGE = re.compile(
    r"\d \d|\d\.\d+\.|\.\.|[:;'\"$€£¥₹&#?]|\\(?![A-Za-z{}|])"
    r"|\\(?:pm|circ|l?dots|cdots|overline|approx|sim|equiv)(?![a-z])"
)


def readable(text):
    """May algebra read it? Not words, nor what is strange."""
    text = LOG.sub(r"\\log", text)
    plain = re.sub(r"\\[A-Za-z]+", " ", text)
    words = re.findall(r"[A-Za-z]{4,}", plain)
    if any(word not in FUNCTIONS for word in words):
        return False
    return not STRANGE.search(text)


def indices(text):
    """Also number bases, and points as in the angle ABC. Logarithms' bases are for algebra."""
    return sorted(re.findall(r"_\{?\w+|[A-Z]{2,}", LOG.sub(r"\\log", text).replace("_{", "_")))


def other_case(answer, truth):
    """Does a letter stand here small and there as a capital?"""
    ours, theirs = (set(re.sub(r"\\[A-Za-z]+", "", text)) for text in (answer, truth))
    return any(letter.isalpha() and letter.swapcase() in theirs for letter in ours - theirs)


def latex(text):
    """The braces that LaTeX lets one leave out, for math-verify, and no 1e5 (that is 1 e 5)."""
    text = re.sub(r"(?<![\w.])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)", r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"\^(-\d+)", r"^{\1}", text)
    text = re.sub(r"\\sqrt ?(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac ?([^{\\ ]) ?\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac ?([^{\\ ]) ?([^{\\ ])", r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?\d+) ?/ ?(-?\d+)$", r"\\frac{\1}{\2}", text)
