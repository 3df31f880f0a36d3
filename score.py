"""Stage 2: the reference's loss on every token of the corpus, computed once (Rho-1, section 2.2).

    python score.py                           # the demo
    python score.py --model out/ref --data data/owm --out out/owm/ref_loss.bin \\
        --seq-len 2048 --batch-size 16                                               # one GPU
    torchrun --nproc-per-node 8 score.py ...  # the windows shared out over eight

The windows are the ones that train_slm.py cuts, so every loss is stored with the context that the
student will have. Interrupted, the same command goes on, and the file ends the same.
"""

import json
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np
import torch
from tqdm import tqdm

import demo.chain
import slm
from common.command_line import Parser, add_machine, whole
from common.errors import UserError, cli
from common.files import read_json, write_atomic
from data import TokenSet, entropy_path, forget
from hf import checkpoint, models
from training import parallel

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
        "format": 1,
        "data": data.hash,
        "reference": env.from_main(lambda: checkpoint.model_hash(folder)),
        "seq_len": args.seq_len,
        "dtype": str(env.dtype).removeprefix("torch."),
        "count": data.count,
        "entropy": args.entropy,
    }
    n_scored = env.from_main(lambda: claim(args, header, data))
    if n_scored < data.n_windows(args.seq_len):
        reference = checkpoint.load(folder, device=env.device)
        reference.cast_products(env.dtype)
        model = slm.WithLoss(reference).eval()
        parallel.compile_blocks(model, args, env)
        score(args, env, data, model, header, n_scored)
    if env.main:
        print(f"{args.out}: {data.count - 1:,} targets scored by {args.model}")


def check(args):
    if not (args.model and args.data and args.out):
        raise UserError(
            "--model, --data and --out go together: name all three, or none for the demo"
        )
    if Path(args.out).suffix == ".json":
        raise UserError(
            f"--out {args.out}: the note beside the losses has that name; name a file such as "
            f"ref_loss.bin"
        )


def files_of(args):
    """The files of values: losses, and with --entropy entropies."""
    if args.entropy:
        return [Path(args.out), entropy_path(args.out)]
    return [Path(args.out)]


def claim(args, header, data):
    """Go on with the files that are there, or make them. Returns the number of windows done."""
    out = Path(args.out)
    note = out.with_suffix(".json")
    if args.overwrite:
        note.unlink(missing_ok=True)
    if note.exists():
        saved = read_json(note, "reference losses")
        differing = [
            f"{key} {saved.get(key)!r} -> {value!r}"
            for key, value in header.items()
            if saved.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{out} holds other losses ({'; '.join(differing)}); choose another --out or "
                f"start over with --overwrite"
            )
        return saved["n_scored"]
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in files_of(args):
        fill_with_nan(path, data.count)
    write_atomic(note, json.dumps({**header, "n_scored": 0}, indent=1))
    return 0


def fill_with_nan(path, count, block=1 << 20):
    """NaN = not scored yet."""
    with open(path, "wb") as file:
        for start in range(0, count, block):
            file.write(np.full(min(block, count - start), np.nan, "<f2").tobytes())


def score(args, env, data, model, header, n_scored):
    n_windows = data.n_windows(args.seq_len)
    chunk = CHUNK * args.batch_size
    # One rank writes: on a shared disk several that write into one page may lose losses.
    files = []
    if env.main:
        files = [np.memmap(path, "<f2", "r+") for path in files_of(args)]
    bar = tqdm(
        total=n_windows, initial=n_scored, desc=args.out, unit="window", disable=not env.main
    )
    for start in range(n_scored, n_windows, chunk):
        end = min(n_windows, start + chunk)
        score_chunk(args, env, data, model, files, start, end, bar)
        if env.main:
            for file in files:
                file.flush()
                forget(file)
            note = Path(args.out).with_suffix(".json")
            write_atomic(note, json.dumps({**header, "n_scored": end}, indent=1))
    bar.close()


def score_chunk(args, env, data, model, files, start, end, bar):
    """Windows start..end, `--batch-size` a rank at a time."""
    T, size = args.seq_len, args.batch_size
    for first in range(start, end, size * env.world):
        # Every rank makes the same number of forward passes.
        windows = np.arange(size) + first + env.rank * size
        x, y, _ = map(env.tensor, data.batch(windows.clip(max=end - 1), T))
        with torch.no_grad(), env.autocast():
            out = model(x, y, entropy=args.entropy)
        values = list(out) if args.entropy else [out]
        gathered = [torch.cat(env.gather(v.float())) for v in values]
        stop = min(first + size * env.world, end)
        at = first * T + 1
        last = min(data.count, stop * T + 1)
        for file, values in zip(files, gathered):
            file[at:last] = finite(values.flatten()[: last - at], at, args.model)
        bar.update(stop - first)


def finite(values, at, model):
    """The values as numpy. Raises UserError where one is not finite; the first is token `at`'s."""
    values = values.cpu().numpy()
    if not np.isfinite(values).all():
        first = at + int(np.argmin(np.isfinite(values)))
        raise UserError(
            f"{model} gives a loss that is not finite at token {first}; it cannot be a reference"
        )
    return values


if __name__ == "__main__":
    cli(main)
