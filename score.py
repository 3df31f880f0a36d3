"""Stage 2: the reference's loss on every token of the corpus, computed once (Rho-1, section 2.2).

    python score.py                           # the demo
    python score.py --model out/ref --data data/owm --out out/owm/ref_loss.bin \\
        --seq-len 2048 --batch-size 16                                               # one GPU
    torchrun --nproc-per-node 8 score.py ...  # the windows shared out over eight

The windows are the ones that train_slm.py cuts, so every loss is stored with the context that the
student will have. Interrupted, the same command goes on, and the file ends the same.
"""

from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import demo.chain
import slm
from common import aside, files, owned
from common.checksums import Checksums
from common.command_line import Parser, add_compile, add_machine, whole
from common.compiling import compile_blocks
from common.errors import UserError, cli
from common.json_files import START_OVER
from common.numerics import numerics
from data import STORED_FORMAT, TokenSet, entropy_path
from hf import checkpoint, models
from training.identity import hash_of_validation
from training.losses_file import (
    claim,
    files_of,
    passes,
    paths_of,
    place_of,
    save_note,
    size_of,
)
from training.validation import mean_loss, validation_sets

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
        help="most tokens that a prediction sees; behind a window's beginning it sees at least "
        "half as many; default: the window",
    )
    group.add_argument("--verify", action="store_true", help="read and hash the token sets first")
    group.add_argument(
        "--val",
        nargs="+",
        metavar="DIR",
        help="token sets: note the reference's mean loss on each, too",
    )
    group = parser.add_argument_group("machine")
    add_machine(group, "of the forward pass, must be the student's")
    add_compile(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", metavar="FILE", help="the losses, NAME.bin; NAME.json is their note"
    )
    group.add_argument(
        "--entropy",
        action="store_true",
        help="store each prediction's entropy, too; losses that are there are left as they are",
    )
    group.add_argument("--overwrite", action="store_true", help="start over")
    return parser.parse_args(argv)


def main():
    args = arguments()
    demo.chain.ensure(args, "score")
    check(args)
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    sets = validation_sets(args, data, env)
    folder = models.folder_of(args.model, args.revision, data, env)
    header = {
        "format": STORED_FORMAT,
        "data": data.hash,
        "reference": env.from_main(lambda: checkpoint.model_hash(folder)),
        "seq_len": args.seq_len,
        "count": data.count,
        "model": args.model,
        "revision": args.revision,
        "entropy": args.entropy,
        "context": args.context,
        **numerics(args, env, args.batch_size),
    }
    note = env.from_main(lambda: claim(args, header, data))
    left = passes(args, data, note)
    unknown = [val for val in sets if validation_loss(note, val) is None]
    if left or unknown:
        reference = checkpoint.load(folder, device=env.device)
        if args.document_mask:
            models.mask_documents(reference, data)
        reference.cast_products(env.dtype)
        model = slm.WithLoss(reference).eval()
        # --context and --val have other shapes: a graph for each, none for every shape.
        compile_blocks(model, args, env, dynamic=False)
        for names in left:
            score(args, env, data, model, note, names)
        for val in unknown:
            add_validation(args, env, val, model, note)
    if env.main:
        too = f", with entropies in {entropy_path(args.out).name}" if note["entropy"] else ""
        print(f"{args.out}: {data.count - 1:,} targets scored by {args.model}{too}")
        for val in sets:
            print(f"{args.model}: validation loss {validation_loss(note, val):.4f} on {val.folder}")


def check(args):
    if not (args.model and args.data and args.out):
        raise UserError(
            "--model, --data and --out go together: name all three, or none for the demo"
        )
    if args.context and (args.context % 2 or args.context >= args.seq_len):
        raise UserError(
            f"--context: got {args.context}, wanted an even number below --seq-len {args.seq_len}"
        )
    if not Path(args.out).name or Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder, wanted a file such as ref_loss.bin")
    for path in (args.out, Path(args.out).with_suffix(".json"), *files_of(args)):
        read = {"--model": args.model, "--data": args.data, "--val": args.val}
        owned.refuse_overlap(path, read)
    if Path(args.out).exists():  # older versions took any name
        return
    if "ref_entropy" in Path(args.out).name or args.out.endswith(".entropy.bin"):
        raise UserError(f"--out {args.out}: is named as entropies are; wanted one as ref_loss.bin")
    if Path(args.out).suffix != ".bin":  # else two files of losses could have one note
        raise UserError(f"--out {args.out}: wanted a file that ends in .bin, such as ref_loss.bin")


def score(args, env, data, model, note, names=("loss",)):
    """A pass over the token set that stores what is named: "loss", "entropy", or both."""
    T = args.seq_len
    n_windows = data.n_windows(T)
    progress = note if "loss" in names else note["entropies"]
    n_scored = progress["n_scored"]
    chunk = CHUNK * args.batch_size * env.world
    paths = [paths_of(args)[name] for name in names]
    outputs = {}  # on the rank that writes
    if env.main:
        known = note["checksums"]
        size = size_of(n_scored, data, T)
        for name, path in zip(names, paths):
            outputs[name] = ValuesFile(path, size, known.get(path.name, []))
    bar = tqdm(
        total=n_windows, initial=n_scored, desc=str(paths[0]), unit="window", disable=not env.main
    )
    for start in range(n_scored, n_windows, chunk):
        end = min(n_windows, start + chunk)
        score_chunk(args, env, data, model, names, outputs, (start, end), bar)
        if env.main:
            note["checksums"] |= {f.path.name: f.save() for f in outputs.values()}
            progress["n_scored"] = end
            if "entropy" in names and end == n_windows:
                note["entropy"] = True
            save_note(args, note)
            aside.discard(Path(args.out).parent, place_of(args.out))
    bar.close()


class ValuesFile(files.Growing):
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


def score_chunk(args, env, data, model, names, outputs, chunk, bar):
    """Windows start..end, the `chunk`, `--batch-size` a rank at a time: append what is named."""
    start, end = chunk
    T, size = args.seq_len, args.batch_size
    wants = ("entropy",) if "entropy" in names else ()
    for first in range(start, end, size * env.world):
        # Every rank makes the same number of forward passes.
        windows = np.arange(size) + first + env.rank * size
        x, y, _ = map(env.tensor, data.batch(windows.clip(max=end - 1), T))
        with torch.no_grad(), env.autocast():
            found = predicted(model, x, y, args.context, wants)
        gathered = {name: torch.cat(env.gather(found[name].float())) for name in names}
        stop = min(first + size * env.world, end)
        at = first * T + 1
        last = min(data.count, stop * T + 1)
        for name, file in outputs.items():
            values = gathered[name].flatten()[: last - at]
            file.append(finite(values, at, f"{name} that {args.model} gives"))
        bar.update(stop - first)


def predicted(model, x, y, context, wants):
    """{"loss": (B, T)}, and of each of `wants`, such as "entropy".

    With a context of N, each window is cut into pieces of N tokens, each N/2 behind the one before.
    The second half of a piece is what counts, of the first piece all: a target behind the first
    N/2 is predicted from N/2 to N tokens, as LongCE does with a sliding window.
    """
    names = ("loss", *wants)
    if not context:
        out = model(x, y, wants=wants)
        return dict(zip(names, out if wants else [out]))
    T, half = x.shape[1], context // 2
    n_pieces = max(1, -(-T // half) - 1)
    padding = (0, (n_pieces + 1) * half - T)
    pieces = [F.pad(ids, padding).unfold(1, 2 * half, half).flatten(0, 1) for ids in (x, y)]
    out = model(*pieces, wants=wants)  # (B * n_pieces, N)
    columns = []
    for values in out if wants else [out]:
        values = values.view(len(x), n_pieces, 2 * half)
        first, later = values[:, 0, :half], values[:, :, half:].flatten(1)
        columns.append(torch.cat([first, later], dim=1)[:, :T])
    return dict(zip(names, columns))


def finite(values, at, what):
    """The values as float16, the first is token `at`'s. Raises UserError: one is not finite."""
    values = values.to(torch.float16).cpu().numpy()
    if not np.isfinite(values).all():
        first = at + int(np.argmin(np.isfinite(values)))
        raise UserError(
            f"the {what} is not finite at token {first}; this model cannot be a reference"
        )
    return values


# --------------------------------------------------------------------------------------------------
# the reference's own validation loss (--val)


def validation_loss(note, val):
    """The reference's mean loss on the token set `val`, in nats; None: it is not noted yet."""
    for known in note.get("validation", []):  # older notes have none
        if known["data"] == hash_of_validation([val]):
            return known["loss"]
    return None


def add_validation(args, env, val, model, note):
    """Measure it, as the trainers measure the student's, and note it beside the losses."""
    loss = mean_loss(model, val, args, env, micro_batch=args.batch_size)["val_loss"]
    if not np.isfinite(loss):
        raise UserError(
            f"{args.model} has a validation loss on {val.folder} that is not finite; it cannot be "
            f"a reference"
        )
    measured = {"data": hash_of_validation([val]), "loss": loss, "name": str(val.folder)}
    note["validation"] = [*note.get("validation", []), measured]
    if env.main:
        save_note(args, note)


if __name__ == "__main__":
    cli(main)
