"""Are two normalised answers the same? The rules behind the Rho-1 paper's numbers, and strict ones.

    equal("0.5", "\\frac{1}{2}")       # True, by algebra
    cheap("75", "7500")                # True: a percent may be 100 times off
    cheap("75", "7500", strict=True)   # False

`cheap` decides what strings and numbers can decide. `equal` may need algebra and run very long:
worker.py runs it in a process with limits.
"""

import math
import re

from evaluation.answers import MAX_CHARS

DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d*)?")
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")
BRACKETED = re.compile(r"[(\[{].+[)\]}]")
MAX_DIGITS = 400  # a longer number is none

# --------------------------------------------------------------------------------------------------
# strings and numbers


def number(text, strict=False):
    """A decimal number as a float, else None. Strictly, commas may only part thousands."""
    if strict and "," in text and not THOUSANDS.fullmatch(text):
        return None
    text = text.replace(",", "")
    percent = text.endswith("%")
    text = text.rstrip("%").removesuffix("\\")
    if len(text) > MAX_DIGITS or not DECIMAL.fullmatch(text):
        return None
    return float(text) / 100 if percent else float(text)


def close(pred, gt, strict=False):
    """Published: within 1e-4, also 100 times larger or smaller.

    Strict: within 1e-4 for decimals, exact for whole numbers.
    """
    if strict:
        whole = gt == round(gt, 0)
        return math.isclose(pred, gt, rel_tol=1e-9 if whole else 1e-4)
    return any(math.isclose(pred, value, rel_tol=1e-4) for value in (gt / 100, gt, gt * 100))


def cheap(pred, gt, strict=False):
    """True or False where strings and numbers decide, else None."""
    if pred == gt:
        return bool(pred) or not strict  # of "east", a unit to the harness, nothing is left
    if not pred or not gt or max(len(pred), len(gt)) > MAX_CHARS:
        return False
    if len(pred) > 3 and len(gt) > 3 and pred.isalpha() and gt.isalpha():
        return pred.lower() == gt.lower()  # words; algebra would take them for products of letters
    values = number(pred, strict), number(gt, strict)
    if None in values:
        return None
    return all(map(math.isfinite, values)) and close(*values, strict)


# --------------------------------------------------------------------------------------------------
# matrices, intervals, equations, algebra


def equal(pred, gt, strict=False):
    """The published rules in their order, algebra last. May run very long."""
    decided = cheap(pred, gt, strict)
    if decided is not None:
        return decided
    if not strict and without_brackets(pred) == without_brackets(gt):
        return True
    matrices = MATRIX.fullmatch(pred), MATRIX.fullmatch(gt)
    if all(matrices):
        return equal_matrices(matrices[0][1], matrices[1][1], strict)
    if BRACKETED.fullmatch(pred) and BRACKETED.fullmatch(gt):
        decided = equal_lists(pred, gt, strict)
        if decided is not None:
            return decided
    if strict and not readable(pred, gt):
        return False
    if pred.count("=") != gt.count("="):
        return False  # an equation is no number: "80+150=230" did not pass for 230
    if pred.count("=") == 1:
        return equal_equations(pred, gt)
    return symbolic(pred, gt)


def without_brackets(text):
    return re.sub(r"[(){}\[\]]", "", text).lower()


def equal_matrices(pred, gt, strict):
    """Of one shape, and equal cell by cell. Takes what stands between \\begin and \\end."""
    pred, gt = cells(pred), cells(gt)
    if [len(row) for row in pred] != [len(row) for row in gt]:
        return False
    pairs = [pair for rows in zip(pred, gt) for pair in zip(*rows)]
    return all(equal(a, b, strict) for a, b in pairs)


def cells(inside):
    """The rows of a matrix, each a list of its cells."""
    return [row.split("&") for row in inside.removesuffix("\\\\").split("\\\\")]


def equal_lists(pred, gt, strict):
    """Intervals, points and sets, part by part. None where that does not decide."""
    parts = split_parts(pred[1:-1]), split_parts(gt[1:-1])
    same_brackets = (pred[0], pred[-1]) == (gt[0], gt[-1])
    same_length = len(parts[0]) == len(parts[1]) > 1
    if same_length and all(equal(a, b, strict) for a, b in zip(*parts)):
        return same_brackets or not strict
    if strict and not same_brackets and len(parts[1]) > 1:
        return False
    return None


def split_parts(inside):
    """The parts between commas outside all brackets: "(1,2),3" has two."""
    parts = [""]
    depth = 0
    for char in inside:
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def readable(pred, gt):
    """Can algebra be trusted with them? Not with a plus-minus sign whose "pm" went as a unit, nor
    with another number base."""
    return not re.search(r"\\(?![A-Za-z{}])", gt) and bases(pred) == bases(gt)


def bases(text):
    return sorted(re.findall(r"_\{?(\w+)", text))


def equal_equations(pred, gt):
    """Is left minus right the same, or the same with the other sign?"""
    ours, theirs = (f"{left}-({right})" for left, right in (pred.split("="), gt.split("=")))
    return symbolic(ours, theirs) or symbolic(f"-({ours})", theirs)


def symbolic(pred, gt):
    """math-verify's verdict: both read as LaTeX or plain expressions, compared by sympy.

    Its own time-outs are off: they count the clock's seconds, and worker.py the processor's.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = (LatexExtractionConfig(), ExprExtractionConfig())
    sides = [re.sub(r"(?<=\d)\(", r"\\cdot(", side) for side in (gt, pred)]  # 2(3) is a product
    parsed = [parse(f"${side}$", extraction_config=config, parsing_timeout=None) for side in sides]
    return bool(verify(*parsed, timeout_seconds=None))
