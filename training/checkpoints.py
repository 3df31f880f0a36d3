"""The training state of several ranks: a folder that each of them writes its own part of.

PyTorch's distributed checkpoints (torch.distributed.checkpoint, DCP): nothing is gathered, and any
number of ranks can read what another number has written. Training stands still while each rank
copies its part into the CPU's memory; it is written in a thread while training goes on.

    state-000250/__0_0.distcp  what rank 0 wrote, and so on
                 .metadata     DCP's: which part of which tensor is where; a pickle, read restricted
                 state.json    written last: the step, the counts, the size of each file

Until all is on the disk the folder has another name. Then rank 0 renames it.
"""

import contextlib
import errno
import io
import json
import pickle
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.tensor import DTensor

from common import files, owned
from common.errors import UserError, reason_of
from common.json_files import read_json
from common.records import as_record, at_least

RECORD = "state.json"
PICKLE = ".metadata"  # DCP's name
READERS = 4  # threads that compare checksums, each of a piece of a tensor
# All that DCP's metadata consists of when it describes tensors alone. What it calls bytes is left
# out: those are pickles that DCP would run.
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


@dataclass
class Record:
    """state.json."""

    step: Annotated[int, at_least(1)]
    seconds: float
    tokens: list[int]
    val_loss: float | None
    config: dict[str, Any]  # the model's, as config.json has it
    tokenizer_from: str
    card: str
    files: dict[str, Annotated[int, at_least(1)]]  # bytes


# --------------------------------------------------------------------------------------------------
# out


def start_saving(temporary, target, tensors, record, env, group, when_whole):
    """Begin to write a folder `temporary`, which becomes `target`. Returns a future.

    tensors: {name: tensor} of this rank, see parallel.tensors; they are copied before this returns.
    record: what else the state holds, as JSON. group: all ranks, on the CPU, used for nothing else.
    when_whole: called on rank 0, in the thread that writes. All ranks must call it.
    """
    return dcp.async_save(
        own_share(tensors, env),
        storage_writer=Writer(temporary, target, record, env.world, when_whole),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


def finish_saving(future):
    """Wait until a state is on the disk. Raises OSError on all ranks where any could not write."""
    try:
        future.result()
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        if isinstance(error, (OSError, UserError)):
            raise error from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"rank {rank} could not write its part, is the disk full? ({reason})"
        raise OSError(errno.EIO, message) from None


def own_share(tensors, env):
    """What this rank writes: its shards, and a share of the tensors that every rank has whole."""
    own = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    whole = [(tensor.nbytes, name) for name, tensor in tensors.items() if name not in own]
    given = [0] * env.world  # bytes
    for size, name in sorted(whole, reverse=True):
        least = given.index(min(given))
        given[least] += size
        if least == env.rank:
            own[name] = tensors[name]
    return own


class Disk(FileSystem):
    """What DCP does to the disk, by way of common/files.py."""

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        opened = files.part(path) if mode == "wb" else open(path, mode)
        with opened as stream:
            yield stream

    def rename(self, path, new_path):
        files.rename(path, new_path)

    def mkdir(self, path):
        """The first rank has made it, see Writer.prepare_global_plan."""


class Writer(dcp.FileSystemWriter):
    """Writes a state's folder under another name, then renames it."""

    def __init__(self, temporary, target, record, world, when_whole):
        super().__init__(temporary, sync_files=False)  # files.part does that
        self.fs = Disk()
        self.target = target
        self.record = record
        self.world = world
        self.when_whole = when_whole

    def stage(self, tensors):
        """{name: tensor} in the CPU's memory, each copied once; DCP would copy a shard twice."""
        self.per_thread_copy_ahead = 0  # no loader with a stream of the first GPU: all is here
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def storage_meta(self):
        """DCP would put the folder's path into the pickle."""
        return None

    def prepare_global_plan(self, plans):
        """On the first rank, before any rank writes."""
        files.remove_folder(self.target)  # one that was found damaged
        files.remove_folder(self.path)
        owned.own_folder(self.path)
        parts = [f"__{rank}_0.distcp" for rank in range(self.world)]
        for name in [*parts, PICKLE, PICKLE + ".tmp"]:
            owned.claim(self.path / name)
        return super().prepare_global_plan(plans)

    def finish(self, metadata, results):
        """On the first rank, when all ranks have written."""
        super().finish(metadata, results)
        sizes = {PICKLE: (self.path / PICKLE).stat().st_size}
        for result in (result for part in results for result in part):
            place = result.storage_data
            end = place.offset + place.length
            sizes[place.relative_path] = max(end, sizes.get(place.relative_path, 0))
        record = json.dumps({**self.record, "files": sizes}, indent=1)
        files.write_atomic(self.path / RECORD, record)
        files.rename(self.path, self.target)
        self.when_whole()


# --------------------------------------------------------------------------------------------------
# in


def read(folder):
    """What a state's folder holds but its tensors. Raises UserError where a part is not whole."""
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise UserError(f"{folder}: is damaged or no training state (it has no {RECORD})")
    record = read_json(folder / RECORD, "training state")
    as_record(record, Record, f"training state: {folder / RECORD}")
    for name, size in record["files"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found is None:
            raise UserError(f"{folder}: is damaged ({name} is missing)")
        if found != size:
            raise UserError(f"{folder}: is damaged ({name} has {found} bytes, wanted {size})")
    Reader(folder).read_metadata()
    return record


def check(folder):
    """Raises UserError where bytes are not those that were saved. Reads all of it once, threaded.

    Each piece of a tensor is a zip archive of its own: torch writes its checksums and reads none.
    """
    places = Reader(folder).read_metadata().storage_data.values()

    def is_whole(place):
        with open(Path(folder) / place.relative_path, "rb") as file:
            file.seek(place.offset)
            piece = io.BytesIO(file.read(place.length))
        with zipfile.ZipFile(piece) as archive:
            return archive.testzip() is None

    try:
        with ThreadPoolExecutor(READERS) as threads:
            whole = all(threads.map(is_whole, places))
    except Exception as error:  # zipfile has no one class for what is no archive
        raise UserError(f"{folder}: is damaged ({reason_of(error)})") from None
    if not whole:
        raise UserError(f"{folder}: is damaged (a checksum differs)")


def load(folder, tensors):
    """Fill {name: tensor}, whole tensors or a rank's shards, from a state's folder, in place.

    Each rank reads for itself. Raises UserError where it is damaged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant here
        try:
            dcp.load(
                tensors,
                storage_reader=Reader(folder),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=True,
            )
        except CheckpointException as failed:
            error, _ = next(iter(failed.failures.values()))
            if isinstance(error, UserError):
                raise error from None
            raise UserError(
                f"{folder}: is damaged ({reason_of(error)}); after `rm -r {folder}` the same "
                f"command goes on from the state before it"
            ) from None


def weights(folder):
    """{name: tensor} of the model in a state's folder, whole, on the CPU. Raises UserError."""
    described = Reader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described.items()
        if name.startswith("model.")
    }
    load(folder, tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


class Reader(dcp.FileSystemReader):
    """Reads a state's folder and runs nothing. Raises UserError for what DCP does not write."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / PICKLE
        try:
            with open(path, "rb") as file:
                metadata = Restricted(file).load()
            known = read_json(Path(self.path) / RECORD, "training state")["files"]
            named = {place.relative_path for place in metadata.storage_data.values()}
            wrong = not isinstance(metadata, Metadata) or not named <= set(known)
        except Exception as error:  # a hostile pickle can break anything
            reason = reason_of(error)
            raise UserError(f"{path}: is damaged or hostile ({reason}); nothing was run") from None
        if wrong:
            raise UserError(f"{path}: names files that are no part of the state")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class Restricted(pickle.Unpickler):
    """Makes what DCP's metadata consists of, and refuses everything else."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
