"""The names of weight files: whole or in shards, safetensors before pickles. Needs no torch."""

import re

from common.errors import UserError
from common.json_files import regular_size
from common.records import read_json

# (whole, index of shards), the preferred first
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def weight_files(folder):
    """The weight files of a Hugging Face folder, in order. Raises UserError if there are none."""
    for whole, index in WEIGHTS:
        if (folder / whole).exists():
            regular_size(folder / whole, "weights")
            return [folder / whole]
        if not (folder / index).exists():
            continue
        shards = [folder / name for name in shard_names(folder / index)]
        for shard in shards:
            if not shard.exists():
                raise UserError(f"{shard}: this shard is named by {index} and does not exist")
            regular_size(shard, "weights")
        return shards
    raise UserError(
        f"{folder}: no weights, looked for model.safetensors, pytorch_model.bin and their indexes"
    )


def shard_names(index):
    """The files that an index of shards (a path) names, sorted.

    Raises UserError unless they lie in the same folder: an index is a stranger's.
    """
    named = read_json(index, "weights' index").get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: no weight_map in it")
    for name in named.values():
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name)):
            raise UserError(
                f"{index} names {str(name)[:80]!r}: shards are .safetensors or .bin files beside it"
            )
    return sorted(set(named.values()))
