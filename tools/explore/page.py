"""The token page: `python -m tools.explore tokens`. One HTML file: tools/explore/page.html with tools/explore/page.js
and the data put in.

The page ranks and selects by itself, by the rules of slm.py: the same scores, the same groups (the micro-batches that
the run's own loader cut), the same rounding and the same order among ties, on the same fp32 losses. So for any k the
tokens that it shows as kept are those that slm.py keeps.

Text is data and nothing else: it goes in as JSON with every "<", ">" and "&" escaped, the page shows it through
textContent, and its content security policy lets only the page's own script run, and nothing be fetched.
"""

import base64
import hashlib
import json
import unicodedata
from pathlib import Path

from common.device import Env

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from data import Loader, Stored, TokenSet, entropy_path
from hf.tokenizer import Tokenizer
from tools.explore import passage as picture
from tools.explore import runs as explore_run

TOP = 3  # predictions shown
BUDGET = 2_900_000  # bytes of the page up to which every snapshot's predictions are put in; beyond it the last one's
SHOWN = {0x0A: "↵\n", 0x0D: "␍", 0x09: "⇥\t", 0x7F: "␡"}


def main(args):
    env = Env(args)
    saved = explore_run.run_arguments(args.run)
    data, T = TokenSet(args.data), saved["seq_len"]
    ref_loss = Stored(args.ref_loss, data, T)
    ref_entropy = (
        Stored(args.ref_loss, data, T, entropy=True)
        if entropy_path(args.ref_loss).exists()
        else None
    )
    if args.windows < 1 or args.models < 1:
        raise UserError(
            f"--windows {args.windows} and --models {args.models}: wanted at least 1 of each"
        )
    models = explore_run.spaced(explore_run.snapshots(args.run), args.models)
    micro_batches, batch_of = choose_windows(saved, data, args.windows)
    seen = [explore_run.look(folder, data, micro_batches, T, env, top=TOP) for _, folder in models]

    rows = np.concatenate(micro_batches)
    valid = data.valid(rows, T)
    page = {
        "title": f"{Path(args.run).name}: {data.folder}",
        "T": T,
        "k": saved.get("k", 1.0),
        "top": TOP,
        "score": saved.get("score", "excess"),
        "scope": saved.get("scope", "micro"),
        "snapshots": [{"step": step} for step, _ in models],
        "kinds": data.kinds,
        "sources": [source["name"] for source in data.meta.get("sources") or []] or ["all"],
        "windows": rows.tolist(),
        "batch": batch_of and np.repeat(batch_of, [len(m) for m in micro_batches]).tolist(),
        "micro": np.repeat(np.arange(len(micro_batches)), [len(m) for m in micro_batches]).tolist(),
        "valid": packed(valid, "u1"),
        "ref_loss": packed(ref_loss.batch(rows, valid), "<f4"),
        "ref_entropy": ref_entropy and packed(ref_entropy.batch(rows, valid), "<f4"),
        "kind": data.kinds and packed(data.labels(rows, T), "u1"),
    }
    page.update(text_of(data, rows, T, seen))
    if args.passage:
        passage(
            args,
            page,
            models[0][0],
            seen[0]["loss"],
            ref_loss.batch(rows, valid),
            valid,
            micro_batches,
        )
    page["token"] = packed(page["token"], "<u2")
    for shown, found in zip(page["snapshots"], seen):
        shown["loss"] = packed(found["loss"], "<f4")
        shown["entropy"] = packed(np.rint(found["entropy"] * 16).clip(0, 255), "u1")
    room = BUDGET - len(json.dumps(page))
    if room < 4 * rows.size * T * TOP * len(models):  # base64 of 2 bytes an id and 1 a probability
        seen[:-1] = [{} for _ in seen[:-1]]
    for shown, found in zip(page["snapshots"], seen):
        if found:
            shown["top_id"] = packed(found["top_id"], "<u2")
            shown["top_p"] = packed(np.rint(found["top_p"] * 255), "u1")
    html = fill(page)
    write_atomic(args.out, html)
    print(
        f"{args.out}: {len(rows)} windows, {int(valid.sum()):,} targets, {len(models)} models, "
        f"{len(html.encode()) / 1e6:.2f} MB"
    )


def passage(args, page, step, loss, ref_loss, valid, micro_batches):
    """`--passage`: the documents `--documents` as the first model shown sees them."""
    T, k, scope = (
        page["T"],
        page["k"] if page["k"] < 1 else 0.6,
        page["scope"] if page["scope"] != "batch" else "micro",
    )
    kept = picture.kept_tokens(micro_batches, valid, loss, ref_loss, k, scope)
    documents = []
    for n in args.documents:
        if not 1 <= n <= len(page["pieces"]):
            raise UserError(f"--documents: got {n}, wanted numbers from 1 to {len(page['pieces'])}")
        row, start, end, _ = page["pieces"][n - 1]
        documents.append(
            [
                (
                    page["spelt"].get(row * T + j, page["words"][page["token"][row, j]]),
                    loss[row, j] - ref_loss[row, j],
                    kept[row, j],
                    valid[row, j],
                )
                for j in range(start, end)
            ]
        )
    picture.draw(
        args.passage,
        documents,
        f"Excess loss after {step} steps: orange, the reference knows it "
        f"better; blue, it knows it less. Underlined: kept at k = {k:g}.",
    )


def choose_windows(saved, data, wanted):
    """Which windows are shown: whole micro-batches, [window numbers], and the number of the optimiser batch that each
    belongs to (None where the batches are not whole, so that the batch scope cannot be computed).

    On the run's own data they are micro-batches that the run trained on, of evenly spaced steps; on another token set
    windows in order, cut to the same size.
    """
    T, size, batch = saved["seq_len"], saved["micro_batch_size"], saved["batch_size"]
    n = data.n_windows(T)
    if saved["inputs"]["data"] != data.hash:
        micro_batches = explore_run.batched(np.arange(min(wanted, n)), size)
        return micro_batches, [i // max(1, batch // size) for i in range(len(micro_batches))]
    loader = Loader(n, batch, saved["seed"])
    steps = explore_run.spaced(range(saved["steps"]), max(1, min(wanted, n) // batch))
    by_step = [loader.micro_batches(step, size) for step in steps]
    if batch > wanted:
        return by_step[0][: max(1, wanted // size)], None
    return [m for step in by_step for m in step], [
        i for i, step in enumerate(by_step) for _ in step
    ]


def text_of(data, rows, T, seen):
    """The words of the page: `words` (each token's text, by the page's own ids), `token` (those ids of the targets),
    `first` (of the token before each window's first target), `spelt` {target: text} where a character is spread over
    several tokens, and `pieces` [row, first target, end, source]: the documents, or parts of them, that rows hold.
    Replaces the ids in seen[...]["top_id"] by the page's."""
    tokenizer = Tokenizer.load(data.folder)
    first, targets = (
        data.cut(data.tokens, rows, T, fill=0, shift=0)[:, :1],
        data.cut(data.tokens, rows, T, fill=0),
    )
    used = np.unique(
        np.concatenate([first.ravel(), targets.ravel(), *(s["top_id"].ravel() for s in seen)])
    )
    if len(used) > 65535:
        raise UserError(
            f"--windows: the page would hold {len(used)} different tokens, wanted below 65,536; show fewer"
        )
    ends = np.cumsum([source["tokens"] for source in data.meta.get("sources") or []])
    spelt, pieces = {}, []
    for r, (window, row) in enumerate(zip(rows, np.concatenate([first, targets], 1))):
        alone = [spell([tokenizer.token_bytes(int(i))])[0] for i in row[1:]]
        together = spell([tokenizer.token_bytes(int(i)) for i in row])[1:]
        spelt.update({r * T + j: b for j, (a, b) in enumerate(zip(alone, together)) if a != b})
        starts = (
            [0, *(np.flatnonzero(row[1:-1] == tokenizer.eos_id) + 1)]
            if tokenizer.eos_id is not None
            else [0]
        )
        length = min(T, data.count - 1 - int(window) * T)  # the last window is padded
        starts = [int(s) for s in starts if s < length]
        for start, end in zip(starts, [*starts[1:], length]):
            position = int(window) * T + 1 + start
            pieces.append(
                [
                    r,
                    start,
                    end,
                    int(np.searchsorted(ends, position, "right").clip(0, max(0, len(ends) - 1))),
                ]
            )
    for found in seen:
        found["top_id"] = np.searchsorted(used, found["top_id"])
    return {
        "words": [spell([tokenizer.token_bytes(int(i))])[0] for i in used],
        "spelt": spelt,
        "pieces": pieces,
        "token": np.searchsorted(used, targets),
        "first": np.searchsorted(used, first[:, 0]).tolist(),
    }


def spell(tokens):
    """What to show for each of a row of tokens (bytes): its characters; a character that is spread over several tokens
    stands at the last of them, and the others, like bytes that are no text, show their bytes as ⟨E2⟩."""
    shown, raw = [""] * len(tokens), b"".join(tokens)
    owner = [i for i, token in enumerate(tokens) for _ in token]
    at = 0
    while at < len(raw):
        for n in range(1, 5):
            try:
                char = raw[at : at + n].decode()
            except UnicodeDecodeError:
                continue
            break
        else:
            n, char = 1, ""
        last = owner[min(at + n, len(raw)) - 1]
        for i in range(at, at + n):
            if not char or owner[i] != last:
                shown[owner[i]] += f"⟨{raw[i]:02X}⟩"
        shown[last] += visible(char)
        at += n
    return shown


def visible(char):
    """A character as the page shows it: controls, and what could reorder or hide text, by name; all else as it is."""
    if not char:
        return ""
    code = ord(char)
    if code in SHOWN:
        return SHOWN[code]
    if code < 32:
        return chr(0x2400 + code)
    if (
        unicodedata.category(char) in ("Cc", "Zl", "Zp")
        or unicodedata.category(char) == "Cf"
        and code not in (0x200C, 0x200D)
        and not 0xE0020 <= code <= 0xE007F
    ):  # joiners and flags are parts of letters and emoji
        return f"⟨U+{code:04X}⟩"
    return char


def packed(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()


def fill(page):
    """tools/explore/page.html with the data, tools/explore/page.js, and its hash, which the content security policy names."""
    template, script = (
        (Path(__file__).parent / name).read_text() for name in ("page.html", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(page, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    for mark, content in (
        ("SCRIPT_HASH", f"sha256-{digest}"),
        ("PAGE_SCRIPT", script),
        ("PAGE_DATA", text),
    ):
        template = template.replace(mark, content)
    return template
