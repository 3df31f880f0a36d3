"""Hugging Face folders: config.json and weight files in, config.json and model.safetensors out, and their hash."""

import contextlib
import ctypes
import hashlib
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
from common.files import read_json, renamed_when_whole, write_atomic
from hf.config import config_from_hf, config_to_hf
from hf.downloads import WEIGHTS, shard_names
from hf.tokenizer import Tokenizer
from model import Transformer, rope_frequencies

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def parameter_shapes(config):
    """{name: shape} of every tensor of the model, without allocating one."""
    with torch.device("meta"):
        model = Transformer(config)
    return {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }  # a tied head appears once


def load(folder, dtype=torch.float32, device="cpu"):
    """The model in a Hugging Face folder (config.json, model.safetensors or shards), its weights cast to `dtype`.

    Training starts from float32 copies even of a bfloat16 file: usual updates are smaller than bfloat16 can add. Tensor
    by tensor, so that the peak of host memory is the model and one tensor. Raises UserError that names the file and the
    tensor where something is missing, unexpected, misshapen or corrupt.
    """
    folder = Path(folder)
    config = config_from_hf(read_json(folder / "config.json", "model"), folder / "config.json")
    with torch.device("meta"):
        model = Transformer(config)
    wanted = parameter_shapes(config)
    seen, unexpected, broken = set(), [], []
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # the embedding again
            if name not in wanted:
                if not name.endswith(
                    "rotary_emb.inv_freq"
                ):  # old checkpoints hold it, it follows from config.json
                    unexpected.append(name)
                continue
            if tuple(tensor.shape) != wanted[name]:
                raise UserError(
                    f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                    f"config.json wants {wanted[name]}"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{path}: tensor {name} has type {str(tensor.dtype).removeprefix('torch.')}, "
                    f"wanted float32, bfloat16, float16 or float64"
                )
            if name in seen:
                raise UserError(f"{path}: tensor {name} stands in another shard too")
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            if not all(
                map(torch.isfinite, tensor.aminmax())
            ):  # of all values it would make copies; NaN comes through
                broken.append(name)
            owner, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
            seen.add(name)
    missing = sorted(set(wanted) - seen)
    if missing or unexpected:
        problem = [
            f"{len(names)} {what} tensors ({listed(names)})"
            for what, names in (("missing", missing), ("unexpected", sorted(unexpected)))
            if names
        ]
        raise UserError(f"{folder}: {' and '.join(problem)} for the architecture in config.json")
    if broken:
        print(
            f"warning: {folder}: {len(broken)} tensors hold non-finite values ({listed(broken)})",
            file=sys.stderr,
        )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(config)  # made on meta above
    return model


def listed(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def weight_files(folder):
    """The weight files of a Hugging Face folder, in order: safetensors first, pickled ones of old repositories else."""
    for whole, index in WEIGHTS:
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            names = shard_names(folder / index)
            for name in names:
                if not (folder / name).exists():
                    raise UserError(
                        f"{folder / name}: this shard is named by {index} and does not exist"
                    )
            return [folder / name for name in names]
    raise UserError(
        f"{folder}: no weights, looked for model.safetensors, pytorch_model.bin and their indexes"
    )


def read_tensors(path):
    """Yields (name, tensor) of a weight file. Pickles are read with weights_only, so code in them is refused, not run.

    The tensors are mapped from the file; each is to be copied or used up before the next one is asked for.
    """
    pickled = path.suffix != ".safetensors"
    try:
        with contextlib.ExitStack() as opened:
            if pickled:
                mapped = zipfile.is_zipfile(
                    path
                )  # pickled ones from before PyTorch 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                if not isinstance(state, dict):
                    raise UserError(
                        f"{path}: holds a {type(state).__name__}, wanted a pickled {{name: tensor}}"
                    )
                names, read = list(state), state.get
            else:
                file = opened.enter_context(safetensors.safe_open(path, "pt"))
                names, read, mapped = sorted(file.keys()), file.get_tensor, True
            for name in names:
                tensor = read(name)
                plain = isinstance(name, str) and isinstance(tensor, torch.Tensor)
                if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu":
                    raise UserError(
                        f"{path}: {str(name)[:80]!r} in it is not a plain tensor; wanted {{name: tensor}}"
                    )
                if tensor.nbytes > path.stat().st_size:  # a view that repeats a few bytes
                    raise UserError(
                        f"{path}: tensor {name} claims more bytes ({tensor.nbytes}) than the file has"
                    )
                yield name, tensor.detach()
                if mapped:
                    forget_pages(tensor)
    except (UserError, OSError):
        raise
    except pickle.UnpicklingError:  # PyTorch's own message advises to run it
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors; nothing in it was run. Wanted "
            f"safetensors, or a pickled {{name: tensor}}"
        ) from None
    except Exception as error:  # a hostile pickle can break anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path}: not a whole weight file ({reason[:200]}); get it again") from None


def forget_pages(tensor):
    """Hand the memory of a tensor that is mapped from a file, and was not written to, back to the system: pages that
    were read count as this process's memory for as long as the file is mapped. Linux; elsewhere nothing happens."""
    first, end = (
        -(-tensor.data_ptr() // mmap.PAGESIZE),
        (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE,
    )
    if (
        sys.platform == "linux" and tensor.is_contiguous() and first < end
    ):  # whole pages of its own alone
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE),
            ctypes.c_size_t((end - first) * mmap.PAGESIZE),
            mmap.MADV_DONTNEED,
        )


def save(model, folder, dtype=None, shard_bytes=5_000_000_000, state=None, tokenizer_from=None):
    """Write config.json, generation_config.json and model.safetensors (shards above `shard_bytes`) into `folder`.

    transformers opens the result. Each file is renamed into place when it is whole. `state` replaces the model's own
    tensors (a gathered state dict of the wrapped model). The tokenizer's files, and generation_config.json where there
    is one, come from `tokenizer_from`. Tensors keep their type (`dtype` None): a trained model is written as the
    float32 weights that the optimiser held, so that loading it is exact; whoever wants half the bytes casts a copy.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    state = (
        model.state_dict()
        if state is None
        else {k.removeprefix("lm."): v for k, v in state.items()}
    )
    sizes = {
        k: v.numel() * (dtype or v.dtype).itemsize
        for k, v in state.items()
        if not (config.tie_word_embeddings and k == "lm_head.weight")
    }
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards):
        tensors = {
            k: state[k].detach().to(dtype or state[k].dtype).cpu().contiguous() for k in shard
        }
        with renamed_when_whole(folder / file) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        write_atomic(
            folder / "model.safetensors.index.json",
            json.dumps(
                {
                    "metadata": {"total_size": sum(sizes.values())},
                    "weight_map": {k: file for file, shard in zip(files, shards) for k in shard},
                },
                indent=1,
            ),
        )
    raw = config_to_hf(config)
    raw["dtype"] = raw["torch_dtype"] = str(dtype or state[shards[0][0]].dtype).removeprefix(
        "torch."
    )
    write_atomic(folder / "config.json", json.dumps(raw, indent=1))
    ends = {k: raw[k] for k in ("bos_token_id", "eos_token_id") if raw.get(k) is not None}
    generation = json.dumps({**ends, "do_sample": False}, indent=1)
    if tokenizer_from is not None:
        Tokenizer.load(tokenizer_from).save(folder)
        base = Path(tokenizer_from) / "generation_config.json"
        generation = base.read_bytes() if base.exists() else generation
    write_atomic(folder / "generation_config.json", generation)


def model_hash(folder):
    """sha256 over the names, types, shapes and bytes of the tensors in a Hugging Face folder."""
    digest = hashlib.sha256()
    for path in weight_files(Path(folder)):
        for name, tensor in read_tensors(path):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
