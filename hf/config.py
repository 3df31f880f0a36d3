"""config.json in and out."""

import dataclasses
from functools import partial

from common.errors import UserError
from model import Config

ACTIVATIONS = ("silu", "swish")
# what a config.json that does not say so means, by model_type: transformers' defaults
QWEN = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
# what an architecture is, whatever its config.json says: transformers reads none of these in it
FIXED = {
    "llama": {"sliding_window": None},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"qkv_bias": True, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
}
OWN = {"qkv_bias", "qk_norm"}  # fields of Config that no config.json has
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# upper bounds, many times the largest model's: a hostile config.json must not make us allocate or
# loop for hours
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
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# the numbers that each kind of rope scaling needs
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}


def config_from_hf(raw, where="config.json"):
    """`Config` from the object in a config.json.

    Raises UserError that names what the kit does not support.
    """
    need = partial(require, where)
    need(isinstance(raw, dict), "the file", type(raw).__name__, "a JSON object")
    model_type = raw.get("model_type")
    # looked for in a tuple, as everything here: it may be a list, which no dict looks up
    need(model_type in tuple(DEFAULTS), "model_type", model_type, ", ".join(DEFAULTS))
    raw = {**DEFAULTS[model_type], **raw}
    check_architecture(raw, need)
    check_sizes(raw, need)
    theta, scaling = read_rope(raw, need)
    raw["sliding_window"] = read_window(raw, need)

    known = {f.name for f in dataclasses.fields(Config)} - {"extra"} - ROPE_FIELDS
    given = {key: raw[key] for key in known - OWN if raw.get(key) is not None}
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    config = Config(
        **{**given, **FIXED[model_type]},
        rope_theta=float(theta),
        rope_scaling=scaling,
        extra={key: value for key, value in raw.items() if key not in known | ROPE_FIELDS},
    )
    check_heads(config, need)
    return config


def require(where, ok, what, got, wanted):
    """Raise the UserError of a config.json whose `what` the kit does not support, unless `ok`."""
    if not ok:
        raise UserError(f"{where}: {what} is {str(got)[:80]!r}, supported: {wanted}")


def check_architecture(raw, need):
    """Refuse what would change the model's function and is not written in model.py."""
    activation = raw.get("hidden_act", "silu")
    need(activation in ACTIVATIONS, "hidden_act", activation, "silu")
    need(not raw.get("quantization_config"), "quantization_config", "set", "unquantised weights")
    need(not raw.get("auto_map"), "auto_map", "set", "architectures without code of their own")
    interleaved = raw.get("rope_interleaved")
    need(not interleaved, "rope_interleaved", interleaved, "false")


def check_sizes(raw, need):
    """Sizes are positive integers within LIMITS, switches true or false, epsilon a number."""
    for key, limit in LIMITS.items():
        value = raw.get(key)
        if value is None and key not in REQUIRED:
            continue
        ok = type(value) is int and 1 <= value <= limit  # True is an int to isinstance
        need(ok, key, value, f"a positive integer up to {limit}")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        value = raw.get(key)
        need(value is None or type(value) is bool, key, value, "true or false")
    need_positive(raw["rms_norm_eps"], "rms_norm_eps", need)
    for key in ("bos_token_id", "eos_token_id"):
        value = raw.get(key)
        ids = value if isinstance(value, list) else [value]
        ok = value is None or all(type(i) is int and abs(i) < 1 << 31 for i in ids)
        need(ok, key, value, "an id, or a list of ids")


def need_positive(value, what, need):
    """A finite positive number (NaN compares as false)."""
    ok = type(value) in (int, float) and 0 < value < 1e12
    need(ok, what, value, "a positive number")


def read_rope(raw, need):
    """(theta, scaling) of the rotary embedding; scaling is None or {"rope_type": ..., numbers}.

    transformers 5 writes rope_parameters with rope_theta in it, older versions rope_scaling with
    rope_theta beside it.
    """
    both = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    need(
        len(both) < 2 or both[0] == both[1], "rope_scaling beside rope_parameters", both[1:], "one"
    )
    rope = both[0] if both else {}
    one_kind = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    need(one_kind, "the rope scaling", rope, "one kind for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in tuple(ROPE_KEYS), "the rope type", kind, ", ".join(ROPE_KEYS))
    partial_factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    need(partial_factor in (None, 1), "partial_rotary_factor", partial_factor, "1")

    theta = 10000.0
    for place in (raw, rope):
        if place.get("rope_theta") is not None:
            theta = place["rope_theta"]
    need_positive(theta, "rope_theta", need)
    for key in ROPE_KEYS[kind]:
        need_positive(rope.get(key), f"the rope scaling's {key}", need)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        what = "the rope scaling's high_freq_factor"
        need(low < high, what, high, "more than low_freq_factor")
    return theta, {"rope_type": kind, **{key: rope[key] for key in ROPE_KEYS[kind]}}


def read_window(raw, need):
    """The sliding window of every layer, or None. Refused where some layers have one, others none.

    Qwen's layers from max_window_layers on have it, where use_sliding_window says so; transformers
    5 also lists each layer's kind.
    """
    window = raw.get("sliding_window")
    if "use_sliding_window" not in DEFAULTS[raw["model_type"]]:
        return window
    if not raw["use_sliding_window"]:
        window = None
    layers, first = raw["num_hidden_layers"], raw["max_window_layers"]
    need(type(first) is int and first >= 0, "max_window_layers", first, "a number of layers")
    first = layers if window is None else min(first, layers)
    full, sliding = "full_attention", "sliding_attention"
    kinds = raw.get("layer_types") or [full] * first + [sliding] * (layers - first)
    supported = [[full] * layers]
    if window is not None:
        supported.append([sliding] * layers)
    need(kinds in supported, "layer_types", kinds, "one kind of attention in all layers")
    return window if kinds[0] == sliding else None


def check_heads(config, need):
    """Refuse a head layout that attention cannot be computed with."""
    width, heads = config.hidden_size, config.num_attention_heads
    ok = (
        heads % config.num_key_value_heads == 0
        and config.head_dim % 2 == 0  # rotary positions turn pairs
        and width % heads == 0
    )
    need(
        ok,
        "the head layout",
        (width, heads, config.num_key_value_heads, config.head_dim),
        "a hidden_size that is a multiple of the query heads, they of the key/value heads, "
        "an even head_dim",
    )


def config_to_hf(config):
    """The config.json object that transformers reads back as the same model."""
    kind = config.model_type
    fields = dataclasses.asdict(config)
    for name in ("extra", *OWN, *FIXED[kind]):
        fields.pop(name, None)
    raw = {**config.extra, **fields}
    raw["architectures"] = [CLASSES[kind]]
    raw["hidden_act"] = "silu"
    if "use_sliding_window" in DEFAULTS[kind]:
        raw["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            raw["max_window_layers"] = 0
    return raw
