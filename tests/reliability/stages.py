"""What the tests of this folder share: a warm process, a folder with all that the stages read."""

import atexit
import json
import shutil

import numpy as np
import pytest

from conftest import once, write_model, write_set
from tools import local_hub
from warm import Warm

MACHINE = "--device cpu --threads 1"
RUN = f"--val v --init m --seq-len 16 --batch-size 4 --eval-every 3 {MACHINE}"
RUN += " --steps 6 --save-every 2 --snapshots 2"
SLM = f"--data d --ref-loss ref_loss.bin {RUN}"
SCORE = f"--data d --seq-len 16 --batch-size 4 --entropy {MACHINE}"
EVAL = f"--model run --max-new-tokens 4 --batch-tokens 4096 {MACHINE}"
FILES = "--source a.jsonl b.jsonl --workers 1"
HUB = "--source hf:open-web-math/open-web-math --tokenizer vocabulary --workers 1"
SETTINGS = {"score:CHUNK": 3, "text.building:MARK_SECONDS": -1, "text.reading:BLOCK": 3000}


@pytest.fixture(scope="session", name="hub")
@once
def hub_fixture(tmp_path_factory):
    """The address of a hub on this machine."""
    root = tmp_path_factory.mktemp("hub")
    local_hub.make_corpora(root / "datasets", 12)
    _, address, _ = local_hub.serve(root)
    return address


@pytest.fixture(scope="session", name="warm")
@once
def warm_fixture(hub, tmp_path_factory):
    process = Warm(
        HF_ENDPOINT=hub,
        HF_HOME=str(tmp_path_factory.mktemp("home")),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    atexit.register(process.close)
    return process


@pytest.fixture(scope="session", name="inputs")
@once
def inputs_fixture(vocabulary, warm, tmp_path_factory):
    """A folder with all that the commands read."""
    root = tmp_path_factory.mktemp("inputs")
    write_set(root / "d", vocabulary, 900, kind=np.arange(900) % 2)
    write_set(root / "v", vocabulary, 100, seed=1)
    write_model(root / "m", vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    vocabulary.save(root / "vocabulary")
    for name in "ab":
        texts = [f"{name}{i}: Tom has {i} apples and buys 4 more. " * 5 for i in range(40)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (root / "tests/eval").mkdir(parents=True)
    (root / "tests/prompts").mkdir()
    (root / "tests/prompts/gsm8k.md").write_text("Question: 1+1?\nAnswer: 2\n")
    question = "Which of the apples that Tom has and buys every day are sold on the market for 3?"
    (root / "tests/eval/gsm8k.jsonl").write_text(
        json.dumps({"question": question, "answer": "#### 3"}) + "\n"
    )
    for name in "pq":
        problems = [{"question": f"Q: {name} {i}+3=", "answer": f"#### {i + 3}"} for i in range(3)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    for stage, command in (
        ("score", f"--model m {SCORE} --out ref_loss.bin"),
        ("train_ref", f"--data d {RUN} --out run"),
    ):
        code, printed = warm.run(stage, command.split(), root, settings=SETTINGS)
        assert code == 0, printed
    return root


def fresh(start, folder):
    """The folder as it is before the command."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(start, folder, symlinks=True)
