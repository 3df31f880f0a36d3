"""config.json in and out."""

import dataclasses

from common.errors import UserError
from model import Config

ACTIVATIONS = {"silu", "swish"}
# what a config.json that does not say so means, by model_type: transformers' defaults
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}
# upper bounds, many times the largest model's: a hostile config.json must not make us allocate or loop for hours
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def config_from_hf(raw, where="config.json"):
    """`Config` from the object in a config.json. Raises UserError that names what the kit does not support."""

    def need(ok, what, got, wanted):
        if not ok:
            raise UserError(f"{where}: {what} is {str(got)[:80]!r}, supported: {wanted}")

    need(isinstance(raw, dict), "the file", type(raw).__name__, "a JSON object")
    need(
        raw.get("model_type") in (*DEFAULTS,),
        "model_type",
        raw.get("model_type"),
        ", ".join(DEFAULTS),
    )
    raw = {**DEFAULTS[raw["model_type"]], **raw}
    need(
        raw.get("hidden_act", "silu") in (*ACTIVATIONS,),
        "hidden_act",
        raw.get("hidden_act"),
        "silu",
    )
    need(not raw.get("quantization_config"), "quantization_config", "set", "unquantised weights")
    need(not raw.get("auto_map"), "auto_map", "set", "architectures without code of their own")
    need(not raw.get("rope_interleaved"), "rope_interleaved", raw.get("rope_interleaved"), "false")
    for key, limit in LIMITS.items():
        value = raw.get(key)
        if value is not None or key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            need(
                type(value) is int and 1 <= value <= limit,
                key,
                value,
                f"a positive integer up to {limit}",
            )
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        need(type(raw.get(key, False)) in (bool, type(None)), key, raw.get(key), "true or false")

    # transformers 5 writes rope_parameters with rope_theta in it, before it was rope_scaling and rope_theta beside it
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(
        isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()),
        "the rope scaling",
        rope,
        "one kind for all layers",
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in (*ROPE_KEYS,), "the rope type", kind, ", ".join(ROPE_KEYS))
    theta = next(
        (v for v in (rope.get("rope_theta"), raw.get("rope_theta"), 10000.0) if v is not None)
    )
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    need(partial in (None, 1), "partial_rotary_factor", partial, "1")
    numbers = {
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope_theta": theta,
        **{f"the rope scaling's {key}": rope.get(key) for key in ROPE_KEYS[kind]},
    }
    for what, value in numbers.items():
        need(type(value) in (int, float) and 0 < value < 1e12, what, value, "a positive number")
    if kind == "llama3":
        need(
            rope["low_freq_factor"] < rope["high_freq_factor"],
            "the rope scaling's high_freq_factor",
            rope["high_freq_factor"],
            "more than low_freq_factor",
        )

    known = {f.name for f in dataclasses.fields(Config)} - {"extra", "rope_scaling", "rope_theta"}
    given = {k: v for k, v in raw.items() if k in known and v is not None}
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    config = Config(
        **given,
        rope_theta=float(theta),
        rope_scaling=None
        if kind == "default"
        else {"rope_type": kind, **{k: rope[k] for k in ROPE_KEYS[kind]}},
        extra={
            k: v
            for k, v in raw.items()
            if k not in known | {"rope_scaling", "rope_theta", "rope_parameters"}
        },
    )
    if config.model_type == "llama":
        config.sliding_window = None
    need(
        config.num_attention_heads % config.num_key_value_heads == 0
        and config.head_dim % 2 == 0
        and config.hidden_size % config.num_attention_heads == 0,
        "the head layout",
        (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        ),
        "a hidden_size that is a multiple of the query heads, they of the key/value heads, an even head_dim",
    )
    return config


def config_to_hf(config):
    """The config.json object that transformers reads back as the same model."""
    raw = {**config.extra, **{k: v for k, v in dataclasses.asdict(config).items() if k != "extra"}}
    raw["architectures"] = [
        "MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"
    ]
    raw["hidden_act"] = "silu"
    if config.model_type != "mistral":
        del raw["sliding_window"]
    return raw
