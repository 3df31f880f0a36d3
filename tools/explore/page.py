"""The token page: `python -m tools.explore tokens`.

One HTML file: tools/explore/page.html with tools/explore/page.js and the data put in.

The page ranks and selects by itself, by the rules of slm.py: the same scores, the same groups (the
micro-batches that the run's own loader cut), the same rounding and the same order among ties, on
the same fp32 losses. So for any k the tokens that it shows as kept are those that slm.py keeps.

Text is data and nothing else: it goes in as JSON with every "<", ">" and "&" escaped, the page
shows it through textContent, and its content security policy lets only the page's own script run,
and nothing be fetched.
"""

import base64
import hashlib
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

from common.device import Env

import numpy as np
import torch
from tqdm import tqdm

import slm
from common.errors import UserError
from common.files import write_atomic
from data import Loader, Stored, TokenSet, entropy_path
from hf.tokenizer import Tokenizer
from tools.explore import passage
from tools.explore.runs import batched, look, snapshots, spaced
from tools.explore.spelling import spell
from training.finished import arguments
from training.method_flags import selection_of
from training.noise import noise

TOP = 3  # predictions shown
PAGE_SCORES = ("excess", "loss", "ref_loss", "ref_entropy", "ref_and", "ref_or")  # in page.js
SCOPES = ("micro", "sequence", "batch")  # that the page can show
BUDGET = 2_900_000  # bytes of the page up to which it holds every snapshot's predictions


def main(args):
    if args.windows < 1 or args.models < 1:
        raise UserError(
            f"--windows {args.windows} and --models {args.models}: wanted at least 1 of each"
        )
    env = Env(args)
    saved = arguments(args.run)
    data = TokenSet(args.data)
    seq_len = saved["seq_len"]
    losses = Stored(args.ref_loss, data, seq_len)
    entropies = None
    if losses.meta["entropy"] and entropy_path(args.ref_loss).exists():
        entropies = Stored(args.ref_loss, data, seq_len, entropy=True)
    models = spaced(snapshots(args.run), args.models)
    micro_batches, batch_of, step_of = choose_windows(saved, data, args.windows)
    mask = saved.get("document_mask", False)
    if args.passage:
        check_documents(args.documents, data, np.concatenate(micro_batches), seq_len)
    seen = []
    total = len(models) * sum(map(len, micro_batches))
    with tqdm(total=total, unit="window") as bar:  # over all models
        for _, folder in models:
            seen.append(look(folder, data, micro_batches, seq_len, env, TOP, mask, bar))

    windows = np.concatenate(micro_batches)
    valid = data.valid(windows, seq_len)  # (windows, T)
    ref_loss = losses.batch(windows, valid)
    ref_entropy = entropies.batch(windows, valid) if entropies else None
    labels = data.labels(windows, seq_len)
    steps = [step for step, _ in models]
    page = {
        **settings(args, saved, data, steps),
        **groups(micro_batches, batch_of),
        "valid": packed(valid, "u1"),
        "ref_loss": packed(ref_loss, "<f4"),
        "ref_entropy": None if ref_entropy is None else packed(ref_entropy, "<f4"),
        "kind": None if labels is None else packed(labels, "u1"),
        **text_of(data, windows, seq_len, seen),
    }
    known = {"ref_loss": ref_loss, "ref_entropy": ref_entropy}
    by_step = zip(micro_batches, step_of)
    known["noise"] = np.concatenate([noise(saved["seed"], s, w, seq_len) for w, s in by_step])
    page["score"] = score_shown(page["k"], page["score"], known)
    if args.passage:
        tokens = tokens_of(known, seen[0]["loss"])
        draw_passage(args, page, saved, steps[0], tokens, valid, micro_batches)
    page["token"] = packed(page["token"], "<u2")
    put_ranking(page, saved, known, valid, seen)
    put_models(page, seen)
    html = fill(page)
    write_atomic(args.out, html)
    print(
        f"{args.out}: {len(windows)} windows, {int(valid.sum()):,} targets, {len(models)} models, "
        f"{len(html.encode()) / 1e6:.2f} MB"
    )


def settings(args, saved, data, steps):
    """What the page starts with: the run's own settings, and the names of what it shows."""
    sources = data.meta.get("sources") or []
    return {
        "title": f"{Path(args.run).name}: {data.folder}",
        "T": saved["seq_len"],
        "k": saved.get("k", 1.0),
        "top": TOP,
        "score": saved.get("score", "excess"),
        "scope": scope_shown(saved.get("scope")),
        "snapshots": [{"step": step} for step in steps],
        "kinds": data.kinds,
        "sources": [source["name"] for source in sources] or ["all"],
    }


def scope_shown(scope):
    """What the page ranks within at first: the run's scope, where the page knows it."""
    if scope == "set":
        print("note: the run ranked its whole corpus at once; the page ranks within micro-batches")
    return scope if scope in SCOPES else "micro"


def groups(micro_batches, batch_of):
    """Of each window shown its number, its micro-batch, and its optimiser batch where known."""
    sizes = [len(windows) for windows in micro_batches]
    return {
        "windows": np.concatenate(micro_batches).tolist(),
        "batch": batch_of and np.repeat(batch_of, sizes).tolist(),
        "micro": np.repeat(np.arange(len(sizes)), sizes).tolist(),
    }


def tokens_of(known, loss):
    """slm.Tokens of all windows: the student's loss (windows, T), and what is known beside it."""
    tokens = slm.Tokens(loss=torch.from_numpy(loss))
    for name, values in known.items():
        if values is not None:
            setattr(tokens, name, torch.from_numpy(values))
    return tokens


def score_shown(k, name, known):
    """What the page ranks by at first: the run's own score, where all that it reads is known.

    `known`: {field of slm.Tokens: its values or None}. Raises UserError for a score that the kit
    does not have.
    """
    if k == 1:  # it ranked nothing
        return "excess"
    if name not in slm.SCORES:
        raise UserError(f"--run: it ranked by {name}, which SCORES of slm.py does not hold")
    method = slm.SCORES[name]
    missing = [field for field in method.needs if field != "loss" and known.get(field) is None]
    if missing:
        print(f"note: the run ranked by {name}; without its {missing[0]} the page ranks by excess")
        return "excess"
    chooses = isinstance(method, slm.Weight) or method.choose
    if chooses and name not in PAGE_SCORES:
        print(f"note: the run chose by {name}, which is no ranking; the page ranks by excess")
        return "excess"
    return name


def chosen_by(score, k, saved, scope="micro"):
    """The slm.Selection of a score, with what the run's --set says of its own."""
    numbers = saved.get("set") if score == saved.get("score") else None
    flags = SimpleNamespace(k=k, score=score, scope=scope, rank_windows=None, set=numbers)
    return selection_of(flags)


def put_ranking(page, saved, known, valid, seen):
    """Where the run ranked by something that the page cannot compute: each token's value of it."""
    name = page["score"]
    if name in PAGE_SCORES:
        return
    for shown, found in zip(page["snapshots"], seen):
        selection = chosen_by(name, page["k"], saved)
        values = selection.values(tokens_of(known, found["loss"]), torch.from_numpy(valid))
        shown["own"] = packed(values.numpy(), "<f4")


def put_models(page, seen):
    """Put into the page what each model says; `seen`: what `look` found, top_id by the page's ids.

    Predictions of all models but the last are left out where the page would pass BUDGET.
    """
    snapshots = page["snapshots"]
    for shown, found in zip(snapshots, seen):
        shown["loss"] = packed(found["loss"], "<f4")
        shown["entropy"] = packed(np.rint(found["entropy"] * 16).clip(0, 255), "u1")
    room = BUDGET - len(json.dumps(page))
    # An id takes 2 bytes and a probability 1; in base64 that makes 4.
    all_fit = 4 * seen[0]["top_id"].size * len(seen) <= room
    first = 0 if all_fit else len(seen) - 1
    for shown, found in zip(snapshots[first:], seen[first:]):
        shown["top_id"] = packed(found["top_id"], "<u2")
        shown["top_p"] = packed(np.rint(found["top_p"] * 255), "u1")


def draw_passage(args, page, saved, step, tokens, valid, micro_batches):
    """`--passage`: the documents `--documents` as the first model shown sees them.

    tokens: slm.Tokens of (windows, T), as is valid. Kept is what the run's own score keeps, or the
    excess where it kept every token. The scopes batch and set are ranked within micro-batches.
    """
    k, score = (page["k"], page["score"]) if page["k"] < 1 else (0.6, "excess")
    scope = page["scope"] if page["scope"] != "batch" else "micro"
    selection = chosen_by(score, k, saved, scope)
    kept = passage.kept_tokens(micro_batches, valid, tokens, selection)
    excess = (tokens.loss - tokens.ref_loss).numpy()
    documents = []
    for n in args.documents:
        row, start, end, _ = page["pieces"][n - 1]
        document = []
        for j in range(start, end):
            text = page["words"][page["token"][row, j]]
            text = page["spelt"].get(row * page["T"] + j, text)
            document.append((text, excess[row, j], kept[row, j], valid[row, j]))
        documents.append(document)
    by = "" if score == "excess" else f" by {score}"
    note = (
        f"Excess loss after {step} steps: orange, the reference knows it better; "
        f"blue, it knows it less. Underlined: kept at k = {k:g}{by}."
    )
    passage.draw(args.passage, documents, note)
    characters = {c for document in documents for text, *_ in document for c in text}
    if {"R", "AL"}.intersection(map(unicodedata.bidirectional, characters)):
        print(
            f"note: {args.passage} draws all text from left to right; the page shows it as it reads"
        )


def check_documents(numbers, data, windows, seq_len):
    """Raises UserError where the windows do not hold so many documents, before a model is run."""
    targets = data.cut(data.tokens, windows, seq_len, fill=0)
    count = len(pieces_of(data, windows, targets, Tokenizer.load(data.folder).eos_id))
    for n in numbers:
        if not 1 <= n <= count:
            raise UserError(
                f"--documents: got {n}, wanted numbers from 1 to {count}, as the page has them"
            )


def choose_windows(saved, data, wanted):
    """Which windows are shown: whole micro-batches, as near to `wanted` windows as they come.

    Returns (lists of window numbers, the optimiser batch that each list belongs to, its step). The
    second is None where the batches are not whole, so that the batch scope cannot be computed.

    On the run's own data they are micro-batches that the run trained on, of evenly spaced steps; on
    another token set windows in order, cut to the same size.
    """
    size = saved.get("rank_windows") or saved["micro_batch_size"]
    batch = saved["batch_size"]
    n = data.n_windows(saved["seq_len"])
    if saved["inputs"]["data"] != data.hash:
        micro_batches = batched(np.arange(min(wanted, n)), size)
        per_batch = max(1, batch // size)
        batch_of = [i // per_batch for i in range(len(micro_batches))]
        return micro_batches, batch_of, batch_of
    loader = Loader(n, batch, saved["seed"])
    steps = spaced(range(saved["steps"]), max(1, min(wanted, n) // batch))
    if batch > wanted:
        micro_batches = loader.micro_batches(steps[0], size)[: max(1, wanted // size)]
        return micro_batches, None, [steps[0]] * len(micro_batches)
    micro_batches, batch_of, step_of = [], [], []
    for i, step in enumerate(steps):
        of_step = loader.micro_batches(step, size)
        micro_batches += of_step
        batch_of += [i] * len(of_step)
        step_of += [step] * len(of_step)
    return micro_batches, batch_of, step_of


def text_of(data, windows, seq_len, seen):
    """The words of the page, which has ids of its own: of the tokens that appear in it.

    words   each token's text
    token   (windows, T) ids of the targets
    first   id of the token before each window's first target
    spelt   {target: text} where a character is spread over several tokens
    pieces  [row, first target, end, source]: the documents, or parts of them, that the rows hold

    Replaces the ids in seen[...]["top_id"] by the page's.
    """
    tokenizer = Tokenizer.load(data.folder)
    first = data.cut(data.tokens, windows, seq_len, fill=0, shift=0)[:, :1]
    targets = data.cut(data.tokens, windows, seq_len, fill=0)
    every = [first.ravel(), targets.ravel(), *(found["top_id"].ravel() for found in seen)]
    used = np.unique(np.concatenate(every))
    if len(used) > 65535:
        raise UserError(
            f"--windows: the page would hold {len(used)} different tokens, wanted below 65,536; "
            f"show fewer"
        )
    for found in seen:
        found["top_id"] = np.searchsorted(used, found["top_id"])
    words = [spell([tokenizer.token_bytes(int(i))])[0] for i in used]
    spelt = {}
    for r, row in enumerate(np.concatenate([first, targets], 1)):
        together = spell([tokenizer.token_bytes(int(i)) for i in row])
        alone = [words[i] for i in np.searchsorted(used, row)]
        for j in range(seq_len):
            if alone[j + 1] != together[j + 1]:
                spelt[r * seq_len + j] = together[j + 1]
    return {
        "words": words,
        "spelt": spelt,
        "pieces": pieces_of(data, windows, targets, tokenizer.eos_id),
        "token": np.searchsorted(used, targets),
        "first": np.searchsorted(used, first[:, 0]).tolist(),
    }


def pieces_of(data, windows, targets, eos_id):
    """[row, first target, end, source] of each document, or part of one, in the windows.

    targets (windows, T). A document begins after an EOS; where there is none a window is one piece.
    """
    seq_len = targets.shape[1]
    sources = data.meta.get("sources") or []
    ends = np.cumsum([source["tokens"] for source in sources])
    pieces = []
    for r, window in enumerate(windows):
        begins = int(window) * seq_len + 1  # the position of the row's first target
        length = min(seq_len, data.count - begins)  # the last window is padded
        starts = [0]
        if eos_id is not None:
            starts += (np.flatnonzero(targets[r, :-1] == eos_id) + 1).tolist()
        starts = [start for start in starts if start < length]
        for start, end in zip(starts, [*starts[1:], length]):
            source = np.searchsorted(ends, begins + start, "right")
            source = int(source.clip(0, max(0, len(ends) - 1)))
            pieces.append([r, start, end, source])
    return pieces


def packed(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()


def fill(page):
    """page.html with the data, the script, and the script's hash, which the content security policy
    names."""
    here = Path(__file__).parent
    script = (here / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(page, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    html = (here / "page.html").read_text()
    html = html.replace("SCRIPT_HASH", f"sha256-{digest}")
    html = html.replace("PAGE_SCRIPT", script)
    return html.replace("PAGE_DATA", text)
