"""A coloured passage as a small SVG, for a paper or a README: `python -m tools.explore tokens --passage FILE.svg`."""

from xml.sax.saxutils import escape

import torch

import slm
from common.files import write_atomic

HOT, COLD = (
    (240, 138, 36),
    (112, 170, 232),
)  # the page's: still to learn; what the reference does not know
LIMIT = 3.0  # nats at which the colour is full
WIDTH, CHAR, LINE = 92, 8.43, 21  # characters a line, width of one, height of a line


def kept_tokens(micro_batches, valid, loss, ref_loss, k, scope):
    """What slm.py keeps of the windows by excess loss, (N, T) bool; ranked within each micro-batch or window."""
    kept, at = [], 0
    for windows in micro_batches:
        part = slice(at, at := at + len(windows))
        tokens = slm.Tokens(
            loss=torch.from_numpy(loss[part]), ref_loss=torch.from_numpy(ref_loss[part])
        )
        kept.append(slm.Selection(k, scope=scope).mask(tokens, torch.from_numpy(valid[part])))
    return torch.cat(kept).numpy()


def colour(excess):
    end, share = (HOT if excess > 0 else COLD), min(1, abs(excess) / LIMIT)
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in end)


def box(x, y, width, height, fill):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}"/>'


def draw(path, documents, note):
    """`documents`: for each a list of (text, excess, kept, valid), a token each. Kept tokens are underlined."""
    boxes, texts, x, y = [], [], 0, 1
    for n, document in enumerate(documents):
        y, x = y + (n > 0) * 1.55, 0
        for text, excess, kept, valid in document:
            for i, part in enumerate(text.replace("\t", " ").split("\n")):
                if i:
                    y, x = y + 1, 0
                while part:
                    here, part = part[: WIDTH - x], part[WIDTH - x :]
                    left, top, width = 14 + x * CHAR, 14 + (y - 1) * LINE, len(here) * CHAR
                    if valid:
                        boxes.append(box(left, top, width, LINE - 3, colour(excess)))
                    if kept:
                        boxes.append(box(left, top + LINE - 4, width, 2, "#111"))
                    texts.append(
                        f'<text x="{left:.1f}" y="{top + 13:.1f}" textLength="{width:.1f}" '
                        f'xml:space="preserve" fill="{"#111" if valid else "#666"}">{escape(here)}</text>'
                    )
                    x += len(here)
                    if part:
                        y, x = y + 1, 0
    width, height = 28 + WIDTH * CHAR, 14 + (y + 2.2) * LINE
    write_atomic(
        path,
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-size="14" '
                f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">',
                f"<title>{escape(note)}</title>",
                '<rect width="100%" height="100%" fill="#fff"/>',
                *boxes,
                *texts,
                f'<text x="14" y="{height - 10:.1f}" fill="#444" font-family="sans-serif" font-size="13">{escape(note)}</text>',
                "</svg>",
                "",
            ]
        ),
    )
    print(path)
