"""A real model through the whole kit: equal to transformers, continued with SLM, opened again."""

import json
import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import prepare
import score
import train_ref
import train_slm
from conftest import SHARED
from hf import checkpoint
from hf.tokenizer import Tokenizer
from real_model import real_model

pytestmark = pytest.mark.slow
LATEX, PROBLEMS = SHARED / "corpus/stacks_project.jsonl", SHARED / "corpus/gsm8k_train.jsonl"


def english(folder, n):
    """The first n ids of the manual that lies inside Python, (1, n)."""
    ids = Tokenizer.load(folder).encode(
        pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["class"]
    )
    return torch.from_numpy(ids[:n].astype("int64"))[None]


def show(capsys, line):
    with capsys.disabled():
        print(f"\n  {line}", end="")


def test_logits_equal_transformers(capsys):
    folder = real_model()
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = checkpoint.load(folder)
    for length in (1, 17, 512, 2048):
        tokens = english(folder, length)
        assert tokens.shape == (1, length)
        with torch.no_grad():
            a, b = ours.logits(tokens), theirs(tokens).logits
        worst = (a - b).abs().max().item()
        show(capsys, f"{length} tokens: largest difference of fp32 logits {worst:.1e}")
        assert worst <= 1e-4
        if length == 512:
            exact = b.log_softmax(-1)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = english(folder, 512)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            low = {"autocast, as in training": ours.logits(tokens)}
        low["weights too, as in evaluation on a GPU"] = checkpoint.load(
            folder, torch.bfloat16
        ).logits(tokens)
        low["transformers, weights too"] = half(tokens).logits.float()
    for name, logits in low.items():
        logs = logits.log_softmax(-1)
        kl = (exact.exp() * (exact - logs)).sum(-1).mean().item()
        agree = (exact.argmax(-1) == logs.argmax(-1)).float().mean().item()
        show(capsys, f"bf16 ({name}) on 512 tokens: KL {kl:.1e} nats, argmax agrees on {agree:.1%}")
        assert kl < 0.01 and agree > 0.95


def test_a_sliding_window_equals_transformers(capsys, tmp_path):
    """The same weights as a Mistral model with a window of 200 tokens."""
    folder = real_model()
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                **raw,
                "model_type": "mistral",
                "sliding_window": 200,
                "architectures": ["MistralForCausalLM"],
            }
        )
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = english(folder, 600)
    with torch.no_grad():
        a, b = checkpoint.load(tmp_path).logits(tokens), theirs(tokens).logits
        without = checkpoint.load(folder).logits(tokens)
    show(
        capsys,
        f"600 tokens, window 200: largest difference of fp32 logits {(a - b).abs().max():.1e}",
    )
    assert (a - b).abs().max() <= 1e-4 and (a - without)[:, 200:].abs().max() > 0.1


def test_one_adamw_step_equals_transformers(capsys):
    folder = real_model()
    tokens, after, gradients = english(folder, 129), [], []
    for load in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
        model = load(folder, dtype=torch.float32)
        logits = (
            model.logits(tokens[:, :-1])
            if hasattr(model, "logits")
            else model(tokens[:, :-1]).logits
        )
        # the first step is lr * g / (|g| + eps): eps above the gradients' own rounding, or it
        # compares signs of noise
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-3)
        F.cross_entropy(logits[0], tokens[0, 1:]).backward()
        optimizer.step()
        after.append({name: p.detach() for name, p in model.named_parameters()})
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    parameters, slopes = (
        max(
            (side[0][name] - side[1][name]).norm() / side[1][name].norm() for name in side[1]
        ).item()
        for side in (after, gradients)
    )
    show(
        capsys,
        f"one AdamW step: parameters within {parameters:.1e}, "
        f"gradients within {slopes:.1e} (relative norm)",
    )
    assert after[0].keys() == after[1].keys() and parameters <= 1e-6 and slopes <= 1e-4


@pytest.mark.skipif(not LATEX.exists(), reason=f"needs {LATEX}")
def test_continued_with_slm_its_loss_falls_and_transformers_agrees(stage, tmp_path, capsys):
    folder = real_model()
    for name, path, n in (("latex", LATEX, 4), ("problems", PROBLEMS, 40)):
        rows = [json.loads(line) for line in path.read_text().splitlines()[:n]]
        texts = [row.get("text") or row["question"] + "\n" + row["answer"] for row in rows]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text[:12000]}) + "\n" for text in texts)
        )
        assert (
            stage(prepare, f"--source {name}.jsonl --tokenizer {folder} --out {name} --workers 1")[
                0
            ]
            == 0
        )
    shape = "--seq-len 128 --batch-size 4 --device cpu"
    assert (
        stage(
            train_ref,
            f"--data problems --init {folder} --out ref --steps 4 --lr 2e-5 --warmup 2 "
            "--eval-every 0 "
            f"{shape}",
        )[0]
        == 0
    )
    assert stage(score, f"--model ref --data latex --out ref_loss.bin {shape}")[0] == 0
    code, _, err = stage(
        train_slm,
        f"--k 0.6 --data latex --val latex --init {folder} --ref-loss ref_loss.bin "
        f"--out slm --steps 24 --lr 1e-4 --warmup 4 --eval-every 8 {shape}",
    )
    assert code == 0, err
    losses = [json.loads(line).get("val_loss") for line in open(tmp_path / "slm/log.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    with capsys.disabled():
        print(
            "\n  loss on the text it continues on: "
            + " -> ".join(f"{loss:.3f}" for loss in losses),
            end="",
        )
    assert losses[-1] < losses[0] - 0.05

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "slm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "slm")
    text = "Let $X$ be a scheme. Then $X$ is affine if and only if"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(folder)(text).input_ids
    with torch.no_grad():
        assert (
            theirs.float()(ids).logits - checkpoint.load(tmp_path / "slm").logits(ids)
        ).abs().max() <= 1e-4
        out = tokenizer.decode(
            theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        )
    with capsys.disabled():
        print(f"\n  {text} ...{out!r}", end="")
    assert len(set(out.split())) > 3
    # its scores are the same before and after another export
    model = checkpoint.load(tmp_path / "slm")
    checkpoint.save(model, tmp_path / "again", tokenizer_from=tmp_path / "slm")
    assert checkpoint.model_hash(tmp_path / "again") == checkpoint.model_hash(tmp_path / "slm")
    for name in ("slm", "again"):
        assert stage(score, f"--model {name} --data problems --out {name}.bin {shape}")[0] == 0
    assert (tmp_path / "slm.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()
