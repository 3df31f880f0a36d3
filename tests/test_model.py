"""The transformer against Hugging Face's, and Hugging Face folders in and out."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import model as M
import slm
from common.errors import UserError
from conftest import write_model
from hf import checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "mha": {},
    "gqa": GQA,
    "mqa, own head_dim": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "mistral, window": {"model_type": "mistral", "sliding_window": 40, **GQA},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True, **GQA},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 24, **GQA},
    "qwen3, window": {
        "model_type": "qwen3",
        "qk_norm": True,
        "attention_bias": True,
        "sliding_window": 40,
    },
}


def make(folder, **changes):
    config = M.Config(
        **{
            "vocab_size": 301,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "max_position_embeddings": 4096,
            **changes,
            "num_attention_heads": changes.get("num_attention_heads", 4),
            "num_key_value_heads": changes.get("num_key_value_heads", 4),
        }
    )
    torch.manual_seed(0)
    model = M.initialise(M.Transformer(config), 0)
    for p in model.parameters():
        # initialise leaves norms at 1 and biases where PyTorch puts them
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    checkpoint.save(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    ours, theirs = make(tmp_path, **FAMILIES[family])
    for length in (1, 17, 512):
        tokens = torch.randint(301, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            a, b = ours.logits(tokens), theirs(tokens).logits
        assert (a - b).abs().max() <= 1e-4, (length, (a - b).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gqa", "llama3", "mistral, window", "qwen2", "qwen3"])
def test_logits_equal_transformers_at_2048(family, tmp_path):
    ours, theirs = make(tmp_path, **FAMILIES[family])
    tokens = torch.randint(301, (1, 2048), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours.logits(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["gqa", "tied", "mistral, window", "qwen2", "qwen3"])
def test_one_adamw_step_equals_transformers(family, tmp_path):
    ours, theirs = make(tmp_path, **FAMILIES[family])
    tokens = torch.randint(301, (2, 65), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    for model, logits in ((ours, ours.logits), (theirs, lambda t: theirs(t).logits)):
        # The first step is lr * g / (|g| + eps): eps has to be above the gradients' own rounding,
        # or signs of noise are compared.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
        F.cross_entropy(logits(x).flatten(0, 1), y).backward()
        optimizer.step()
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        error = (p - reference[name]).norm() / reference[name].norm()
        gradient = (p.grad - reference[name].grad).norm() / reference[name].grad.norm()
        assert error <= 1e-6 and gradient <= 1e-5, (name, error.item(), gradient.item())


@pytest.mark.parametrize(
    "family", ["gqa", "llama3", "mistral, window", "qwen2", "qwen3", "qwen3, window"]
)
def test_cache_gives_what_the_full_pass_gives(family, tmp_path):
    """Prefill in two pieces of rows with different lengths, then token by token."""
    ours, _ = make(tmp_path, **FAMILIES[family])
    tokens = torch.randint(301, (3, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = ours(tokens)
        cache = M.Cache(ours.config, 3, 128)
        first = ours(tokens[:, :30], cache)
        lengths = torch.tensor([20, 11, 5])
        piece = torch.stack(
            [F.pad(row[30 : 30 + n], (0, 20 - n)) for row, n in zip(tokens, lengths)]
        )
        second = ours(piece, cache, tail=lengths)
        assert torch.allclose(first, full[:, :30], atol=1e-5)
        for row, n in enumerate(lengths):
            assert torch.allclose(second[row, :n], full[row, 30 : 30 + n], atol=1e-5)
        for _ in range(40):
            at = cache.lengths.clone()
            hidden = ours(tokens[torch.arange(3), at][:, None], cache)
            assert torch.allclose(hidden[:, 0], full[torch.arange(3), at], atol=1e-5)


def test_no_token_sees_a_later_one(tmp_path):
    ours, _ = make(tmp_path, **FAMILIES["gqa"])
    tokens = torch.randint(301, (1, 50), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 30] = (changed[0, 30] + 1) % 301
    with torch.no_grad():
        a, b = ours(tokens), ours(changed)
    assert torch.equal(a[:, :30], b[:, :30]) and not torch.equal(a[:, 30:], b[:, 30:])


def test_sliding_window_forgets(tmp_path):
    """With one layer, a token farther back than the window has no influence; one inside has."""
    ours, _ = make(tmp_path, **{**FAMILIES["mistral, window"], "num_hidden_layers": 1})
    tokens = torch.randint(301, (1, 80), generator=torch.Generator().manual_seed(4))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 301
    with torch.no_grad():
        same = (ours(tokens) == ours(changed)).all(-1)[0]
    assert same[:20].all() and not same[20:60].any() and same[60:].all()


def test_overfits_one_batch():
    config = M.Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = M.initialise(M.Transformer(config), 0)
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05, loss


def test_folder_round_trip_is_bit_for_bit_also_in_shards(tmp_path):
    ours, _ = make(tmp_path / "one", tie_word_embeddings=False)
    checkpoint.save(ours, tmp_path / "many", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    for folder in ("one", "many"):
        again = checkpoint.load(tmp_path / folder)
        assert dataclasses.replace(again.config, extra={}) == ours.config
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), ours.state_dict().values())
        )
    tokens = torch.randint(301, (1, 20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.logits(tokens)).abs().max() < 1e-4


def test_hash_follows_the_tensors(vocabulary, tmp_path):
    write_model(tmp_path / "a", vocabulary, seed=0)
    write_model(tmp_path / "b", vocabulary, seed=0)
    write_model(tmp_path / "c", vocabulary, seed=1)
    a, b, c = (checkpoint.model_hash(tmp_path / name) for name in "abc")
    assert a == b != c
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert checkpoint.model_hash(tmp_path / "many") == a  # however they are spread


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "rope type is 'yarn'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_key_value_heads": 3}, "head layout"),
        ({"hidden_size": 128}, "has shape"),
        ({"num_hidden_layers": 4}, "9 missing tensors"),
        ({"num_hidden_layers": 2}, "9 unexpected tensors"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message, tmp_path):
    make(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


def test_under_autocast_products_are_bf16_and_the_residual_stream_is_fp32():
    model = M.initialise(M.Transformer(M.Config(vocab_size=50, hidden_size=24)), 0)
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].dtype, output.dtype)})

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.arange(7)[None]).dtype == torch.bfloat16
    for i in range(model.config.num_hidden_layers):
        block = f"model.layers.{i}"
        assert seen[block] == (torch.float32, torch.float32)
        assert seen[f"{block}.input_layernorm"] == (torch.float32, torch.bfloat16)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            assert seen[f"{block}.{part}"] == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 5])
def test_with_document_masks_each_document_is_as_if_it_were_alone(window):
    """Losses and gradients: a window of several documents, the first and the last of them cut."""
    config = M.Config(vocab_size=50, hidden_size=24, num_hidden_layers=3, sliding_window=window)
    model = M.initialise(M.Transformer(config), 0).double()
    model.document_end = 7
    tokens = torch.randint(8, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    for row, ends in enumerate(((3, 4, 20, 39), (0, 11, 30))):  # an empty document among them
        tokens[row, list(ends)] = 7
    packed = model(tokens)
    packed.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    model.document_end = None
    total = 0
    for row in range(2):
        ends = [-1, *(tokens[row] == 7).nonzero().flatten().tolist(), 39]
        for before, end in zip(ends, ends[1:]):
            if before < end:
                alone = model(tokens[row, before + 1 : end + 1][None])[0]
                assert (alone - packed[row, before + 1 : end + 1]).abs().max() < 1e-12
                total = total + alone.square().sum()
    total.backward()
    alone = [p.grad for p in model.parameters() if p.grad is not None]
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(alone, gradients))


def test_without_a_flag_attention_crosses_documents():
    model = M.initialise(M.Transformer(M.Config(vocab_size=50, hidden_size=24)), 0)
    tokens = torch.randint(8, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    tokens[0, 9] = 7
    crossed = model(tokens)
    model.document_end = 7
    assert not torch.allclose(crossed[0, 10:], model(tokens)[0, 10:], atol=1e-3)
    assert torch.allclose(crossed[0, :10], model(tokens)[0, :10], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_that_are_cast_once_give_the_same_losses(tied):
    """Bit for bit what autocast gives, which casts them in each forward pass."""
    shape = {"vocab_size": 50, "hidden_size": 24, "attention_bias": True, "qk_norm": True}
    torch.manual_seed(0)  # of the biases
    model = M.initialise(M.Transformer(M.Config(tie_word_embeddings=tied, **shape)), 0)
    x, y = torch.randint(50, (2, 3, 40))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        each_time = slm.WithLoss(model)(x, y, wants=("entropy",))
        model.cast_products(torch.bfloat16)
        once = slm.WithLoss(model)(x, y, wants=("entropy",))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.float32
    for a, b in zip(each_time, once):
        assert torch.equal(a, b)
