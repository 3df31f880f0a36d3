"""Where the tables stand in README.md and docs/: between two comments that name them.

    <!-- results: roundings by-seed -->
    | seed | ...
    <!-- end of results -->

The lines between them are made, never written by hand.
"""

import re

from common.errors import UserError
from tools.results.files import ROOT, load, replace_text
from tools.results.tables import render

BLOCK = re.compile(
    r"(?P<begin>^<!-- results: (?P<name>[a-z0-9 -]+?) -->\n)(?P<text>.*?)"
    r"(?P<end>^<!-- end of results -->$)",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"^<!-- results: .*$", re.MULTILINE)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def made(text, page):
    """A page's text with every table made again. Raises UserError for a mark that has no end."""
    if len(MARK.findall(text)) != len(BLOCK.findall(text)):
        raise UserError(
            f"{page}: a `<!-- results: NAME -->` has no `<!-- end of results -->` of its own; "
            f"write one below the table"
        )

    def table(found):
        experiment = load(found["name"].partition(" ")[0])
        lines = "\n".join(render(found["name"], experiment))
        return f"{found['begin']}\n{lines}\n\n{found['end']}"

    return BLOCK.sub(table, text)


def update(check):
    """Make the tables of all pages, or only compare; returns the pages that differ(ed)."""
    differ = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = made(text, page.relative_to(ROOT))
        if new == text:
            continue
        differ.append(str(page.relative_to(ROOT)))
        if not check:
            replace_text(page, new)
    return differ
