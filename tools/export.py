"""The model in a run's training state, as a Hugging Face folder: of a run that has not ended.

    python -m tools.export out/slm --out out/slm-now              # of its newest state
    python -m tools.export out/slm --out out/slm-250 --step 250   # of an older one that is kept

One process does it, whatever number of ranks wrote the state. A finished run's folder is a Hugging
Face folder already.
"""

from pathlib import Path

import common.device  # noqa: F401  first: it sets how torch's threads wait

import torch

from common import files, locks, owned
from common.command_line import Parser, whole
from common.errors import UserError, cli
from hf import checkpoint
from hf.config import config_from_hf
from model import Transformer
from training import states

LAST = "README.md"  # an export is whole when this is there
KIND = "exported model"


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.usage = "python -m tools.export RUN --out FOLDER [--FLAG VALUE ...]"
    add = parser.add_argument
    add("run", help="a run's folder")
    add("--out", metavar="FOLDER", help="the folder that is made")
    add("--step", type=whole(1), help="of the state after this step; default: the newest")
    add("--tokenizer", metavar="FOLDER", help="tokenizer files; default: those the run began with")
    add("--overwrite", action="store_true", help="replace an export that is there")
    return parser.parse_args(argv)


def main():
    args = arguments()
    if args.out is None:
        raise UserError("--out: got none, wanted a folder for the model")
    run, out = Path(args.run), Path(args.out)
    owned.refuse_overlap(out, {"the run": run})
    state = state_of(run, args.step)
    model, tokenizer_from = described(state, run, args)
    locks.lock_folder(out, KIND)
    if (out / LAST).exists() and not args.overwrite:
        raise UserError(f"{out}: holds a model; name another --out, or --overwrite it")
    owned.refuse_foreign([out / LAST])
    files.remove(out / LAST)
    for name in sorted(owned.written(out) - {owned.LIST}):  # an older export's, perhaps in shards
        files.remove(out / name)
    checkpoint.save(model, out, state=states.weights(state), tokenizer_from=tokenizer_from)
    files.write_atomic(out / LAST, state["card"])
    print(f"{out}: the model of {run} after step {state['step']}")


def state_of(run, step):
    """The state after `step`, or the newest that can be read. Raises UserError."""
    if not states.present(run):
        raise UserError(f"{run}: has no training state, wanted a run's folder that has one")
    if step is None:
        return states.read(states.newest_of(run))
    steps, broken = [], []
    for path in states.present(run):
        try:
            state = states.read(path)
        except UserError as error:  # the other one may be the one that is wanted
            broken.append(str(error))
            continue
        if state["step"] == step:
            states.check(path)
            return state
        steps.append(state["step"])
    there = ", ".join(map(str, sorted(steps))) or "none that can be read"
    raise UserError(
        "; ".join([f"--step: got {step}, wanted one that {run} has a state of: {there}", *broken])
    )


def described(state, run, args):
    """(a model of the state's shapes without weights, the folder of its tokenizer)."""
    if "config" not in state:
        raise UserError(
            f"{run}: its state does not say the model's shapes, an older version wrote it; go on "
            f"with the run, and export its next state"
        )
    tokenizer_from = Path(args.tokenizer or state["tokenizer_from"])
    if not tokenizer_from.is_dir():
        raise UserError(
            f"{tokenizer_from}: is no folder, wanted the tokenizer's files; say where they are "
            f"with --tokenizer FOLDER"
        )
    with torch.device("meta"):
        model = Transformer(config_from_hf(state["config"], run))
    return model, tokenizer_from


if __name__ == "__main__":
    cli(main)
