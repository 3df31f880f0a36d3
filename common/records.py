"""The kit's JSON files, read."""

import json
from pathlib import Path

from common.errors import UserError


def read_json(path, what):
    """The JSON object in `path`. Raises UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error})") from None
