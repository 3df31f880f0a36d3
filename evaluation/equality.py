"""Are two normalised answers the same by the rules behind the Rho-1 paper's numbers?

    equal("0.5", "\\frac{1}{2}")   # True, by algebra
    cheap("75", "7500")            # True: a percent may be 100 times off

`cheap` decides what strings and numbers can decide. `equal` may need algebra and run very long:
worker.py runs it in a process with limits. The strict verdict is strict.py's.
"""

import math
import re

from evaluation.answers import MAX_CHARS

DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")
BRACKETED = re.compile(r"[(\[{].+[)\]}]")
MAX_DIGITS = 400  # a longer number is none

# --------------------------------------------------------------------------------------------------
# strings and numbers


def number(text):
    """A decimal number as a float, else None. Commas are dropped."""
    text = text.replace(",", "")
    percent = text.endswith("%")
    text = text.rstrip("%").removesuffix("\\")
    if len(text) > MAX_DIGITS or not DECIMAL.fullmatch(text):
        return None
    return float(text) / 100 if percent else float(text)


def close(pred, gt):
    """Within 1e-4, also 100 times larger or smaller."""
    return any(math.isclose(pred, value, rel_tol=1e-4) for value in (gt / 100, gt, gt * 100))


def cheap(pred, gt):
    """True or False where strings and numbers decide, else None."""
    if pred == gt:
        return True
    if not pred or not gt or max(len(pred), len(gt)) > MAX_CHARS:
        return False
    if len(pred) > 3 and len(gt) > 3 and pred.isalpha() and gt.isalpha():
        return pred.lower() == gt.lower()  # words; algebra would take them for products of letters
    values = number(pred), number(gt)
    if None in values:
        return None
    return all(map(math.isfinite, values)) and close(*values)


# --------------------------------------------------------------------------------------------------
# matrices, intervals, equations, algebra


def equal(pred, gt):
    """The published rules in their order, algebra last. May run very long."""
    decided = cheap(pred, gt)
    if decided is not None:
        return decided
    if without_brackets(pred) == without_brackets(gt):
        return True
    matrices = MATRIX.fullmatch(pred), MATRIX.fullmatch(gt)
    if all(matrices):
        return equal_matrices(matrices[0][1], matrices[1][1])
    if BRACKETED.fullmatch(pred) and BRACKETED.fullmatch(gt) and equal_lists(pred, gt):
        return True
    if pred.count("=") != gt.count("="):
        return False  # an equation is no number: "80+150=230" did not pass for 230
    if pred.count("=") == 1:
        return equal_equations(pred, gt)
    return symbolic(pred, gt)


def without_brackets(text):
    return re.sub(r"[(){}\[\]]", "", text).lower()


def equal_matrices(pred, gt):
    """Of one shape, and equal cell by cell. Takes what stands between \\begin and \\end."""
    pred, gt = cells(pred), cells(gt)
    if [len(row) for row in pred] != [len(row) for row in gt]:
        return False
    pairs = [pair for rows in zip(pred, gt) for pair in zip(*rows)]
    return all(equal(a, b) for a, b in pairs)


def cells(inside):
    """The rows of a matrix, each a list of its cells."""
    return [row.split("&") for row in inside.removesuffix("\\\\").split("\\\\")]


def equal_lists(pred, gt):
    """Intervals, points and sets, part by part, whatever their brackets."""
    parts = split_parts(pred[1:-1]), split_parts(gt[1:-1])
    same_length = len(parts[0]) == len(parts[1]) > 1
    return same_length and all(equal(a, b) for a, b in zip(*parts))


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


def equal_equations(pred, gt):
    """Is left minus right the same, or the same with the other sign?"""
    ours, theirs = (f"{left}-({right})" for left, right in (pred.split("="), gt.split("=")))
    return symbolic(ours, theirs) or symbolic(f"-({ours})", theirs)


def symbolic(pred, gt, exactly=False):
    """math-verify's verdict: both read as LaTeX or plain expressions, compared by sympy.

    exactly: floats must agree to 12 decimals rather than 6, and both sides are read as a whole: no
    unit is dropped, and no number picked out of what is no LaTeX.
    Its own time-outs are off: they count the clock's seconds, and worker.py the processor's.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = (LatexExtractionConfig(), ExprExtractionConfig())
    if exactly:
        whole = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
        config = (LatexExtractionConfig(normalization_config=whole),)
    sides = [re.sub(r"(?<=\d)\(", r"\\cdot(", side) for side in (gt, pred)]  # 2(3) is a product
    parsed = [parse(f"${side}$", extraction_config=config, parsing_timeout=None) for side in sides]
    return bool(verify(*parsed, float_rounding=12 if exactly else 6, timeout_seconds=None))
