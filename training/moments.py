"""The forms in which AdamW's two moments are kept (`--moments`), and their bytes."""

import importlib.util
import math

from common.errors import UserError

FORMS = ("float32", "bfloat16", "int8")
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = (32, 256)  # int8: numbers that share a scale, at least and at most
QUANTISED = 4096  # int8: smaller matrices stay fp32, as in bitsandbytes


def refuse_missing(moments):
    """Raises UserError where a form of the moments needs a package that is not there."""
    if moments == "int8" and importlib.util.find_spec("torchao") is None:
        raise UserError("--moments int8: needs torchao, which is not here: pip install torchao")


def block_size(shape):
    """`--moments int8`: numbers of a parameter's row that share a scale; None: it stays fp32."""
    if len(shape) != 2 or math.prod(shape) < QUANTISED:
        return None
    least, most = BLOCKS
    divisors = [n for n in range(least, most + 1) if shape[1] % n == 0]
    return max(divisors, default=None)


def moment_bytes(shape, moments):
    """Bytes that both moments of a parameter take in one of the FORMS."""
    n = math.prod(shape)
    block = block_size(shape)
    if moments == "int8" and block:
        return 2 * (n + 4 * n // block)
    return 4 * n if moments == "bfloat16" else 8 * n
