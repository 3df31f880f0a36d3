"""Stage 2: the reference's loss on every token of the corpus, computed once (Rho-1, section 2.2).

    python score.py                           # the demo
    python score.py --model out/ref --data data/owm --out out/owm/ref_loss.bin \\
        --seq-len 2048 --batch-size 16                                               # one GPU
    torchrun --nproc-per-node 8 score.py ...  # the windows shared out over eight

The windows are the ones that train_slm.py cuts, so every loss is stored with the context that the
student will have. Interrupted, the same command goes on, and the file ends the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import demo.chain
import slm
from common import aside, files
from common.checksums import Checksums
from common.command_line import Parser, add_machine, whole
from common.errors import UserError, cli
from common.json_files import read_json
from common.numerics import SAID, notice, numerics
from common.records import as_record, at_least
from data import STORED_FORMAT, TokenSet, entropy_path
from hf import checkpoint, models
from training import parallel

START_OVER = "bring it back, or start over with --overwrite"
CHUNK = 64  # batches between two notes of how far scoring has come


def arguments(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("input")
    group.add_argument("--model", help="the reference: folder or hub id; default: the demo's")
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument(
        "--data", metavar="DIR", help="token set to score; default: the demo's corpus"
    )
    group.add_argument("--seq-len", type=whole(1), default=128, help="as train_slm.py will use")
    group.add_argument("--batch-size", type=whole(1), default=32, help="windows per forward pass")
    group.add_argument(
        "--document-mask", action="store_true", help="attention stays in a document, as in training"
    )
    group.add_argument(
        "--context",
        type=whole(2),
        help="most tokens that a prediction sees, and at least half as many; default: the window",
    )
    group.add_argument("--verify", action="store_true", help="read and hash the token set first")
    group = parser.add_argument_group("machine")
    add_machine(group, "of the forward pass, must be the student's")
    switch = ["auto", "on", "off"]
    group.add_argument(
        "--compile", default="auto", choices=switch, help="torch.compile; auto is on a GPU"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", metavar="FILE", help="the losses, NAME.bin; NAME.json is their note"
    )
    group.add_argument("--entropy", action="store_true", help="store each prediction's entropy too")
    group.add_argument("--overwrite", action="store_true", help="start over")
    return parser.parse_args(argv)


def main():
    args = arguments()
    demo.chain.ensure(args, "score")
    check(args)
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    folder = models.folder_of(args.model, args.revision, data, env)
    header = {
        "format": STORED_FORMAT,
        "data": data.hash,
        "reference": env.from_main(lambda: checkpoint.model_hash(folder)),
        "seq_len": args.seq_len,
        "count": data.count,
        "entropy": args.entropy,
        "context": args.context,
        **numerics(args, env, args.batch_size),
    }
    note = env.from_main(lambda: claim(args, header, data))
    if note["n_scored"] < data.n_windows(args.seq_len):
        reference = checkpoint.load(folder, device=env.device)
        if args.document_mask:
            models.mask_documents(reference, data)
        reference.cast_products(env.dtype)
        model = slm.WithLoss(reference).eval()
        parallel.compile_blocks(model, args, env)
        score(args, env, data, model, note)
    if env.main:
        print(f"{args.out}: {data.count - 1:,} targets scored by {args.model}")


def check(args):
    if not (args.model and args.data and args.out):
        raise UserError(
            "--model, --data and --out go together: name all three, or none for the demo"
        )
    if args.context and (args.context % 2 or args.context >= args.seq_len):
        raise UserError(
            f"--context: got {args.context}, wanted an even number below --seq-len {args.seq_len}"
        )
    if Path(args.out).suffix == ".json":
        raise UserError(
            f"--out {args.out}: the note beside the losses has that name; name a file such as "
            f"ref_loss.bin"
        )
    for path in (args.out, Path(args.out).with_suffix(".json"), *files_of(args)):
        files.refuse_overlap(path, {"--model": args.model, "--data": args.data})


@dataclass
class Note:
    """What the kit itself reads of the note beside the losses."""

    n_scored: Annotated[int, at_least(0)]
    checksums: dict[str, list[int]]


def files_of(args):
    """The files of values: losses, and with --entropy entropies."""
    if args.entropy:
        return [Path(args.out), entropy_path(args.out)]
    return [Path(args.out)]


def size_of(windows, data, seq_len):
    """Bytes of a file that holds so many windows: float16 values, the first token's is NaN."""
    return 2 * min(data.count, windows * seq_len + 1) if windows else 0


def claim(args, header, data):
    """Settle what lies at --out. Returns the note: what is known of the file, and how far it is."""
    out = Path(args.out)
    note = out.with_suffix(".json")
    files.refuse_taken([note, *files_of(args), out.parent / place_of(out)])
    if not args.overwrite or not is_broken(note):
        refuse_other(out, note)
    files.lock(out)
    settle_aside(args)
    if not note.exists():
        begun = {**header, "n_scored": 0, "checksums": {}}
        files.write_atomic(note, json.dumps(begun, indent=1))
        return begun
    saved = read_json(note, "reference losses", START_OVER)
    as_record(saved, Note, f"reference losses: {note}", "start over with --overwrite")
    differing = [
        f"{key} {saved.get(key)!r} -> {value!r}"
        for key, value in header.items()
        if saved.get(key) != value and key not in SAID
    ]
    if differing:
        raise UserError(
            f"{out} holds other losses ({'; '.join(differing)}); choose another --out or "
            f"start over with --overwrite"
        )
    if saved["n_scored"] < data.n_windows(args.seq_len) and (said := notice(out, saved, header)):
        print(said)
    for path in files_of(args):
        size = path.stat().st_size if path.exists() else 0
        wanted = size_of(saved["n_scored"], data, args.seq_len)
        if size < wanted:
            raise UserError(
                f"{path} has {size} bytes, {note.name} says that {wanted} were written; it was "
                f"cut: start over with --overwrite"
            )
    if saved["n_scored"]:  # a kill came before the first losses could do so
        aside.discard(out.parent, place_of(out))
    return saved


def is_broken(note):
    """Is there a note that cannot be read? --overwrite is then the way out."""
    if not note.exists():
        return False
    try:
        read_json(note, "note")
    except UserError:
        return True
    return False


def refuse_other(out, note):
    """Raises UserError where the kit wrote something at `out` that are no losses."""
    began_over = (out.parent / place_of(out)).exists()
    if not out.exists() or out.stat().st_size == 0 or began_over:
        return
    if not note.exists() or "n_scored" not in read_json(note, "reference losses", START_OVER):
        raise UserError(
            f"--out {out}: is there, and {note.name} is no note of losses beside it; "
            f"name another file"
        )


def settle_aside(args):
    """--overwrite: what is there stays aside until there are new losses."""
    out = Path(args.out)
    if args.overwrite:
        names = {path.name for path in (out, entropy_path(out), out.with_suffix(".json"))}
        aside.set_aside(out.parent, names=names, place=place_of(out))
    else:
        aside.put_back(out.parent, place_of(out))
    if not entropy_path(out).exists():
        files.remove(entropy_path(out))  # the list must not name what is not there
    files.unlock(out)  # the lock went along
    files.lock(out)


def place_of(out):
    """The name of the folder for what --overwrite sets aside."""
    return f".before-{Path(out).name}"


def score(args, env, data, model, note):
    T = args.seq_len
    n_windows = data.n_windows(T)
    n_scored = note["n_scored"]
    chunk = CHUNK * args.batch_size
    losses = []
    if env.main:  # one rank writes
        known = note["checksums"]
        size = size_of(n_scored, data, T)
        losses = [Losses(path, size, known.get(path.name, [])) for path in files_of(args)]
    bar = tqdm(
        total=n_windows, initial=n_scored, desc=args.out, unit="window", disable=not env.main
    )
    for start in range(n_scored, n_windows, chunk):
        end = min(n_windows, start + chunk)
        score_chunk(args, env, data, model, losses, start, end, bar)
        if env.main:
            checksums = {file.path.name: file.save() for file in losses}
            note |= {"n_scored": end, "checksums": checksums}
            files.write_atomic(Path(args.out).with_suffix(".json"), json.dumps(note, indent=1))
            aside.discard(Path(args.out).parent, place_of(args.out))
    bar.close()


class Losses(files.Growing):
    """A file of float16 values, with its checksums."""

    def __init__(self, path, size, known):
        super().__init__(path, size)
        self.checksums = Checksums(path, size, known)
        if size and self.checksums.all() != known:
            raise UserError(
                f"{path}: was changed since it was scored, its checksum differs; {START_OVER}"
            )
        if size == 0:
            self.append(np.full(1, np.nan))  # nothing predicts the first token

    def append(self, values):
        content = np.asarray(values, "<f2").tobytes()
        self.write(content)
        self.checksums.add(content)

    def save(self):
        """The values so far are on the disk. Returns their checksums."""
        self.to_disk()
        return self.checksums.all()


def score_chunk(args, env, data, model, files, start, end, bar):
    """Windows start..end, `--batch-size` a rank at a time."""
    T, size = args.seq_len, args.batch_size
    for first in range(start, end, size * env.world):
        # Every rank makes the same number of forward passes.
        windows = np.arange(size) + first + env.rank * size
        x, y, _ = map(env.tensor, data.batch(windows.clip(max=end - 1), T))
        with torch.no_grad(), env.autocast():
            values = predicted(model, x, y, args)
        gathered = [torch.cat(env.gather(v.float())) for v in values]
        stop = min(first + size * env.world, end)
        at = first * T + 1
        last = min(data.count, stop * T + 1)
        for file, values in zip(files, gathered):
            file.append(finite(values.flatten()[: last - at], at, args.model))
        bar.update(stop - first)


def predicted(model, x, y, args):
    """[losses (B, T)], and with --entropy the entropies.

    With --context N windows are cut into pieces of N tokens, each N/2 behind the one before it. The
    second half of a piece is what counts, of the first piece all: a target behind the first N/2
    is predicted from N/2 to N tokens, as LongCE does with a sliding window.
    """
    wants = ("entropy",) if args.entropy else ()
    if not args.context:
        out = model(x, y, wants=wants)
        return out if wants else [out]
    T, half = x.shape[1], args.context // 2
    n_pieces = max(1, -(-T // half) - 1)
    padding = (0, (n_pieces + 1) * half - T)
    pieces = [F.pad(ids, padding).unfold(1, 2 * half, half).flatten(0, 1) for ids in (x, y)]
    out = model(*pieces, wants=wants)  # (B * n_pieces, N)
    columns = []
    for values in out if wants else [out]:
        values = values.view(len(x), n_pieces, 2 * half)
        first, later = values[:, 0, :half], values[:, :, half:].flatten(1)
        columns.append(torch.cat([first, later], dim=1)[:, :T])
    return columns


def finite(values, at, model):
    """The values as float16, the first is token `at`'s. Raises UserError: one is not finite."""
    values = values.to(torch.float16).cpu().numpy()
    if not np.isfinite(values).all():
        first = at + int(np.argmin(np.isfinite(values)))
        raise UserError(
            f"{model} gives a loss that is not finite at token {first}; it cannot be a reference"
        )
    return values


if __name__ == "__main__":
    cli(main)
