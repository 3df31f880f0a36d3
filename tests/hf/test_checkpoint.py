"""Configs of the models that the kit is for, hostile checkpoints, and checkpoints out."""

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import model as model_file
import score
import train_ref
import train_slm
from common.errors import UserError
from conftest import ROOT, write_model, write_set
from hf import checkpoint
from hf.config import config_from_hf, config_to_hf
from hf.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# config.json

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "use_cache": True,
    "rope_scaling": None,
}
TINYLLAMA = {
    **LLAMA_2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pretraining_tp": 1,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
DEEPSEEK = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 102400,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA_3_2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_2 = {  # Qwen2.5-0.5B
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_2_MATH = {  # Qwen2.5-Math-7B
    **QWEN_2,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
QWEN_3 = {  # Qwen3-0.6B-Base
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_8B = {
    **QWEN_3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
# the published config.json's fields that matter, and the number of parameters that the model cards
# state, in billions
PUBLISHED = {
    "TinyLlama/TinyLlama_v1.1": ({**TINYLLAMA, "sliding_window": None}, 1.1),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (TINYLLAMA, 1.1),
    "microsoft/rho-math-1b-v0.1": (TINYLLAMA, 1.1),
    "mistralai/Mistral-7B-v0.1": (MISTRAL, 7.24),
    "microsoft/rho-math-7b-v0.1": (MISTRAL, 7.24),
    "deepseek-ai/deepseek-math-7b-base": (DEEPSEEK, 6.91),
    "HuggingFaceTB/SmolLM2-135M": (SMOLLM2, 0.1345),
    "meta-llama/Llama-3.2-1B": (LLAMA_3_2, 1.236),
    "Qwen/Qwen2.5-0.5B": (QWEN_2, 0.49),
    "Qwen/Qwen2.5-Math-7B": (QWEN_2_MATH, 7.6),
    "Qwen/Qwen3-0.6B-Base": (QWEN_3, 0.6),
    "Qwen/Qwen3-8B-Base": (QWEN_3_8B, 8.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(name):
    raw, billions = PUBLISHED[name]
    config = config_from_hf(raw, name)
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
        "num_key_value_heads",
    ):
        assert getattr(config, key) == raw[key], key
    assert config.sliding_window == (4096 if "istral" in name or "7b-v" in name else None)
    n = sum(torch.Size(shape).numel() for shape in checkpoint.parameter_shapes(config).values())
    assert round(n / 1e9, len(str(billions).split(".")[1])) == billions


DEFAULTED = ("sliding_window", "num_key_value_heads", "rms_norm_eps", "rope_theta")


@pytest.mark.parametrize(
    "raw",
    [
        TINYLLAMA,
        MISTRAL,
        LLAMA_3_2,
        {**SMOLLM2, "rope_scaling": {"type": "linear", "factor": 4.0}},
        QWEN_2,
        {**QWEN_2, "use_sliding_window": True},  # max_window_layers: from none of the layers on
        {**QWEN_2, "use_sliding_window": True, "max_window_layers": 0},
        QWEN_3,
        {k: v for k, v in QWEN_3.items() if k not in ("head_dim", "use_sliding_window")},
        *(
            {k: v for k, v in raw.items() if k not in DEFAULTED}
            for raw in (MISTRAL, DEEPSEEK, QWEN_3_8B)
        ),
    ],
)
def test_configs_mean_what_transformers_reads_in_them(raw, tmp_path):
    """As published (rope_theta on top), and as transformers writes the same config (from version 5
    on with rope_theta in rope_parameters); also what is left to its defaults.
    """
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = config_from_hf(raw)
    again = config_from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    in_5 = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    in_5["rope_parameters"] = {
        "rope_type": "default",
        **(raw.get("rope_scaling") or {}),
        "rope_theta": raw.get("rope_theta", 10000.0),
    }
    in_5["rope_parameters"]["rope_type"] = in_5["rope_parameters"].pop(
        "type", in_5["rope_parameters"]["rope_type"]
    )
    for config in (ours, again, config_from_hf(in_5)):
        for key in (
            "num_key_value_heads",
            "rms_norm_eps",
            "head_dim",
            "tie_word_embeddings",
            "hidden_size",
        ):
            default = theirs.hidden_size // theirs.num_attention_heads  # of Qwen2's head_dim
            assert getattr(config, key) == getattr(theirs, key, default), key
        window = getattr(theirs, "sliding_window", None)
        if set(getattr(theirs, "layer_types", None) or []) == {"full_attention"}:
            window = None
        assert config.sliding_window == window
        frequencies = LlamaRotaryEmbedding(theirs).inv_freq
        assert torch.allclose(model_file.rope_frequencies(config), frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": ["llama"]}, "model_type"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2050}, "head layout"),
        ({"head_dim": 10**12}, "head_dim"),
        ({"head_dim": 63}, "head layout"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "head layout"),
        *(({"rope_theta": value}, "rope_theta") for value in ("big", float("nan"), 0)),
        ({"rope_scaling": "linear"}, "the rope scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn"}},
            "rope_scaling beside rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one kind for all layers"),
        (
            {"rope_scaling": {**LLAMA_3_2["rope_scaling"], "high_freq_factor": 1.0}},
            "high_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe', .*llama, mistral, qwen2, qwen3"),
        ({**QWEN_2, "use_sliding_window": True, "max_window_layers": 3}, "layer_types"),
        ({**QWEN_2, "use_sliding_window": "yes"}, "use_sliding_window"),
        ({**QWEN_2, "max_window_layers": -1}, "max_window_layers"),
        ({**QWEN_3, "layer_types": ["sliding_attention"] * 28}, "layer_types"),
        ({**QWEN_3, "layer_types": ["linear_attention"] * 28}, "layer_types"),
        ({**QWEN_3, "layer_types": 3}, "layer_types"),
    ],
)
def test_config_values_that_are_refused(change, message):
    with pytest.raises(UserError, match=message) as refused:
        config_from_hf({**TINYLLAMA, **change}, "there/config.json")
    assert str(refused.value).startswith("there/config.json: ") and "supported: " in str(
        refused.value
    )


def test_a_mistral_has_no_biases_whatever_its_config_says():
    config = config_from_hf({**MISTRAL, "attention_bias": True, "mlp_bias": True})
    assert not config.attention_bias and not config.mlp_bias


# --------------------------------------------------------------------------------------------------
# weights in


def test_a_head_that_is_tied_and_another_matrix_is_refused(vocabulary, tmp_path):
    write_model(tmp_path / "m", vocabulary, tie_word_embeddings=True)
    path = next((tmp_path / "m").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    for head, fits in ((embedding.clone(), True), (embedding + 1, False)):
        safetensors.torch.save_file({**tensors, "lm_head.weight": head}, path)
        if fits:
            checkpoint.load(tmp_path / "m")
            continue
        with pytest.raises(UserError, match="lm_head.weight is another matrix"):
            checkpoint.load(tmp_path / "m")


def with_header(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


EMBEDDING = "model.embed_tokens.weight"
FILES = {  # what stands in model.safetensors
    "truncated": lambda whole: whole[:-100],
    "truncated in the header": lambda whole: whole[:50],
    "empty": lambda whole: b"",
    "a header of 2^63 bytes": lambda whole: with_header(b"{}", length=1 << 63),
    "a header longer than the file": lambda whole: with_header(b"{}", length=1 << 20),
    "no JSON": lambda whole: with_header(b"{" * 64),
    "deep JSON": lambda whole: with_header(b'{"a":' + b"[" * 100_000),
    "overlapping tensors": lambda whole: with_header(
        {"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)
    ),
    "offsets behind the end": lambda whole: with_header(
        {"a": entry([1 << 20], 0, 1 << 22)}, bytes(16)
    ),
    "shape and offsets at odds": lambda whole: with_header(
        {EMBEDDING: entry([1 << 40, 1 << 20], 0, 16)}, bytes(16)
    ),
    "a shape that overflows": lambda whole: with_header({EMBEDDING: entry([1 << 63, 2], 0, 0)}),
    "an unknown type": lambda whole: with_header({EMBEDDING: entry([4], 0, 16, "Q77")}, bytes(16)),
}


@pytest.fixture
def folder(vocabulary, tmp_path):
    write_model(tmp_path / "m", vocabulary)
    return tmp_path / "m"


def refused(folder, message):
    """The model is refused in one line that names the folder, by loading and by hashing where that
    reads it.
    """
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(folder)
    assert (
        "\n" not in str(error.value)
        and str(folder) in str(error.value)
        and len(str(error.value)) < 600
    )


@pytest.mark.parametrize("name", FILES)
def test_broken_safetensors(name, folder):
    path = folder / "model.safetensors"
    path.write_bytes(FILES[name](path.read_bytes()))
    refused(folder, "not a whole weight file")
    with pytest.raises(UserError):
        checkpoint.model_hash(folder)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def repeated():
    return torch.zeros(1).expand(1 << 20, 1 << 20)


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("code", Code, "holds more than tensors; nothing in it was run"),
        (
            "code behind a tensor",
            lambda path: {EMBEDDING: torch.zeros(2), "z": Code(path)},
            "nothing in it was run",
        ),
        ("a list", lambda path: [torch.zeros(2)], "holds a list"),
        ("no tensors", lambda path: {"a": {"b": 1}}, "not a plain tensor"),
        (
            "a tensor of no bytes",
            lambda path: {EMBEDDING: torch.zeros(300, 32, device="meta")},
            "not a plain tensor",
        ),
        (
            "a sparse tensor",
            lambda path: {EMBEDDING: torch.eye(4).to_sparse()},
            "not a plain tensor",
        ),
        ("numbers as names", lambda path: {3: torch.zeros(2)}, "not a plain tensor"),
        ("four terabytes in four bytes", lambda path: {EMBEDDING: repeated()}, "claims more bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles(name, make, message, zipped, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save(
        make(tmp_path / "ran"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    refused(folder, message)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and nothing", pickle.dumps({"a": 1})[:-3], os.urandom(1000)]
)
def test_broken_pickles(content, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, "pytorch_model.bin: ")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_the_same_model(zipped, folder):
    ours = checkpoint.load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(
        ours.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    assert all(
        torch.equal(a, b) for a, b in zip(checkpoint.load(folder).parameters(), ours.parameters())
    )


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "names '../../etc/passwd'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {"a": "../m.safetensors"}}, "names"),
        ({"weight_map": {"a": ""}}, "names"),
        ({"weight_map": {"a": ".."}}, "names"),
        ({"weight_map": {"a": 5, "b": "x.bin"}}, "names"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "names"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ([], "wanted an object"),
        ({}, "no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "does not exist"),
        ("[" * 100_000, "not valid JSON"),
        ("{", "not valid JSON"),
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            "stands in another shard",
        ),
    ],
)
def test_hostile_indexes(index, message, folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(
        index if isinstance(index, str) else json.dumps(index)
    )
    refused(folder, message)


def change_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing tensors \(model.norm.weight\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected tensors \(extra\)"),
        (
            lambda t: t.update({EMBEDDING: t[EMBEDDING].long()}),
            "embed_tokens.weight has type int64",
        ),
        (
            lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}),
            "has type float8_e4m3fn",
        ),
        (
            lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}),
            r"has shape \(\d+, 32\), config.json wants",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, folder):
    change_tensors(folder, change)
    refused(folder, message)


def test_what_is_warned_of_and_what_is_passed_over(folder, capsys):
    def change(tensors):
        tensors[EMBEDDING][0, 0] = float("nan")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(
            4
        )  # in checkpoints of old versions

    change_tensors(folder, change)
    checkpoint.load(folder)
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "1 tensors hold non-finite values (model.embed_tokens.weight)" in err
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_float32(dtype, folder, tmp_path):
    ours = checkpoint.load(folder)
    checkpoint.save(ours, tmp_path / "cast", dtype=dtype)
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == str(dtype)[6:]
    for a, b in zip(checkpoint.load(tmp_path / "cast").parameters(), ours.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.to(dtype).float())


def test_a_stage_says_it_in_one_line(folder, stage, vocabulary, tmp_path):
    write_set(tmp_path / "d", vocabulary, 500)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    for module, flags in (
        (score, "--model m --out l.bin"),
        (train_ref, "--init m --out o --steps 1"),
    ):
        code, out, err = stage(module, f"{flags} --data d --seq-len 16 --device cpu --threads 1")
        assert (
            code == 2
            and err.strip().splitlines()[-1].startswith("error: ")
            and "Traceback" not in err
        )
        assert "model.safetensors: not a whole weight file" in err and not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------------
# weights out


def test_training_writes_whole_folders_with_cards(stage, vocabulary, tmp_path):
    """From a bfloat16 base: the run's folder and its snapshot open in transformers with equal
    logits and ids, load here bit for bit, and say what they are.
    """
    import yaml  # of huggingface-hub

    data = write_set(tmp_path / "d", vocabulary, 2001)
    write_model(tmp_path / "base", vocabulary)
    base = checkpoint.load(tmp_path / "base")
    checkpoint.save(base, tmp_path / "m", dtype=torch.bfloat16, tokenizer_from=tmp_path / "base")
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [5, 299]}')
    code, _, err = stage(
        train_slm,
        "--data d --val d --init m --k 0.5 --score loss --out o --seq-len 16 --steps 4 "
        "--batch-size 4 --snapshots 2 --lr 1e-5 --eval-every 3 --device cpu --threads 1",
    )
    assert code == 0, err
    text = "Tom has 3 apples and buys 4 more; é"
    for folder, steps in (("o", 4), ("o/step-000002", 2)):
        folder = tmp_path / folder
        ours = checkpoint.load(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == [5, 299]
        tokens = torch.arange(40)[None]
        with torch.no_grad():
            assert (ours.logits(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
        ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
        assert ids == Tokenizer.load(folder).encode(text).tolist()
        _, head, body = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(head) == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["selective-language-modeling"],
        }
        for row in (
            f"| steps | {steps} of 4 |",
            f"| tokens read | {steps * 64:,} |",
            "| k | 0.5 |",
            f"| tokens that carried loss | {steps * 32:,} |",
            f"| training data, sha256 | {data.hash} |",
            f"| base, sha256 of its tensors | {checkpoint.model_hash(tmp_path / 'm')} |",
            "python train_slm.py --data d --val d --init m --k 0.5",
            "taken on 50% of them, chosen by the score `loss` with k = 0.5",
        ):
            assert row in body, row
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    first = json.loads((tmp_path / "o/log.jsonl").read_text().splitlines()[0])["val_loss"]
    for folder, said in (
        ("o", f"{summary['val_loss']:.4f}"),
        ("o/step-000002", f"{first:.4f}, after step 0"),
    ):
        row = f"| validation loss, nats per token | {said} |"
        assert row in (tmp_path / folder / "README.md").read_text()
    # a learning rate this small is lost in bfloat16: the float32 weights that are saved hold it
    moved = [
        not torch.equal(a, a.bfloat16().float())
        for a in checkpoint.load(tmp_path / "o").parameters()
    ]
    assert all(moved)
    again = checkpoint.load(tmp_path / "o")
    checkpoint.save(again, tmp_path / "p", tokenizer_from=tmp_path / "o")
    assert checkpoint.model_hash(tmp_path / "p") == checkpoint.model_hash(tmp_path / "o")


MEASURE = """
import sys, re
from pathlib import Path
import torch
from hf import checkpoint
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
checkpoint.load(sys.argv[1])  # a tiny model: what is imported on the way is there now
before = max(status("VmRSS"), status("VmHWM"))
model = checkpoint.load(sys.argv[2])
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the peak of resident memory is read from /proc"
)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "pickled"])
def test_peak_memory_of_loading(form, folder, tmp_path):
    """Below 1.3 times the model, mapped pages of the file included (a bfloat16 file becomes a
    float32 model).
    """
    config = model_file.Config(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = model_file.Transformer(config)
    tensors = {
        name: torch.ones(p.shape, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
        for name, p in model.named_parameters()
    }
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    if form == "pickled":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path],
        cwd=ROOT,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    peak, size = map(int, done.stdout.split())
    print(f"{form}: peak {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert size > 350e6 and size < peak < 1.3 * size, (peak, size)
