"""Qwen2 and Qwen3 as transformers itself makes them: read, scored, trained, saved, counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import train_ref
import train_slm
from conftest import finish, launch, write_set
from hf import checkpoint
from hf.config import config_from_hf
from tools.plan.memory import counts

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
KINDS = {
    "qwen2": (Qwen2Config, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window": (Qwen2Config, WINDOW),
    "qwen3": (Qwen3Config, {"head_dim": 20}),  # 4 heads of 20 in a width of 48
    "qwen3, tied": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, biases": (Qwen3Config, {"head_dim": 128, "attention_bias": True}),
}


def make(folder, kind):
    """A model of transformers' own class whose weights are all random, saved by transformers."""
    config, changes = KINDS[kind]
    model = AutoModelForCausalLM.from_config(config(**SHAPE | changes)).float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        with torch.no_grad():  # transformers leaves norms at 1 and biases at 0
            p.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    return model


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_saved_they_are_the_same_model(kind, tmp_path):
    theirs = make(tmp_path / "theirs", kind)
    ours = checkpoint.load(tmp_path / "theirs")
    tokens = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(1))
    wanted = logits(theirs, tokens)
    with torch.no_grad():
        assert (ours.logits(tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    checkpoint.save(ours, tmp_path / "ours")
    again = opened(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(logits(again, tokens), wanted)
    assert checkpoint.model_hash(tmp_path / "ours") == checkpoint.model_hash(tmp_path / "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_parameters_as_transformers_counts(kind, tmp_path):
    config, changes = KINDS[kind]
    raw = config(**SHAPE | changes)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(raw)
    raw.save_pretrained(tmp_path)
    assert counts(config_from_hf(raw.to_dict()))[0] == theirs.num_parameters()


def trained(kind, vocabulary, tmp_path):
    """The command line of a short selective run that starts from a model of transformers."""
    make(tmp_path / "init", kind)
    vocabulary.save(tmp_path / "init")
    write_set(tmp_path / "data", vocabulary, n=2000)
    return (
        f"train_slm.py --data {tmp_path}/data --init {tmp_path}/init --score loss --k 0.5 "
        "--scope sequence --batch-size 4 --micro-batch-size 2 --seq-len 64 --steps 6 --warmup 1 "
        f"--lr 5e-3 --out {tmp_path}/out"
    )


@pytest.mark.parametrize("kind", ["qwen2, tied", "qwen3"])
def test_a_trained_one_opens_in_transformers(kind, vocabulary, tmp_path, stage):
    command = trained(kind, vocabulary, tmp_path).removeprefix("train_slm.py ")
    command += " --checkpointing --backward pruned"
    code, out, err = stage(train_slm, command)
    assert code == 0, err
    ours = checkpoint.load(tmp_path / "out")
    before = checkpoint.load(tmp_path / "init").state_dict()
    assert not any(torch.equal(p, before[name]) for name, p in ours.state_dict().items())
    tokens = torch.randint(300, (1, 100), generator=torch.Generator().manual_seed(1))
    theirs = logits(opened(tmp_path / "out"), tokens)
    with torch.no_grad():
        assert (ours.logits(tokens) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_one_from_scratch_opens_in_transformers(vocabulary, tmp_path, stage):
    """With normed queries and keys it is a Qwen3, and its wavelengths are those that were named."""
    write_set(tmp_path / "data", vocabulary, n=2000)
    command = (
        f"--data {tmp_path}/data --init scratch --n-layer 2 --d-model 32 --n-head 4 --seq-len 64 "
        f"--steps 3 --lr 5e-2 --warmup 0 --qk-norm --rope-theta 100 --out {tmp_path}/out"
    )
    code, out, err = stage(train_ref, command)
    assert code == 0, err
    ours = checkpoint.load(tmp_path / "out")
    theirs = opened(tmp_path / "out")
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert ours.config.rope_theta == 100
    size = ours.config.vocab_size
    tokens = torch.randint(size, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(tokens) - logits(theirs, tokens)).abs().max() < 1e-4
    code, out, err = stage(train_ref, command.replace("--rope-theta 100", "--rope-theta 200"))
    assert code == 2 and "rope_theta 100.0 -> 200.0" in err


@pytest.mark.slow
def test_fsdp_on_two_ranks_trains_the_same(vocabulary, tmp_path):
    command = trained("qwen3", vocabulary, tmp_path)
    finish(launch(command, tmp_path))
    sharded = command.replace("/out", "/sharded") + " --parallel fsdp"
    finish(launch(sharded, tmp_path, ranks=2))
    alone = checkpoint.load(tmp_path / "out").state_dict()
    for name, p in checkpoint.load(tmp_path / "sharded").state_dict().items():
        assert (p - alone[name]).abs().max() < 1e-3, name
