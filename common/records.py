"""The kit's JSON files, read."""

import json
from pathlib import Path

from common.errors import UserError


def read_json(path, what, mend=""):
    """The JSON object in `path`. Raises UserError where it is missing or broken.

    `mend`: what the user can do, for the message.
    """
    mend = f"; {mend}" if mend else ""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist{mend}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}){mend}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{what}: {path} holds a {kind}, wanted an object{mend}")
    return content
