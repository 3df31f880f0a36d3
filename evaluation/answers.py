"""What a model answered: the final answer in its text, and answers in one spelling.

extract("... The answer is $18$.")      # "$18$"
normalize("$1,000.00 \\text{ miles}$")   # "1,000"
after_hashes("3+4=7\\n#### 7")           # "7"

The rules are those behind the paper's numbers.
"""

import re

MAX_CHARS = 1000  # a longer answer is right only if it is the very same string
NUMBER = re.compile(r"-?\d*\.?\d+")

# --------------------------------------------------------------------------------------------------
# extraction


def extract(text, choice=False):
    """The final answer in a generation, not yet normalised.

    The first of the harness's rules that applies. choice: the answer is a letter.
    """
    if choice:
        letter = re.search(r"answer is \(?([a-e])", choice_text(text))
        return letter[1].upper() if letter else ""
    answer = marked(text)
    if answer is None:
        numbers = re.findall(NUMBER, text.replace(",", ""))
        answer = numbers[-1] if numbers else ""
    answer = re.sub(r"\n\s*", "", answer.strip())
    answer = re.sub(r"\.\$$", "$", answer)  # "$5.$"
    return answer.removeprefix(":").removesuffix(".").removesuffix("/")


def marked(text):
    """What stands behind the words or in the box that mark the answer, None without a mark."""
    if "final answer is $" in text and "$. I hope" in text.split("final answer is $", 1)[1]:
        return text.split("final answer is $", 1)[1].split("$. I hope", 1)[0]
    if "boxed" in text:
        return boxed(text.rsplit("boxed", 1)[1])
    if "he answer is" in text:
        return text.rsplit("he answer is", 1)[1]
    if "final answer is" in text:
        return text.rsplit("final answer is", 1)[1]
    return None


def as_written(text):
    """The answer for the strict verdict: without a mark, what the last number is a part of.

    The last number of "it takes 1/2 hour" is 2 by the harness's rules, and here "1/2".
    """
    if marked(text) is not None:
        return extract(text)
    start = None
    for match in NUMBER.finditer(text):
        start = match.start()
    if start is None:
        return ""
    before, after = text[:start], text[start:]
    if before.count("$") % 2 and "$" in after:  # in a formula, "$2 + 3 = 5$"
        word = before.rpartition("$")[2] + after.partition("$")[0]
    else:
        word = after.split(maxsplit=1)[0]
        if before and not before[-1].isspace():
            word = before.rsplit(maxsplit=1)[-1] + word
    return word.strip("*_`#\"'.,;:!?()").removesuffix("$").rsplit("=", 1)[-1]


def choice_text(text):
    return text.split("Problem:", 1)[0].lower().replace("choice is", "answer is")


def one_letter(text):
    """The letter that a text settles on, "" where it names several, or none beyond doubt.

    "The answer is a prime number, so (D)" begins with an article, "a + b" with a sum.
    """
    text = text.split("Problem:", 1)[0]
    found = list(re.finditer(r"(?:answer|choice) is (\(?)([a-e])", text, re.IGNORECASE))
    clear = [stands_alone(*match.groups(), text[match.end() : match.end() + 80]) for match in found]
    letters = {match[2].upper() for match, alone in zip(found, clear) if alone}
    return letters.pop() if len(letters) == 1 and clear[0] else ""


# What behind a letter makes more of it than the name of a choice.
OPERATOR = re.compile(r"\s*[-+*/^=<>]\s*[\w(\\]")
OTHER_LETTER = re.compile(
    r"\s*(?:,|/|&|or\b|and\b)\s*(?:\([A-Ea-e]\)|[A-E]\b(?!\s+[a-z])|[a-e]\s*(?:[.,;)]|$))"
)


def stands_alone(bracket, letter, rest):
    """Does the letter name a choice? bracket: "(" or "". rest: what follows it."""
    if bracket and not rest.startswith(")"):
        return False
    in_brackets = rest.startswith(")")
    rest = rest.removeprefix(")")
    if re.match(r"\w|['.]\w", rest) or OTHER_LETTER.match(rest):
        return False
    if in_brackets:
        return not OPERATOR.match(rest) or rest.startswith(" - ")
    article = letter.islower() and re.match(r"[ \t]+\w", rest)
    return not article and not OPERATOR.match(rest)


def boxed(rest):
    """What follows the word "boxed": the balanced braces, else all up to a dollar sign."""
    if not rest.startswith("{"):
        return rest.split("$", 1)[0].strip()
    depth = 0
    for end, char in enumerate(rest):
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
        if depth == 0:
            return rest[1:end]
    return rest[1:]


# A number behind "####": "-7", "1,250", ".5"; at the start of the line also "- 7" and "-$7".
ANSWER = re.compile(
    r"(?P<sign>^\s*[-−]\s*\$?\s*|[-−]\$?)?(?P<digits>\d+(?:,\d{3})*(?:\.\d+)?|(?<!\w)\.\d+)"
)
# What directly in front of it makes more of it: "\frac{7", "sqrt(7", "minus 7".
MADE_OF = re.compile(
    r"(?:\w\(|[\\^/√\[]|(?<!text)(?<!boxed)\{|\b(?:minus|negative|sqrt|root)(?: of)?)\s*$",
    re.IGNORECASE,
)
# What directly behind it does: "7/8", "7e3", "7 or 8", "7!", "7k", "3x+1", "7 million".
GOES_ON = re.compile(
    r"[.eE][+-]?\d|[²³!]|\s*\^|[kKMB]\b|[a-z]\s*[-+*/^]\s*\d"
    r"|\s*(?:[-−–+*/^=:,×·x]|\*\*|or\b|and\b|to\b)?\s*(?:[a-z]\s*=\s*)?[-−]?\d"
    r"|\s*(?:hundred|thousand|[mbtr]*illion|dozen|(?:and )?an? (?:half|third|quarter))\b"
)
# And what further behind it is another answer: "7 (or 8)", "x = 7 or x = 8".
ANOTHER = re.compile(
    r"(?:\b(?:or|and)\b|[+*/=,×·]|\\(?!text)[a-z]+)\s*(?:[a-z]\s*=\s*)?[$]?[-−]?\d"
)


def behind_hashes(text):
    """(number, does it stand alone?, what follows it) of the first line with one behind "####".

    Alone: no part of another number, or of something that is computed. ("", False, "") without such
    a line. The number is as it was written, but for the commas between its thousands and blanks
    behind its sign. Line by line: one pattern for all takes quadratic time on a long run of #.
    """
    for line in text.split("\n"):
        _, hashes, rest = line.partition("####")
        match = hashes and ANSWER.search(rest)
        if match:
            sign = "-" if match["sign"] else ""
            before, after = rest[: match.start()], rest[match.end() :]
            alone = not MADE_OF.search(before) and not GOES_ON.match(after)
            return sign + match["digits"].replace(",", ""), alone, after
    return "", False, ""


def after_hashes(text):
    """The first number in the line that begins with "####", without its commas; "" if none."""
    return behind_hashes(text)[0]


def number_of(answer):
    """The true answer of a problem of one's own, read as a model's is: `after_hashes`.

    answer: with "####", or nothing but the number. Raises ValueError where it is no single number
    in digits.
    """
    if not isinstance(answer, str | int | float):
        raise ValueError("answer, which is neither text nor a number")
    text = str(answer)
    number, alone, _ = behind_hashes(text if "####" in text else f"####{text}")
    if not alone:
        raise ValueError(f"answer ({text[:60]!r} is no single number in digits)")
    return number


def end_of_hashes(text, new):
    """A stop condition (see generate.py): the end of the line with "####"."""
    if "\n" not in text[len(text) - new :]:
        return None
    start = text.find("####")
    end = text.find("\n", start)
    return end + 1 if start >= 0 and end >= 0 else None


# --------------------------------------------------------------------------------------------------
# normalisation

# Words that stand beside a number and are dropped. They were gathered for MathQA's answers, single
# letters included (o and h and s), so that a variable of that name is lost as well, in the answer
# and the truth alike.
UNITS = """
    second sec s minute min hour hr h day month year yr am pm noon
    mile inch inches feet ft yard meter metre mtr m km cm mm dm degree deg
    gallon gal liter litre l lt c cc acre hectare square sq cubic cube cu surface
    pound lb gram g gm kg mt ohm mph kmph kmh
    rupee rs percent profit loss gain increase decrease rise less more ratio
    apple coin toy tile monkey men man women woman soldier mark round
    unit number prime per way by are no\\schange pure east west a t o d th st rd ab bc
""".split()
UNIT = re.compile(r"(?<!\w)(?:" + "|".join(sorted(UNITS, key=len, reverse=True)) + r")s?(?!\w)")

SMALL = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: n for n, word in enumerate(SMALL)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def words_to_number(text):
    """The number that the number words make: "205" of "two hundred and five boxes".

    Without number words, the text itself.
    """
    known = {*WORDS, *SCALES, "hundred"}
    words = [word for word in re.split(r"[\s-]+", text.lower()) if word in known]
    if not words:
        return text
    total = 0
    group = 0  # below the next thousand
    for word in words:
        if word in SCALES:
            total += max(group, 1) * SCALES[word]
            group = 0
        elif word == "hundred":
            group = max(group, 1) * 100
        else:
            group += WORDS[word]
    return str(total + group)


def normalize(answer):
    """The form in which answers are compared: one line, no units or dollars, one LaTeX spelling.

    Lossy on purpose, as the published numbers were made with it. Longer answers than MAX_CHARS
    only lose their blanks.
    """
    s = str(answer).strip().replace("\n", "")
    if len(s) > MAX_CHARS:
        return re.sub(r"\s", "", s)
    s = s.rstrip(".").replace("\\!", "")
    s = re.sub(r"\\begin\{(?:array\}\{[^}]*|bmatrix)\}", r"\\begin{pmatrix}", s)
    s = re.sub(r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}", s)
    s = s.replace("tfrac", "frac").replace("dfrac", "frac")
    s = s.replace("\\left", "").replace("\\right", "").replace("\\{", "{").replace("\\}", "}")
    s = re.sub(r"\\text\{.*?\}$", "", s).strip() or s  # a unit behind the answer
    s = UNIT.sub("", s) if UNIT.sub("", s).strip() else s
    s = s.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "").replace("$", "")
    s = words_to_number(s)
    s = re.sub(r"\\text\{(.*?)\}", r"\1", s)
    s = re.sub(r"[xyz]\s*(?:=|\\in(?![a-z])|\\to(?![a-z]))", "", s)
    s = s.replace("\\%", "").replace("%", "")
    s = s.replace(" .", " 0.").replace("{.", "{0.")
    if "infinity" in s or re.search(r"(?<![a-z\\])inf(?![a-z])", s):
        s = re.sub(r"\\?infinity|(?<![a-z\\])inf(?![a-z])", r"\\infty", s)
    s = s.replace("and", "").replace("\\mathbf", "")
    s = re.sub(r"\\mbox\{.*?\}", "", s)
    if "j" in s and "i" not in s:
        s = s.replace("j", "i")
    s = re.sub(r"(\d+)\.0*(?=[^\d]|$)", r"\1", s)
    if s.startswith("."):
        s = "0" + s
    sides = s.split("=")
    if len(sides) == 2 and len(sides[0].strip()) <= 2:
        s = sides[1]
    s = re.sub(r"\\sqrt\s*(\w+)", r"\\sqrt{\1}", s)
    s = s.replace(" ", "")
    s = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", s)
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", s)
