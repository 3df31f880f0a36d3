"""An answer as it is written, taken apart without losing anything: for the strict verdict.

    read("x = 12\\text{ cm}^2")   # Reading(name="x", body="12", unit=("cm^2",), remark="")
    split_answers("3 and 4")      # ["3", "4"]

normalize() in answers.py, behind the paper's numbers, drops units, names and blanks; here they
stay, because "2 cm" is not "2 km", "x=3" not "y=3" and "1 1/2" not "11/2".
"""

import re
from dataclasses import dataclass

from evaluation.answers import SCALES, WORDS
from evaluation.exact import number_of_words

# --------------------------------------------------------------------------------------------------
# one spelling, nothing dropped

SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "°": r"^\circ ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ",
    "\n": " ", "~": " ", "{,}": ",", r"\%": "%", r"\$": "$",
}  # fmt: skip
SPELLINGS = [
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[ ,;:]|\\q?quad(?![a-zA-Z])", " "),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(l|g)eq(?![a-zA-Z])", r"\\\1e"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\begin\{(?:array\}\{[^}]*|bmatrix)\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}"),
    (r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<![a-zA-Z])([ap])\.m\.?(?![a-zA-Z])", r"\1m"),
    (r"(?<![a-zA-Z])per cent(?![a-zA-Z])", "percent"),
    (r"\\?(?<![a-zA-Z])(?:infinity|inf)(?![a-zA-Z])", r"\\infty"),
    (r"(\d)j(?![a-zA-Z])", r"\1i"),  # the engineers' imaginary unit
    (r"\^\s*\{(\w|\\circ)\}(?!\w)", r"^\1"),
    (r"_\s*\{(\w)\}(?!\w)", r"_\1"),
    (r"\s*\^\s*", "^"),
    (r"\s+", " "),
]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]


def tidy(text):
    """One spelling of LaTeX, signs and blanks. Takes at most MAX_CHARS: see strict.py."""
    s = without_full_stop(text)
    if len(s) > 2 and s[0] == s[-1] == "$":
        s = s[1:-1]
    for old, new in SIGNS.items():
        s = s.replace(old, new)
    for pattern, new in SPELLINGS:
        s = pattern.sub(new, s)
    return without_full_stop(s)


def without_full_stop(text):
    """Three points are none: "0.333..." goes on."""
    text = text.strip()
    return text if text.endswith("..") else text.removesuffix(".").strip()


# --------------------------------------------------------------------------------------------------
# several answers

OPEN, CLOSE = "([{", ")]}"
THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|\d+|.", re.DOTALL)


def split_answers(text, thousands=True):
    """The answers between the commas, "and" and "or" that stand outside all brackets.

    thousands: "1,250" is one number, else two answers.
    """
    if number_of_words(text) is not None:  # "two hundred and five"
        return [text]
    return split_outside(text, {",", ";", "and", "or"}, thousands)


def split_outside(text, separators, thousands=False):
    """The stripped parts of `text` between separating tokens outside all brackets."""
    parts = [""]
    depth = 0
    joined = set()  # places in numbers whose commas part thousands
    for match in THOUSANDS.finditer(text) if thousands else ():
        joined |= set(range(*match.span()))
    for match in TOKEN.finditer(text):
        token = match[0]
        if token in OPEN or token in (r"\{", r"\begin"):
            depth += 1
        elif token in CLOSE or token in (r"\}", r"\end"):
            depth -= 1
        if depth == 0 and token == "," and match.start() in joined:
            continue
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    parts = [part.strip() for part in parts]
    oxford = len(parts) > 2 and not parts[-2] and "," in separators  # "1, 2, and 3"
    return parts[:-2] + parts[-1:] if oxford else parts


# --------------------------------------------------------------------------------------------------
# names, units and remarks

# One unit a line, its usual name first; plurals in -s are understood.
UNITS = """
second sec s
minute min
hour hr h
day
month
year yr
mile mi
inch inches
foot feet ft
yard
m meter metre mtr
km kilometer kilometre
cm centimeter centimetre
mm millimeter millimetre
dm
gallon gal
liter litre ltr lt l
pound lb
ounce oz
g gram gm
kg kilogram
degree deg
% percent
dollar buck
cent
rupee rs
euro
am
pm
man men
woman women
mile,hour mph
km,hour kmph kmh
cm^3 cc
""".strip().split("\n")
UNIT_OF = {word: tuple(names.split()[0].split(",")) for names in UNITS for word in names.split()}
SYMBOLS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
SINGLE = {"s", "h", "m", "l", "g"}  # the units of one letter
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
REMARKS = "loss,profit gain,increase rise,decrease,more,less,east,west,north,south".split(",")
REMARKS = {word: words.split()[0] for words in REMARKS for word in words.split()}
FILLING = set("st nd rd th per of the each by in unit number way /".split())
# Words behind a number that make another number of it.
CHANGING = {*WORDS, *SCALES} | set(
    """
    hundred trillion dozen score pair double half halves third fourth quarter fifth sixth eighth
    ninth tenth hundredth squared cubed square cube times plus minus point factorial or and not no
    to pi power root over
    """.split()
)
NAME = re.compile(r"(\\?[A-Za-z]+(?:_\w+|_\{[^{}]*\})?(?:\([A-Za-z]\))?)\s*(?:=|\\in(?![a-z])) ?")


@dataclass(frozen=True)
class Reading:
    """One answer: "x = 10% loss" is name "x", body "10", unit ("%",) and remark "loss"."""

    text: str  # all of it
    name: str
    body: str
    unit: tuple
    remark: str


def read(text):
    """Take one tidy answer apart. Without a unit or a name these are empty."""
    body = text
    name = NAME.match(text)
    if name and "=" not in text[name.end() :]:
        body = text[name.end() :]
    front, body = leading_currency(body.strip())
    body, words = trailing_words(body)
    remarks = [REMARKS[word] for word in words if word in REMARKS]
    unit = front + unit_of([word for word in words if word not in REMARKS])
    return Reading(text, name[1] if name else "", body.strip(), unit, " ".join(remarks))


def leading_currency(text):
    """(unit, rest) of "$5", "-$5" and "rs 5"."""
    match = re.match(r"(-?)\s*([$€£¥₹]|[Rr]s\.?(?= ?\d))\s*", text)
    if not match:
        return (), text
    return (SYMBOLS.get(match[2], "rupee"),), match[1] + text[match.end() :]


def trailing_words(text):
    """(body, words): the unit words, per cent and degree signs behind a value."""
    tokens = [match[0] for match in TOKEN.finditer(text)]
    words = []
    while tokens:
        word, n_tokens = last_word(tokens, bool(words))
        if not word:
            break
        words.insert(0, word)
        del tokens[-n_tokens:]
    body = "".join(tokens).strip()
    if not body or body[-1] in "+-*/^=_\\" or (words and not plausible(body, words)):
        return text, []  # a word of its own, or letters that belong to the expression
    return body, words


def last_word(tokens, more):
    """(word, number of tokens) of the last unit word, ("", 0) where none stands last."""
    if tokens[-1] == " ":
        word, n_tokens = last_word(tokens[:-1], more) if len(tokens) > 1 else ("", 0)
        return word, n_tokens + 1
    if tokens[-1] == "%":
        return "%", 1
    if tokens[-1] == "/" and more:
        return "/", 1
    if tokens[-2:] == ["^", r"\circ"]:
        return "degree", 2
    power = ""
    if len(tokens) > 2 and tokens[-2] == "^" and tokens[-1] in "23":
        power = "^" + tokens[-1]
    word = tokens[-3] if power else tokens[-1]
    n_tokens = 3 if power else 1
    before = tokens[-n_tokens - 1] if len(tokens) > n_tokens else ""
    if not is_unit(word.lower(), before) or (power and singular(word.lower()) not in UNIT_OF):
        return "", 0
    return word.lower() + power, n_tokens


def is_unit(word, before):
    """May this word be a unit or a thing that is counted? before: the token in front of it.

    Any word of three letters may. Shorter ones are known units, or products of variables.
    """
    if not word.isalpha() or changes(word):
        return False
    if len(word) == 1:
        return word in SINGLE and before in (" ", "/")
    if word in ("st", "nd", "rd", "th"):
        return before.isdigit()
    return len(word) > 2 or singular(word) in UNIT_OF or word in FILLING or word in POWERS


def changes(word):
    """Does it make another number of the one before it? "square" may also belong to "feet"."""
    return word not in POWERS and not CHANGING.isdisjoint((word, word.removesuffix("s")))


def plausible(body, words):
    """May these words be a unit? Behind letters only known units are: "2x cm", but not "x ab"."""
    if "degree" in words and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", body):
        return False
    letters = re.search(r"(?<![\\A-Za-z])[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", body))
    if not letters or number_of_words(body) is not None:
        return bool(re.search(r"[\d}\])a-z]$", body)) and words[-1] not in POWERS
    return all(len(word) > 1 and singular(word) in UNIT_OF for word in words)


def singular(word):
    """A word in the table of units as it stands there; other words without the plural's s."""
    base, power, digit = word.partition("^")
    if base not in UNIT_OF and len(base) > 2:
        base = base.removesuffix("s")
    return base + power + digit if base not in UNIT_OF else base


def unit_of(words):
    """The unit that the words name, as a tuple: ("mile", "hour") for "miles per hour"."""
    unit = []
    power = ""
    for word in words:
        base, _, digit = word.partition("^")
        if base in POWERS:
            power = POWERS[base]
        elif singular(base) not in FILLING:
            first, *others = UNIT_OF.get(singular(base), (singular(base),))
            raised = power or ("^" + digit if digit else "")
            unit += [first + raised, *others]
            power = ""
    return tuple(unit)
