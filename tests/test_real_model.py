"""A real pretrained model through the whole kit: equal to transformers, continued with SLM, opened again elsewhere."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prepare
import score
import train_ref
import train_slm
import weights
from conftest import SHARED
from real_model import real_model

pytestmark = pytest.mark.slow
LATEX, PROBLEMS = SHARED / "corpus/stacks_project.jsonl", SHARED / "corpus/gsm8k_train.jsonl"


def test_logits_equal_transformers(capsys):
    folder = real_model()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = weights.load(folder)
    for length in (1, 17, 512, 2048):
        tokens = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            a, b = ours.logits(tokens), theirs(tokens).logits
        worst = (a - b).abs().max().item()
        with capsys.disabled():
            print(f"\n  {length} tokens: largest difference of fp32 logits {worst:.1e}", end="")
        assert worst <= 1e-4
        if length == 512:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                low = ours.logits(tokens)
            p, q = b.log_softmax(-1), low.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).mean().item()
            agree = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
            with capsys.disabled():
                print(f"; bf16: KL {kl:.1e} nats, argmax agrees on {agree:.1%}", end="")
            assert kl < 0.01 and agree > 0.95


@pytest.mark.skipif(not LATEX.exists(), reason=f"needs {LATEX}")
def test_continued_with_slm_its_loss_falls_and_transformers_agrees(stage, tmp_path, capsys):
    folder = real_model()
    for name, path, n in (("latex", LATEX, 4), ("problems", PROBLEMS, 40)):
        rows = [json.loads(line) for line in path.read_text().splitlines()[:n]]
        texts = [row.get("text") or row["question"] + "\n" + row["answer"] for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:12000]}) + "\n" for text in texts))
        assert stage(prepare, f"--source {name}.jsonl --tokenizer {folder} --out {name} --workers 1")[0] == 0
    shape = "--seq-len 128 --device cpu --eval-every 0"
    assert stage(train_ref, f"--data problems --init {folder} --out ref --steps 4 --batch-size 4 --lr 2e-5 --warmup 2 {shape}")[0] == 0
    assert stage(score, "--model ref --data latex --out ref_loss.bin --seq-len 128 --batch-size 4 --device cpu")[0] == 0
    code, _, err = stage(train_slm, f"--k 0.6 --data latex --val latex --init {folder} --ref-loss ref_loss.bin --out slm "
                                    f"--steps 24 --batch-size 4 --lr 1e-4 --warmup 4 --seq-len 128 --device cpu --eval-every 8")
    assert code == 0, err
    losses = [json.loads(line).get("val_loss") for line in open(tmp_path / "slm/log.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    with capsys.disabled():
        print(f"\n  loss on the text it continues on: {' -> '.join(f'{loss:.3f}' for loss in losses)}", end="")
    assert losses[-1] < losses[0] - 0.05

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "slm"), AutoTokenizer.from_pretrained(tmp_path / "slm")
    text = "Let $X$ be a scheme. Then $X$ is affine if and only if"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(folder)(text).input_ids
    with torch.no_grad():
        assert (theirs.float()(ids).logits - weights.load(tmp_path / "slm").logits(ids)).abs().max() <= 1e-4
        out = tokenizer.decode(theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:])
    with capsys.disabled():
        print(f"\n  {text} ...{out!r}", end="")
    assert len(set(out.split())) > 3
    # its scores are the same before and after another export
    model = weights.load(tmp_path / "slm")
    weights.save(model, tmp_path / "again", tokenizer_from=tmp_path / "slm")
    assert weights.model_hash(tmp_path / "again") == weights.model_hash(tmp_path / "slm")
    for name in ("slm", "again"):
        assert stage(score, f"--model {name} --data problems --out {name}.bin --seq-len 128 --batch-size 4 --device cpu")[0] == 0
    assert (tmp_path / "slm.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()
