"""A small selective run with snapshots on hostile text, for the tests of tools/explore."""

import argparse
import json

from common.device import Env

import numpy as np
import pytest

import score
import train_slm
from common.checksums import Checksums
from conftest import write_model
from text.writing import TokenSetWriter

HOSTILE = [
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></script>",
    "null \0 byte, \u202eoverride\u202c, \u2066isolate\u2069, \u200bzero width, \x1b[31m",
    "emoji 👩‍🎓 and 🎉é",
    "שלום עולם, مرحبا بالعالم 123",
    "&lt;b&gt; &amp; \u2028 <!-- <script> --> ]]> {{x}}",
]


@pytest.fixture(scope="session", name="run")
def explored_run(vocabulary, tmp_path_factory):
    """The folder that holds data, base, ref, ref_loss.bin and slm, a small selective run.

    It has snapshots; its text is labelled, of two sources and partly masked; the stored losses have
    many ties.
    """
    root = tmp_path_factory.mktemp("explore")
    documents = (
        HOSTILE * 3 + ["Tom has 3 apples and buys 4 more. How many apples? 3+4=7 #### 7\n"] * 25
    )
    ids = [np.append(vocabulary.encode(text), vocabulary.eos_id) for text in documents]
    tokens = np.concatenate(ids)
    writer = TokenSetWriter(root / "data", vocabulary.n_vocab, ("tokens", "loss_mask", "kind"))
    writer.append(
        tokens=tokens,
        loss_mask=np.arange(len(tokens)) % 11 > 0,
        kind=np.repeat(np.arange(len(ids)) < len(HOSTILE) * 3, [len(i) for i in ids]),
    )
    vocabulary.save(root / "data")
    sizes = [sum(len(i) for i in part) for part in (ids[:15], ids[15:])]
    names = ("<i>nasty</i>", "word problems")
    writer.finish(
        tokenizer=vocabulary.hash,
        seed=0,
        kinds=["plain", "hostile"],
        sources=[{"name": name, "documents": 0, "tokens": n} for name, n in zip(names, sizes)],
    )
    write_model(root / "base", vocabulary, seed=1, num_hidden_layers=1)
    write_model(root / "ref", vocabulary, seed=2, num_hidden_layers=1)
    call(
        score,
        f"--model {root}/ref --data {root}/data --out {root}/ref_loss.bin --seq-len 32 --entropy",
    )
    for name in ("ref_loss.bin", "ref_entropy.bin"):
        values = np.memmap(root / name, "<f2", "r+")
        values[:] = np.rint(values * 4) / 4  # ties, and NaN stays NaN
        values.flush()
    note = json.loads((root / "ref_loss.json").read_text())
    for name in note["checksums"]:
        note["checksums"][name] = Checksums(root / name, (root / name).stat().st_size).all()
    (root / "ref_loss.json").write_text(json.dumps(note))
    call(
        train_slm,
        f"--data {root}/data --val {root}/data --init {root}/base "
        f"--ref-loss {root}/ref_loss.bin --out {root}/slm --seq-len 32 --batch-size 6 "
        f"--micro-batch-size 3 --steps 8 --snapshots 2 --lr 1e-2 --eval-every 2",
    )
    return root


def call(module, arguments):
    """Run a stage or a tool in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module.__name__, *arguments.split()])
        module.main()


def env():
    return Env(argparse.Namespace(device="cpu", dtype="auto", threads=1))
