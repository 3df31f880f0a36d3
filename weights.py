"""Hugging Face folders: config.json and weight files in, config.json and model.safetensors out, and their hash."""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import mmap
import pickle
import re
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import hub
from files import UserError, read_json, renamed_when_whole, write_atomic
from model import Config, Transformer, initialise, rope_frequencies
from runtime import full_state
from tokenizer import Tokenizer

ACTIVATIONS = {"silu", "swish"}
DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
# what a config.json that does not say so means, by model_type: transformers' defaults
DEFAULTS = {"llama": {"rms_norm_eps": 1e-6},
            "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096,
                        "max_position_embeddings": 131072}}
# upper bounds, many times the largest model's: a hostile config.json must not make us allocate or loop for hours
LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 10,
          "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13,
          "max_position_embeddings": 1 << 31, "sliding_window": 1 << 31}
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def config_from_hf(raw, where="config.json"):
    """`Config` from the object in a config.json. Raises UserError that names what the kit does not support."""
    def need(ok, what, got, wanted):
        if not ok:
            raise UserError(f"{where}: {what} is {str(got)[:80]!r}, supported: {wanted}")

    need(isinstance(raw, dict), "the file", type(raw).__name__, "a JSON object")
    need(raw.get("model_type") in (*DEFAULTS,), "model_type", raw.get("model_type"), ", ".join(DEFAULTS))
    raw = {**DEFAULTS[raw["model_type"]], **raw}
    need(raw.get("hidden_act", "silu") in (*ACTIVATIONS,), "hidden_act", raw.get("hidden_act"), "silu")
    need(not raw.get("quantization_config"), "quantization_config", "set", "unquantised weights")
    need(not raw.get("auto_map"), "auto_map", "set", "architectures without code of their own")
    need(not raw.get("rope_interleaved"), "rope_interleaved", raw.get("rope_interleaved"), "false")
    for key, limit in LIMITS.items():
        value = raw.get(key)
        if value is not None or key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads"):
            need(type(value) is int and 1 <= value <= limit, key, value, f"a positive integer up to {limit}")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        need(type(raw.get(key, False)) in (bool, type(None)), key, raw.get(key), "true or false")

    # transformers 5 writes rope_parameters with rope_theta in it, before it was rope_scaling and rope_theta beside it
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()), "the rope scaling", rope,
         "one kind for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in (*ROPE_KEYS,), "the rope type", kind, ", ".join(ROPE_KEYS))
    theta = next((v for v in (rope.get("rope_theta"), raw.get("rope_theta"), 10000.0) if v is not None))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    need(partial in (None, 1), "partial_rotary_factor", partial, "1")
    numbers = {"rms_norm_eps": raw["rms_norm_eps"], "rope_theta": theta,
               **{f"the rope scaling's {key}": rope.get(key) for key in ROPE_KEYS[kind]}}
    for what, value in numbers.items():
        need(type(value) in (int, float) and 0 < value < 1e12, what, value, "a positive number")
    if kind == "llama3":
        need(rope["low_freq_factor"] < rope["high_freq_factor"], "the rope scaling's high_freq_factor",
             rope["high_freq_factor"], "more than low_freq_factor")

    known = {f.name for f in dataclasses.fields(Config)} - {"extra", "rope_scaling", "rope_theta"}
    given = {k: v for k, v in raw.items() if k in known and v is not None}
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    config = Config(**given, rope_theta=float(theta),
                    rope_scaling=None if kind == "default" else {"rope_type": kind,
                                                                 **{k: rope[k] for k in ROPE_KEYS[kind]}},
                    extra={k: v for k, v in raw.items() if k not in known | {"rope_scaling", "rope_theta",
                                                                             "rope_parameters"}})
    if config.model_type == "llama":
        config.sliding_window = None
    need(config.num_attention_heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0 and
         config.hidden_size % config.num_attention_heads == 0, "the head layout",
         (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim),
         "a hidden_size that is a multiple of the query heads, they of the key/value heads, an even head_dim")
    return config


def config_to_hf(config):
    """The config.json object that transformers reads back as the same model."""
    raw = {**config.extra, **{k: v for k, v in dataclasses.asdict(config).items() if k != "extra"}}
    raw["architectures"] = ["MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"]
    raw["hidden_act"] = "silu"
    if config.model_type != "mistral":
        del raw["sliding_window"]
    return raw


def parameter_shapes(config):
    """{name: shape} of every tensor of the model, without allocating one."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head appears once


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
                if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold it, it follows from config.json
                    unexpected.append(name)
                continue
            if tuple(tensor.shape) != wanted[name]:
                raise UserError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                                f"config.json wants {wanted[name]}")
            if tensor.dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name} has type {str(tensor.dtype).removeprefix('torch.')}, "
                                f"wanted float32, bfloat16, float16 or float64")
            if name in seen:
                raise UserError(f"{path}: tensor {name} stands in another shard too")
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            if not all(map(torch.isfinite, tensor.aminmax())):  # of all values it would make copies; NaN comes through
                broken.append(name)
            owner, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
            seen.add(name)
    missing = sorted(set(wanted) - seen)
    if missing or unexpected:
        problem = [f"{len(names)} {what} tensors ({listed(names)})" for what, names in
                   (("missing", missing), ("unexpected", sorted(unexpected))) if names]
        raise UserError(f"{folder}: {' and '.join(problem)} for the architecture in config.json")
    if broken:
        print(f"warning: {folder}: {len(broken)} tensors hold non-finite values ({listed(broken)})", file=sys.stderr)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(config)  # made on meta above
    return model


def listed(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def weight_files(folder):
    """The weight files of a Hugging Face folder, in order: safetensors first, pickled ones of old repositories else."""
    for whole, index in hub.WEIGHTS:
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            names = shard_names(folder / index)
            for name in names:
                if not (folder / name).exists():
                    raise UserError(f"{folder / name}: this shard is named by {index} and does not exist")
            return [folder / name for name in names]
    raise UserError(f"{folder}: no weights, looked for model.safetensors, pytorch_model.bin and their indexes")


def shard_names(index):
    """The files that an index of shards (PATH) names, sorted. Raises UserError unless they lie in the same folder."""
    raw = read_json(index, "weights' index")
    named = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: no weight_map in it")
    for name in named.values():
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name)):
            raise UserError(f"{index} names {str(name)[:80]!r}: shards are .safetensors or .bin files beside it")
    return sorted(set(named.values()))


def read_tensors(path):
    """Yields (name, tensor) of a weight file. Pickles are read with weights_only, so code in them is refused, not run.

    The tensors are mapped from the file; each is to be copied or used up before the next one is asked for.
    """
    pickled = path.suffix != ".safetensors"
    try:
        with contextlib.ExitStack() as opened:
            if pickled:
                mapped = zipfile.is_zipfile(path)  # pickled ones from before PyTorch 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                if not isinstance(state, dict):
                    raise UserError(f"{path}: holds a {type(state).__name__}, wanted a pickled {{name: tensor}}")
                names, read = list(state), state.get
            else:
                file = opened.enter_context(safetensors.safe_open(path, "pt"))
                names, read, mapped = sorted(file.keys()), file.get_tensor, True
            for name in names:
                tensor = read(name)
                plain = isinstance(name, str) and isinstance(tensor, torch.Tensor)
                if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu":
                    raise UserError(f"{path}: {str(name)[:80]!r} in it is not a plain tensor; wanted {{name: tensor}}")
                if tensor.nbytes > path.stat().st_size:  # a view that repeats a few bytes
                    raise UserError(f"{path}: tensor {name} claims more bytes ({tensor.nbytes}) than the file has")
                yield name, tensor.detach()
                if mapped:
                    forget_pages(tensor)
    except (UserError, OSError):
        raise
    except pickle.UnpicklingError:  # PyTorch's own message advises to run it
        raise UserError(f"{path}: refused, it is damaged or holds more than tensors; nothing in it was run. Wanted "
                        f"safetensors, or a pickled {{name: tensor}}") from None
    except Exception as error:  # a hostile pickle can break anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path}: not a whole weight file ({reason[:200]}); get it again") from None


def forget_pages(tensor):
    """Hand the memory of a tensor that is mapped from a file, and was not written to, back to the system: pages that
    were read count as this process's memory for as long as the file is mapped. Linux; elsewhere nothing happens."""
    first, end = (-(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    if sys.platform == "linux" and tensor.is_contiguous() and first < end:  # whole pages of its own alone
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * mmap.PAGESIZE),
                                  ctypes.c_size_t((end - first) * mmap.PAGESIZE), mmap.MADV_DONTNEED)


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
    state = model.state_dict() if state is None else {k.removeprefix("lm."): v for k, v in state.items()}
    sizes = {k: v.numel() * (dtype or v.dtype).itemsize for k, v in state.items()
             if not (config.tie_word_embeddings and k == "lm_head.weight")}
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        tensors = {k: state[k].detach().to(dtype or state[k].dtype).cpu().contiguous() for k in shard}
        with renamed_when_whole(folder / file) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        write_atomic(folder / "model.safetensors.index.json", json.dumps({
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {k: file for file, shard in zip(files, shards) for k in shard}}, indent=1))
    raw = config_to_hf(config)
    raw["dtype"] = raw["torch_dtype"] = str(dtype or state[shards[0][0]].dtype).removeprefix("torch.")
    write_atomic(folder / "config.json", json.dumps(raw, indent=1))
    ends = {k: raw[k] for k in ("bos_token_id", "eos_token_id") if raw.get(k) is not None}
    generation = json.dumps({**ends, "do_sample": False}, indent=1)
    if tokenizer_from is not None:
        Tokenizer.load(tokenizer_from).save(folder)
        base = Path(tokenizer_from) / "generation_config.json"
        generation = base.read_bytes() if base.exists() else generation
    write_atomic(folder / "generation_config.json", generation)


def save_wrapped(module, folder, tokenizer_from, env, run=None):
    """A wrapped training module (slm.WithLoss, perhaps under DDP or FSDP) as a Hugging Face folder, with a model card
    where `run` is given. All ranks must call this; rank 0 writes."""
    state, _ = full_state(module)
    if env.main:
        save(getattr(module, "module", module).lm, folder, state=state, tokenizer_from=tokenizer_from)
        if run:
            write_atomic(Path(folder) / "README.md", run.card())


def model_hash(folder):
    """sha256 over the names, types, shapes and bytes of the tensors in a Hugging Face folder."""
    digest = hashlib.sha256()
    for path in weight_files(Path(folder)):
        for name, tensor in read_tensors(path):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def begin(args, token_set, env):
    """The model that training starts from: `--init scratch`, a folder or a hub id.

    Returns the model, the folder that its tokenizer files come from, and the hash of what it started from. Raises
    UserError where the model's tokenizer is not the one that the token set was made with.
    """
    if args.init == "scratch":
        tokenizer = Tokenizer.load(token_set.folder)
        config = Config(
            vocab_size=token_set.vocab_size, hidden_size=args.d_model, num_hidden_layers=args.n_layer,
            intermediate_size=args.d_ff or max(16, args.d_model * 8 // 3 // 16 * 16),
            num_attention_heads=args.n_head, num_key_value_heads=args.n_kv_head or args.n_head,
            head_dim=args.d_model // args.n_head, max_position_embeddings=args.seq_len, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
        if args.d_model % args.n_head or config.head_dim % 2 or args.n_head % config.num_key_value_heads:
            raise UserError(f"--n-head {args.n_head} with --d-model {args.d_model} and --n-kv-head "
                            f"{config.num_key_value_heads}: wanted an even width per head and whole groups of heads")
        return initialise(Transformer(config), args.seed).to(env.device), token_set.folder, f"scratch-{args.seed}"
    folder = find(args.init, args.revision, token_set, env)
    return load(folder, device=env.device), folder, env.from_main(lambda: model_hash(folder))


def find(name, revision, token_set, env):
    """The folder of the model `name` (folder or hub id), whose vocabulary is the token set's. What does not fit is
    refused before its weights are downloaded. Of several ranks the first downloads, the others read its cache."""
    def get():
        check_vocabulary(hub.resolve(name, revision, "tokenizer"), token_set)
        return hub.resolve(name, revision)

    return env.main_first(get)


def check_vocabulary(folder, token_set):
    """Refuse a model whose tokenizer is not the one that the token set was made with."""
    got, wanted = Tokenizer.load(folder).hash, token_set.tokenizer_hash
    if got != wanted:
        raise UserError(f"vocabulary: {folder} has tokenizer {got[:12]}, {token_set.folder} was made with "
                        f"{wanted[:12]}; prepare the text again with prepare.py --tokenizer {folder}")
    config = Path(folder) / "config.json"
    vocab_size = config_from_hf(read_json(config, "model"), config).vocab_size
    if vocab_size < token_set.vocab_size:
        raise UserError(f"vocabulary: {folder} has {vocab_size} rows of embeddings, {token_set.folder} has ids below "
                        f"{token_set.vocab_size}; prepare the text again with prepare.py --tokenizer {folder}")
