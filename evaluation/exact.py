"""Numbers of the strict verdict: exact values of what is written, times, dates and ratios.

exact("1 1/2")                           # Number(3/2, ...), also of "1e3" and "two hundred"
close(exact("326.53"), exact("326.5"))   # True: not yet rounded
same_clock("10:30", "1/3")               # False: a time is no fraction
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from evaluation.answers import SCALES, WORDS

MAX_DIGITS = 400  # a longer number, or a larger exponent, is compared as text

# --------------------------------------------------------------------------------------------------
# exact values

WHOLE = r"\d+"
PLAIN = r"\d+\.?\d*|\.\d+"
DECIMAL = re.compile(rf"([+-]?) ?({PLAIN})(?:[eE]([+-]?\d+))?")
POWER_OF_TEN = re.compile(
    rf"([+-]?) ?({PLAIN}) ?(?:\\times|\\cdot|\*) ?10\^(?:\{{([+-]?\d+)\}}|(\d))"
)
FRACTION = re.compile(
    rf"([+-]?) ?(?:({WHOLE})(?: |(?=\\frac)))?"
    rf"(?:([+-]?{WHOLE}) ?/ ?([+-]?{WHOLE})|\\frac ?(?:\{{([+-]?{WHOLE})\}}|(\d)) ?"
    rf"(?:\{{([+-]?{WHOLE})\}}|({WHOLE})))"
)
GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(?: \d{3})+")


@dataclass(frozen=True)
class Number:
    """An exact value, and how it was written."""

    value: Fraction
    places: int | None = None  # decimals without last zeros, but cents; None for a fraction
    digits: int = 0  # significant ones

    @property
    def full(self):
        """Is it a double printed with all its digits?"""
        return self.digits >= 15 and bool(self.places)


def exact(text):
    """The Number that a tidy text is, None if it is none."""
    if len(text) > MAX_DIGITS:
        return None
    if GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    if match := DECIMAL.fullmatch(text):
        return decimal(*match.groups())
    if match := POWER_OF_TEN.fullmatch(text):
        return decimal(match[1], match[2], match[3] or match[4])
    if match := FRACTION.fullmatch(text):
        return fraction(match)
    words = number_of_words(text)
    return None if words is None else Number(Fraction(words), 0)


def decimal(sign, digits, exponent):
    exponent = int(exponent or 0)
    if abs(exponent) > MAX_DIGITS:
        return None
    value = Fraction(sign + digits) * Fraction(10) ** exponent
    decimals = digits.partition(".")[2]
    places = max(len(decimals.rstrip("0")), min(2, len(decimals)))
    return Number(value, max(places - exponent, 0), len(digits.replace(".", "").lstrip("0")))


def fraction(match):
    """Also mixed numbers, whose fraction has no sign of its own."""
    sign, whole = match[1], match[2]
    top = int(match[3] or match[5] or match[6])
    bottom = int(match[4] or match[7] or match[8])
    if bottom == 0 or (whole and (top < 0 or bottom < 0)):
        return None
    value = int(whole or 0) + Fraction(top, bottom)
    return Number(-value if sign == "-" else value)


def number_of_words(text):
    """The number that "two hundred and five", "twenty-five" or "5 million" says, else None."""
    text = re.sub(r"^(?:a )?(?=hundred|thousand|million)", "one ", text.lower())
    words = re.split(r"[ -]+", text)
    if not all(word in WORDS or word in SCALES or word in ("hundred", "and") for word in words[1:]):
        return None
    total = group = 0
    room = 10**12  # the next word must stand for less: "two three" is no number
    for word in words:
        if word == words[0] and len(words) == 2 and word.isascii() and word.isdigit():
            group = int(word)
            room = 0
        elif word in WORDS and WORDS[word] < room:
            group += WORDS[word]
            room = 10 if WORDS[word] >= 20 else 0
        elif word == "hundred" and group:
            group *= 100
            room = 100
        elif word in SCALES and group:
            total += group * SCALES[word]
            group = 0
            room = 1000
        elif word != "and" or room not in (100, 1000) or word == words[-1]:
            return None
    return total + group


def close(answer, truth):
    """Is the Number `answer` the Number `truth`, as far as that one is known?

    A whole number or a fraction is known exactly: only a double printed in full may miss it. A
    decimal is known to half of its last place (a last 0 tells of nothing but cents), and never
    worse than 1e-4.
    """
    miss = abs(answer.value - truth.value)
    size = max(abs(answer.value), abs(truth.value))
    if miss == 0:
        return True
    if truth.places is None or truth.value.denominator == 1:
        return answer.full and miss <= size / 10**9
    places = truth.places
    if answer.places is not None:
        places = min(places, answer.places)
    if places < min(2, truth.places):
        return False
    return miss <= Fraction(1, 2 * 10**places) and miss <= size / 10**4


# --------------------------------------------------------------------------------------------------
# times, dates, ratios

CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?")
DATE = re.compile(r"(\d{4})-(\d\d?)-(\d\d?)|(\d\d?)[/.](\d\d?)[/.](\d{4})")
RATIO = re.compile(r"[\d.]+(?: ?: ?[\d.]+)+")


def same_clock(answer, truth):
    """Times of day and dates, digit by digit, and ratios, in proportion. None for others."""
    for kind in (CLOCK, DATE):
        found = kind.fullmatch(answer), kind.fullmatch(truth)
        if any(found):
            return all(found) and numbers_in(found[0]) == numbers_in(found[1])
    if not RATIO.fullmatch(answer) and not RATIO.fullmatch(truth):
        return None
    terms = [[exact(term.strip()) for term in text.split(":")] for text in (answer, truth)]
    if any(term is None for term in terms[0] + terms[1]):
        return False
    ours, theirs = ([term.value for term in side] for side in terms)
    if len(ours) == 2 == len(theirs) + 1:
        theirs.append(Fraction(1))
    if len(theirs) == 2 == len(ours) + 1:
        ours.append(Fraction(1))
    return len(ours) == len(theirs) and all(
        a * theirs[-1] == b * ours[-1] for a, b in zip(ours, theirs)
    )


def numbers_in(match):
    return [group and int(group) for group in match.groups()]
