"""Hugging Face folders: config.json and weight files in, the same out, and their hash."""

import ctypes
import hashlib
import heapq
import json
import mmap
import pickle
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from common.errors import UserError
from common.files import renamed_when_whole, room_for_library, write_atomic
from common.records import read_json
from hf.config import config_from_hf, config_to_hf
from hf.tokenizer import Tokenizer
from hf.weight_files import weight_files
from model import Transformer, rope_frequencies

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


# ---- in


def parameter_shapes(config):
    """{name: shape} of every tensor of the model, without allocating one; a tied head is no own."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def load(folder, dtype=torch.float32, device="cpu"):
    """The model in a Hugging Face folder, its weights cast to `dtype`.

    Training starts from float32 copies even of a bfloat16 file: usual updates are smaller than
    bfloat16 can add. Tensor by tensor, so that the peak of host memory is the model and one tensor.
    Raises UserError that names the file and the tensor where something is missing, unexpected,
    misshapen or corrupt.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = config_from_hf(read_json(path, "model"), path)
    with torch.device("meta"):
        model = Transformer(config)
    missing = parameter_shapes(config)
    seen = set()
    unexpected = []
    not_finite = []
    tied_head = None  # where the file holds it, too
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            if is_implied(name, config):
                if name == "lm_head.weight":
                    tied_head = tensor.to(device=device, dtype=dtype, copy=True)
                continue
            if name in seen:
                raise UserError(f"{path}: tensor {name} stands in another shard too")
            if name not in missing:
                unexpected.append(name)
                continue
            check_tensor(path, name, tensor, missing.pop(name))
            seen.add(name)
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            # NaN comes through the extremes; isfinite of all values would make copies
            lowest, highest = tensor.aminmax()
            if not (lowest.isfinite() and highest.isfinite()):
                not_finite.append(name)
            owner, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    refuse_misfits(folder, sorted(missing), sorted(unexpected))
    if not_finite:
        n, names = len(not_finite), listed(not_finite)
        print(f"warning: {folder}: {n} tensors hold non-finite values ({names})", file=sys.stderr)
    if config.tie_word_embeddings:
        if tied_head is not None and not torch.equal(tied_head, model.model.embed_tokens.weight):
            raise UserError(
                f"{folder}: config.json ties the head to the embedding, the file's lm_head.weight "
                f"is another matrix; wanted tie_word_embeddings false, or no such tensor"
            )
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(config)  # made on meta above
    return model


def is_implied(name, config):
    """Does the tensor say again what the model has from elsewhere?"""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    return name.endswith("rotary_emb.inv_freq")  # in checkpoints of old versions


def check_tensor(path, name, tensor, shape):
    """Raise UserError for a tensor of another shape, or of a type that is not a float's."""
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{path}: tensor {name} has shape {tuple(tensor.shape)}, config.json wants {shape}"
        )
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name} has type {str(tensor.dtype).removeprefix('torch.')}, "
            "wanted float32, bfloat16, float16 or float64"
        )


def refuse_misfits(folder, missing, unexpected):
    """Raise UserError where tensors (names) are missing or unexpected."""
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing tensors ({listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected tensors ({listed(unexpected)})")
    if problems:
        raise UserError(f"{folder}: {' and '.join(problems)} for the architecture in config.json")


def listed(names):
    """The first three names."""
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


# ---- weight files


def read_tensors(path):
    """Yields (name, tensor) of a weight file, in the order of the names.

    The tensors are mapped from the file; each is to be copied or used up before the next one is
    asked for. Pickles are read with weights_only, so code in them is refused, not run. Raises
    UserError.
    """
    try:
        for name, tensor, mapped in stored_tensors(path):
            check_plain(path, name, tensor)
            yield name, tensor.detach()
            if mapped:
                forget_pages(tensor)
    except UserError:
        raise
    except pickle.UnpicklingError:  # PyTorch's own message advises to run it
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors; nothing in it was run. "
            "Wanted safetensors, or a pickled {name: tensor}"
        ) from None
    except Exception as error:  # a hostile pickle can break anything
        if isinstance(error, OSError) and error.filename:  # of the system, not of the content
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path}: not a whole weight file ({reason[:200]}); get it again") from None


def stored_tensors(path):
    """Yields (name, tensor, is it mapped from the file) of a weight file, by name."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name), True
        return
    mapped = zipfile.is_zipfile(path)  # pickled ones from before PyTorch 1.6 cannot be mapped
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise UserError(f"{path}: holds a {kind}, wanted a pickled {{name: tensor}}")
    for name, tensor in sorted(state.items(), key=lambda named: str(named[0])):
        yield name, tensor, mapped


def check_plain(path, name, tensor):
    """Raise UserError for what is not a plain tensor, or one that repeats a few bytes endlessly."""
    plain = (
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )
    if not plain:
        raise UserError(
            f"{path}: {str(name)[:80]!r} in it is not a plain tensor; wanted {{name: tensor}}"
        )
    if tensor.nbytes > path.stat().st_size:
        raise UserError(
            f"{path}: tensor {name} claims more bytes ({tensor.nbytes}) than the file has"
        )


def forget_pages(tensor):
    """Hand the memory of a tensor that is mapped from a file back to the system (Linux only).

    Pages that were read count as this process's memory for as long as the file is mapped. The
    tensor must not have been written to.
    """
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    # whole pages alone: the first and the last may hold a neighbour's bytes
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if first < end:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED
        )


def model_hash(folder):
    """sha256 over the names, types, shapes and bytes of the tensors in a Hugging Face folder.

    In the order of the names: how the tensors are spread over files makes no difference.
    """
    digest = hashlib.sha256()
    files = [read_tensors(path) for path in weight_files(Path(folder))]
    for name, tensor in heapq.merge(*files, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- out


def save(model, folder, dtype=None, shard_bytes=5_000_000_000, state=None, tokenizer_from=None):
    """Write config.json, generation_config.json and model.safetensors into `folder`.

    transformers opens the result. Weights above `shard_bytes` become shards with an index. Each
    file is renamed into place when it is whole. `state` replaces the model's own tensors (a
    gathered state dict of the wrapped model). The tokenizer's files, and generation_config.json
    where there is one, come from `tokenizer_from`. Tensors keep their type (`dtype` None): a
    trained model is written as the float32 weights that the optimiser held, so that loading it is
    exact; whoever wants half the bytes casts a copy.
    """
    folder = Path(folder)
    if state is None:
        state = model.state_dict()
    state = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_weights(state, folder, dtype, shard_bytes)

    raw = config_to_hf(model.config)
    stored_as = dtype or next(iter(state.values())).dtype
    raw["dtype"] = raw["torch_dtype"] = str(stored_as).removeprefix("torch.")
    write_atomic(folder / "config.json", json.dumps(raw, indent=1))
    ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}
    generation = json.dumps({**ends, "do_sample": False}, indent=1)
    if tokenizer_from is not None:
        Tokenizer.load(tokenizer_from).save(folder)
        base = Path(tokenizer_from) / "generation_config.json"
        if base.exists():
            generation = base.read_bytes()
    write_atomic(folder / "generation_config.json", generation)


def save_weights(state, folder, dtype, shard_bytes):
    """Write {name: tensor} as model.safetensors, or as shards of up to `shard_bytes` each."""
    from huggingface_hub import split_torch_state_dict_into_shards  # up to 0.2 s to import

    # Shapes on meta are enough to plan, and nothing is cast before its shard's turn.
    shapes = {
        name: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        for name, tensor in state.items()
    }
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        tensors = {
            name: state[name].detach().to(shapes[name].dtype).cpu().contiguous() for name in names
        }
        with renamed_when_whole(folder / file) as temporary, room_for_library(temporary) as name:
            safetensors.torch.save_file(tensors, name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
