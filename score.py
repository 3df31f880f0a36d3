"""Stage 2: the reference's loss on every token of the corpus, computed once and stored (Rho-1, section 2.2).

    python score.py                                                                     # the demo
    python score.py --model out/ref --data data/owm --out out/owm/ref_loss.bin --seq-len 2048 --batch-size 16
    torchrun --nproc-per-node 8 score.py ...      # the windows shared out over eight GPUs

The windows are the ones that train_slm.py cuts, so every loss is stored with the context that the student will have.
Interrupted, it goes on where it stopped (--resume), and the file ends the same.
"""

import argparse
import json
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np
import torch
from tqdm import tqdm

import demo.chain
import slm
from common.errors import UserError, cli
from common.files import is_demo_folder, read_json, write_atomic
from data import TokenSet, entropy_path, forget
from hf import checkpoint, models
from training import parallel

CHUNK = 64  # batches between two notes of how far scoring has come


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("input")
    group.add_argument("--model", help="the reference (folder or hub id); default: the demo's")
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument("--data", help="token set to score (folder); default: the demo's corpus")
    group.add_argument(
        "--seq-len", type=int, default=128, help="tokens per window; as train_slm.py will use"
    )
    group.add_argument("--batch-size", type=int, default=32, help="windows per forward pass")
    group.add_argument(
        "--verify", action="store_true", help="read and hash all of the token set first"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the forward pass; must be the student's. auto: bfloat16 autocast on a GPU",
    )
    group.add_argument(
        "--compile", default="auto", choices=["auto", "on", "off"], help="auto: on a GPU"
    )
    group.add_argument("--threads", type=int, help="CPU threads per rank")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="where the losses go (FILE.bin; FILE.json beside it)")
    group.add_argument(
        "--entropy", action="store_true", help="store the entropy of each prediction too"
    )
    group.add_argument("--resume", action="store_true", help="go on with an interrupted file")
    group.add_argument("--overwrite", action="store_true", help="start over")
    return parser.parse_args()


def main():
    args = arguments()
    demo.chain.ensure(args, "score")
    for flag in ("seq_len", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(
                f"--{flag.replace('_', '-')}: got {getattr(args, flag)}, wanted at least 1"
            )
    if not (args.model and args.data and args.out):
        raise UserError(
            "--model, --data and --out go together: name all three, or none for the demo"
        )
    if Path(args.out).suffix == ".json":
        raise UserError(
            f"--out {args.out}: the note beside the losses has that name; name a file such as ref_loss.bin"
        )
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    folder = models.find(args.model, args.revision, data, env)
    reference = env.from_main(lambda: checkpoint.model_hash(folder))
    header = {
        "format": 1,
        "data": data.hash,
        "reference": reference,
        "seq_len": args.seq_len,
        "dtype": str(env.dtype).removeprefix("torch."),
        "count": data.count,
        "entropy": args.entropy,
    }
    n_scored = env.from_main(lambda: claim(args, header, data))
    if n_scored < data.n_windows(args.seq_len):
        model = slm.WithLoss(checkpoint.load(folder, device=env.device)).eval()
        parallel.compile_blocks(model, args, env)
        score(args, env, data, model, header, n_scored)
    if env.main:
        print(f"{args.out}: {data.count - 1:,} targets scored by {args.model}")


def claim(args, header, data):
    """Settle --resume and --overwrite, make the files where they are missing; returns the number of windows done."""
    out, note = Path(args.out), Path(args.out).with_suffix(".json")
    if args.overwrite:
        note.unlink(missing_ok=True)
    if note.exists():
        saved = read_json(note, "reference losses")
        differing = [
            f"{k} {saved.get(k)!r} -> {v!r}" for k, v in header.items() if saved.get(k) != v
        ]
        if differing:
            raise UserError(
                f"{out} holds other losses ({'; '.join(differing)}); choose another --out or --overwrite"
            )
        if not (args.resume or is_demo_folder(out)):
            raise UserError(f"{out} exists; go on with --resume or start it over with --overwrite")
        return saved["n_scored"]
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in [out] + [entropy_path(out)] * args.entropy:
        with open(path, "wb") as file:  # NaN = not scored yet
            for start in range(0, data.count, 1 << 20):
                file.write(np.full(min(1 << 20, data.count - start), np.nan, "<f2").tobytes())
    write_atomic(note, json.dumps({**header, "n_scored": 0}, indent=1))
    return 0


def score(args, env, data, model, header, n_scored):
    T, n, size = args.seq_len, data.n_windows(args.seq_len), args.batch_size
    files = [
        np.memmap(path, "<f2", "r+")
        for path in [args.out] + [entropy_path(args.out)] * args.entropy
        if env.main
    ]
    bar = tqdm(total=n, initial=n_scored, desc=args.out, unit="window", disable=not env.main)
    for chunk in range(n_scored, n, CHUNK * size):
        end = min(n, chunk + CHUNK * size)
        for start in range(chunk, end, size * env.world):
            first = start + env.rank * size  # every rank makes the same number of forward passes
            x, y, _ = map(
                env.tensor, data.batch(np.arange(first, first + size).clip(max=end - 1), T)
            )
            with torch.no_grad(), env.autocast():
                out = model(x, y, entropy=args.entropy)
            # One rank writes: on a shared disk several that write into one page may lose each other's losses.
            gathered = [
                torch.cat(env.gather(values.float())) for values in (out if args.entropy else [out])
            ]
            stop = min(start + size * env.world, end)
            for file, values in zip(files, gathered):
                at, last = start * T + 1, min(data.count, stop * T + 1)
                values = values.flatten()[: last - at].cpu().numpy()
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{args.model} gives a loss that is not finite at token "
                        f"{at + int(np.argmin(np.isfinite(values)))}; it cannot be a reference"
                    )
                file[at:last] = values
            bar.update(stop - start)
        if env.main:
            for file in files:
                file.flush()
                forget(file)
            write_atomic(
                Path(args.out).with_suffix(".json"),
                json.dumps({**header, "n_scored": end}, indent=1),
            )
    bar.close()


if __name__ == "__main__":
    cli(main)
