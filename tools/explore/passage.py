"""A coloured passage as a small SVG, for a paper or a README.

python -m tools.explore tokens ... --passage FILE.svg
"""

from xml.sax.saxutils import escape

import torch

import slm
from common.files import write_atomic

HOT = (240, 138, 36)  # the page's colour of what is still to learn
COLD = (112, 170, 232)  # and of what the reference does not know
LIMIT = 3.0  # nats at which the colour is full
WIDTH = 92  # characters a line
CHAR = 8.43  # width of a character
LINE = 21  # height of a line
GAP = 1.55  # lines from one document to the next
MARGIN = 14


def kept_tokens(micro_batches, valid, tokens, selection):
    """What an slm.Selection keeps of the windows, (N, T) bool; tokens: slm.Tokens of (N, T).

    Ranked within each micro-batch or window; `micro_batches`: lists of windows, N in all.
    """
    kept = []
    start = 0
    for windows in micro_batches:
        part = slice(start, start + len(windows))
        here = slm.Tokens(**{name: values[part] for name, values in vars(tokens).items()})
        kept.append(selection.mask(here, torch.from_numpy(valid[part])))
        start = part.stop
    return torch.cat(kept).numpy()


def colour(excess):
    """From white at an excess loss of 0 to HOT above it and COLD below."""
    end = HOT if excess > 0 else COLD
    share = min(1, abs(excess) / LIMIT)
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in end)


def box(x, y, width, height, fill):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}"/>'


def word(x, y, width, fill, text):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" textLength="{width:.1f}" '
        f'xml:space="preserve" fill="{fill}">{escape(text)}</text>'
    )


def laid_out(documents):
    """Where the text goes: yields (line, column, text, token) for each piece of a token that stands
    on one line. Lines are counted from 1; documents are GAP apart."""
    y = 1
    for n, document in enumerate(documents):
        if n > 0:
            y += GAP
        x = 0
        for token in document:
            text = token[0].replace("\t", " ")
            for i, part in enumerate(text.split("\n")):
                if i > 0:
                    y += 1
                    x = 0
                while part:
                    here, part = part[: WIDTH - x], part[WIDTH - x :]
                    yield y, x, here, token
                    x += len(here)
                    if part:
                        y += 1
                        x = 0


def draw(path, documents, note):
    """Write the picture; `note` stands below it.

    `documents`: for each a list of (text, excess, kept, valid), a token each. Kept tokens are
    underlined.
    """
    boxes, texts = [], []
    y = 1
    for y, x, here, (_, excess, kept, valid) in laid_out(documents):
        left = MARGIN + x * CHAR
        top = MARGIN + (y - 1) * LINE
        width = len(here) * CHAR
        if valid:
            boxes.append(box(left, top, width, LINE - 3, colour(excess)))
        if kept:
            boxes.append(box(left, top + LINE - 4, width, 2, "#111"))
        texts.append(word(left, top + 13, width, "#111" if valid else "#666", here))
    width = 2 * MARGIN + WIDTH * CHAR
    height = MARGIN + (y + 2.2) * LINE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-size="14" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">',
        f"<title>{escape(note)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        *boxes,
        *texts,
        f'<text x="14" y="{height - 10:.1f}" fill="#444" font-family="sans-serif" '
        f'font-size="13">{escape(note)}</text>',
        "</svg>",
    ]
    write_atomic(path, "\n".join(lines) + "\n")
    print(path)
