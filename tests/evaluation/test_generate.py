"""Batched generation against transformers' greedy output; stops and prefixes by brute force."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import SHARED, builds_cpp, write_model
from evaluation import generate as G
from hf import checkpoint
from real_model import real_model

EOS = [7, 50, 120, 200, 280]
COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES = {
    "mha": (LlamaForCausalLM, LlamaConfig, {}),
    "gqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "window": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 4, "sliding_window": 20}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 12}),
}
NEW = 48


class Numbers:
    """A tokenizer whose ids read as "<id>"."""

    eos_id, bos_id, add_bos = None, None, False

    def stream(self):
        return self

    def push(self, i):
        return f"<{i}>"

    def flush(self):
        return ""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(our model, prompts with a common beginning, transformers' greedy text of each alone)."""
    kind, config, changes = FAMILIES[request.param]
    torch.manual_seed(1)
    theirs = kind(config(**COMMON | changes)).eval()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    rng = random.Random(0)
    shared = [rng.randrange(8, 300) for _ in range(33)]
    prompts = [
        shared + [rng.randrange(8, 300) for _ in range(rng.randrange(1, 60))] for _ in range(13)
    ]
    return checkpoint.load(folder), prompts, [greedy(theirs, prompt, NEW) for prompt in prompts]


def greedy(theirs, prompt, n):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("batch_tokens", [520, 20000])
def test_equals_transformers_token_for_token(case, share_prefix, batch_tokens):
    """With room for all rows at once, and with so little that rows wait, or are put back."""
    model, prompts, wanted = case
    got = dict(G.generate(model, Numbers(), prompts, NEW, share_prefix, batch_tokens=batch_tokens))
    assert [got[i].ids for i in range(len(prompts))] == wanted
    for output in got.values():
        assert output.reason == ("eos" if output.ids[-1] in EOS else "length")
        assert output.text == "".join(f"<{i}>" for i in output.ids if i not in EOS)
    assert len({output.reason for output in got.values()}) == 2  # both kinds of end occur


def test_prompts_added_while_others_run_and_the_memory_limit(case, monkeypatch):
    """The cache never outgrows its limit: rows are put back into the queue and go on later."""
    model, prompts, wanted = case
    monkeypatch.setattr(G, "STEP", 8)
    decoder = G.Decoder(model, Numbers(), NEW, batch_tokens=400)
    waiting = list(enumerate(prompts))
    got = {}
    most = put_back = 0
    rng = random.Random(0)
    while decoder.busy or waiting:
        if waiting and (rng.random() < 0.5 or not decoder.busy):
            decoder.add(*waiting.pop())
        got |= {i: output.ids for i, output in decoder.step()}
        rows, _, slots, _ = decoder.cache.keys[0].shape
        assert rows * slots <= 400 or rows == 1
        most = max(most, len(decoder.rows))
        put_back += any(len(row.ids) > row.n_prompt for row in decoder.queue)
    assert [got[i] for i in range(len(prompts))] == wanted
    assert 1 < most < len(prompts) and put_back


def test_a_text_that_ends_at_once(case):
    """EOS as the very first token: nothing generated, nothing else disturbed."""
    model, prompts, wanted = case
    first = wanted[3][0]
    got = dict(G.generate(model, Numbers(), prompts, NEW, eos=[first]))
    assert (got[3].text, got[3].ids, got[3].reason) == ("", [first], "eos")
    for ids, output in zip(wanted, (got[i] for i in range(len(prompts)))):
        assert output.ids == (ids[: ids.index(first) + 1] if first in ids else ids)


def test_stop_strings_that_cross_tokens(case):
    model, prompts, wanted = case
    texts = ["".join(f"<{i}>" for i in ids if i not in EOS) for ids in wanted]
    long = sorted(texts, key=len)[-2:]
    stops = [long[0][17:24], "><9", long[1][33:39], "nowhere"]
    got = dict(
        G.generate(model, Numbers(), prompts, NEW, stop=G.stop_strings(stops), batch_tokens=1500)
    )
    for i, text in enumerate(texts):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert got[i].text == (text[: min(ends)] if ends else text)
        assert (got[i].reason == "stop") == bool(ends)


def test_stop_strings_fuzzed():
    """In any pieces: stopped at the piece that completes the first stop, cut where it begins."""
    rng = random.Random(0)
    for _ in range(3000):
        stops = [
            "".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 4)))
            for _ in range(rng.randrange(1, 4))
        ]
        stop, text = G.stop_strings(stops), ""
        for _ in range(8):
            piece = "".join(rng.choice("ab\n") for _ in range(rng.randrange(0, 4)))
            text += piece
            ends = [text.index(s) for s in stops if s in text]
            cut = stop(text, len(piece)) if piece else None
            assert cut == (min(ends) if ends else None), (text, stops)
            if ends:
                break


def test_common_prefix_against_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        shared = [rng.randrange(3) for _ in range(rng.randrange(10, 30))]
        prompts = [
            shared + [rng.randrange(3) for _ in range(rng.randrange(0, 4))]
            for _ in range(rng.randrange(2, 6))
        ]
        n = max(
            n for n in range(40) if all(len(p) > n and p[:n] == prompts[0][:n] for p in prompts)
        )
        assert G.common_prefix(prompts) == (n if n >= G.MIN_SHARED else 0)
    assert G.common_prefix([[1] * 50]) == 0


def test_context_limit(case):
    """A prompt that fills the context gives nothing; one just below it stops at the limit."""
    model, prompts, wanted = case
    shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    long = [(prompts[0] * 9)[:n] for n in (300, 256, 255, 253)]
    got = dict(G.generate(model, Numbers(), [*long, prompts[shortest]], NEW))
    assert [(got[i].reason, len(got[i].ids)) for i in (0, 1)] == [("context", 0)] * 2
    assert [len(got[i].ids) for i in (2, 3)] == [1, 3] and got[3].reason in ("context", "eos")
    assert got[4].ids == wanted[shortest]


def test_text_is_what_the_ids_decode_to(vocabulary, tmp_path):
    """Also where a character is spread over tokens, or ends unfinished.

    The prompt is tokenised as a whole, as transformers does.
    """
    model = write_model(tmp_path, vocabulary, hidden_size=32).float()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "Tom has 3 apples and",
        "How many apples",
        "a 12 \u00e9\u4e2d\U0001f600",
        "x<|endoftext|>\n\n y",
    ]
    prompts = [G.encode_prompt(vocabulary, text) for text in texts]
    assert prompts == [theirs(text).input_ids for text in texts]
    for i, output in G.generate(model, vocabulary, prompts, 40):
        whole = vocabulary.decode(prompts[i] + [j for j in output.ids if j != vocabulary.eos_id])
        assert whole == vocabulary.decode(prompts[i]) + output.text


def test_bos_stands_in_front_where_the_tokenizer_adds_one(vocabulary, monkeypatch):
    plain = G.encode_prompt(vocabulary, "Tom has")
    monkeypatch.setattr(vocabulary, "add_bos", True)
    monkeypatch.setattr(vocabulary, "bos_id", 5)
    assert G.encode_prompt(vocabulary, "Tom has") == [5, *plain]
    monkeypatch.setattr(vocabulary, "add_bos", False)
    with pytest.raises(G.UserError):
        G.encode_prompt(vocabulary, "")


@pytest.mark.slow
@builds_cpp
def test_compiled_step_gives_the_same(case):
    model, prompts, wanted = case
    got = dict(G.generate(model, Numbers(), prompts, NEW, batch_tokens=900, compiled=True))
    assert [got[i].ids for i in range(len(prompts))] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
def test_real_model_equals_transformers(share_prefix):
    """SmolLM2-135M in fp32: a batch of few-shot prompts against one prompt at a time."""
    from evaluation import tasks
    from hf.tokenizer import Tokenizer

    if not SHARED.exists():
        pytest.skip(f"needs the few-shot prompts in {SHARED}")
    folder = real_model()
    tokenizer, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    shots = (SHARED / "prompts" / "gsm8k.md").read_text().split("\n\n\n")[0] + "\n\n\n"
    questions = [example.question for example in tasks.load("gsm8k", SHARED, limit=5)]
    texts = [f"{shots}Question: {question}\nAnswer:" for question in [*questions, "What is 3 + 4?"]]
    prompts = [G.encode_prompt(tokenizer, text) for text in texts]
    assert prompts == [theirs(text).input_ids for text in texts]
    assert G.common_prefix(prompts) > 50
    model = checkpoint.load(folder)
    got = dict(G.generate(model, tokenizer, prompts, 32, share_prefix, batch_tokens=1200))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, prompt in enumerate(prompts):
        assert got[i].ids == greedy(reference, prompt, 32), i


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs GSM8K and its prompt in {SHARED}")
def test_bench_counts_the_same_texts_on_both_sides(tmp_path, capsys):
    """tools.bench generate: both sides make the same tokens, or the ratio means nothing."""
    from types import SimpleNamespace

    from common.device import Env

    from hf import tokenizer
    from tools.bench import text as bench_text

    vocabulary = tokenizer.train_bpe(["Question: Tom has 3 apples. How many? Answer: 3\n"] * 9, 300)
    write_model(tmp_path, vocabulary, max_position_embeddings=8192, eos_token_id=vocabulary.eos_id)
    args = SimpleNamespace(
        model=tmp_path, data_dir=SHARED, device="cpu", dtype="float32", threads=1, repeats=1
    )
    rows = bench_text.generate(args, Env(args), n=3, new_tokens=6)
    assert [row["identical"] for row in rows] == [3, 3, 3] and rows[0]["ratio"] == 1
    assert len({row["new_tokens"] for row in rows}) == 1 and all(
        row["tok_per_s"] > 0 for row in rows
    )
    assert capsys.readouterr().out.count("3 of 3 texts identical") == 3
