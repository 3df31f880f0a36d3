"""Fixtures that several test files share: running a stage, small models, small token sets."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, nohup ignores SIGHUP: stages would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from killed import arm_changes, wait_for_no_disk  # noqa: E402

wait_for_no_disk()
arm_changes(seconds=float(os.environ.get("KIT_SLOW", 0)))

import model as model_file  # noqa: E402
from common.errors import cli, end_progress_bars  # noqa: E402
from hf import checkpoint  # noqa: E402
from hf import tokenizer as tokenizer_file  # noqa: E402
from text.writing import TokenSetWriter  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
HANGS = 1200  # seconds after which a test gives a process up; no result depends on it

builds_cpp = pytest.mark.skipif(
    not shutil.which("g++") or " " in torch.__file__,
    reason="torch.compile on a CPU needs g++, and no space in the name of torch's own folder",
)


def pytest_xdist_auto_num_workers(config):
    """The whole fast suite runs in two processes where there are two cores; a part of it in one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or config.option.markexpr != "not slow":
        return 0
    return min(2, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2


@pytest.fixture(autouse=True)
def no_bars_of_other_tests():
    """A progress bar that a library leaves open would stand among a later test's messages."""
    yield
    end_progress_bars()


@pytest.fixture
def stage(monkeypatch, tmp_path, capsys):
    """stage(module, "--flag value ...") runs a stage here: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *arguments.split()])
        code = 0
        try:
            cli(module.main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def launch(arguments, cwd, ranks=0, **options):
    """Start a stage as a process of its own, `ranks`: under torchrun. Returns the Popen.

    `arguments`: one string or a list. With KIT_SLOW in the environment the stage is slowed (see
    killed.py).
    """
    words = arguments.split() if isinstance(arguments, str) else [str(word) for word in arguments]
    if os.environ.get("KIT_SLOW") and words[0].endswith(".py") and words[0] != "tests/killed.py":
        words = ["tests/killed.py", "never", *words]
    words[0] = str(ROOT / words[0])
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [*torchrun, *words]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish_in_turn(command, variants, cwd, ranks):
    """Run a command with each of some flags, --out ranks0, ranks1, ...; ranks are started once."""
    lines = [f"{command} {flags} --out ranks{i}" for i, flags in enumerate(variants)]
    (cwd / "commands").write_text("\n".join(lines))
    finish(launch("tests/in_turn.py commands", cwd, ranks))


def finish(process):
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, out
    return out


def once(make):
    """A fixture's function that is called once for all modules that import the fixture."""
    made = []

    @functools.wraps(make)
    def known(*args, **more):
        if not made:
            made.append(make(*args, **more))
        return made[0]

    return known


@pytest.fixture(scope="session")
def vocabulary():
    """A trained byte-level BPE of 300 ids."""
    return tokenizer_file.train_bpe(
        ["Tom has 3 apples and buys 4 more. How many apples? 3+4=7 #### 7\n"] * 20, 300
    )


def write_set(
    folder,
    vocabulary,
    n=5000,
    seed=0,
    loss_mask=None,
    kind=None,
    kinds=("even", "odd"),
    tokens=None,
):
    """A token set of n random ids of the vocabulary, with a structure that can be learned."""
    rng = np.random.RandomState(seed)
    if tokens is None:
        tokens = rng.randint(0, vocabulary.n_vocab, n)
        before = tokens[: len(tokens[1::2]) * 2 : 2]
        tokens[1::2] = (before * 7 + 3) % vocabulary.n_vocab  # every second one follows
    arrays = {"tokens": np.asarray(tokens)}
    if loss_mask is not None:
        arrays["loss_mask"] = loss_mask
    if kind is not None:
        arrays["kind"] = kind
    writer = TokenSetWriter(folder, vocabulary.n_vocab, tuple(arrays))
    writer.append(**arrays)
    vocabulary.save(folder)
    meta = {"kinds": list(kinds)} if kind is not None else {}
    return writer.finish(tokenizer=vocabulary.hash, sources=[], seed=seed, **meta)


def write_model(folder, vocabulary, seed=0, tokenizer_from=None, **changes):
    """A tiny random Llama with the vocabulary's files, as a Hugging Face folder."""
    config = model_file.Config(
        **{
            "vocab_size": vocabulary.n_vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    model = model_file.initialise(model_file.Transformer(config), seed)
    checkpoint.save(model, folder)
    vocabulary.save(folder)
    return model
