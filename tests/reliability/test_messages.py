"""The commands that messages print: each is run as it stands, and then what was refused works."""

import ast
import importlib
import json
import re

import pytest

import eval_math
import score
import train_ref
import train_slm
from common import numerics
from common.command_line import SEED
from conftest import ROOT, write_model, write_set
from demo import chain, corpus
from evaluation import tasks
from hf import tokenizer
from tools import decontaminate
from tools.results import __main__ as results

MACHINE = "--seq-len 16 --batch-size 4 --device cpu --threads 1"
STEPS = f"--steps 2 --batch-size 4 {MACHINE}"
SCORE = f"--model r --data d --out ref_loss.bin {MACHINE}"
SLM = f"--data d --val v --init m --out run {STEPS}"
PRINTED = re.compile(r"\bpython ((?:-m )?[a-z_.]+.*)$")
STAGE = re.compile(r"\b(prepare|train_ref|score|train_slm|eval_math)\.py --|python -m tools")
# What a reader fills in, and with what here:
OURS = {"REFERENCE": "r", "FILE": "made.bin", "TEXT": "text.jsonl", "MODEL": "m", "NEW": "new"}
# Not messages: the demo's chain, which tests/demo runs, and usage lines of parsers.
NO_MESSAGES = {
    "demo/chain.py",
    "tools/plan/__main__.py",
    "tools/gpu_check/stages.py",
    "tools/local_hub.py",
}


@pytest.fixture
def inputs(vocabulary, tmp_path, monkeypatch):
    """Token sets d and v, models m and r of their vocabulary, model o of another one, a text."""
    write_set(tmp_path / "d", vocabulary, 400)
    write_set(tmp_path / "v", vocabulary, 100, seed=1)
    write_model(tmp_path / "m", vocabulary)
    write_model(tmp_path / "r", vocabulary, seed=5)
    other = tokenizer.train_bpe(["zebra quagga okapi " * 20], 290)
    write_model(tmp_path / "o", other)
    write_set(tmp_path / "w", other, 100)
    text = "Ann has 12 apples and eats 5 of them. 12-5=7 "
    lines = [json.dumps({"text": text * n}) + "\n" for n in range(1, 9)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def run(stage, inputs):
    """run(module, flags): (exit code, what it said). run.printed(): the command that it printed."""

    def run(module, flags):
        code, out, err = stage(module, flags)
        run.said = out + err
        return code, run.said

    def printed():
        """The words behind `python`, with what a reader fills in."""
        (found,) = PRINTED.findall(run.said.strip())
        return [OURS.get(word, word) for word in found.split()]

    def follow():
        words = printed()
        named = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        rest = " ".join(words[2:] if words[0] == "-m" else words[1:])
        name = f"{named}.__main__" if (ROOT / named.replace(".", "/")).is_dir() else named
        code, said = run(importlib.import_module(name), rest)
        assert code == 0, f"{named} {rest}\n{said}"

    run.printed, run.follow = printed, follow
    return run


def refused_until_followed(run, module, flags, then=None):
    """Exit code 2, the command that is printed, and the same again (`then`: with other flags)."""
    code, said = run(module, flags)
    assert code == 2 and said.strip().count("\n") == 0, said
    run.follow()
    code, said = run(module, flags if then is None else then)
    assert code == 0, said


def test_a_token_set_that_is_missing(run):
    refused_until_followed(run, train_ref, f"--data nowhere --init m --out run {STEPS}")


def test_losses_that_are_missing(run):
    refused_until_followed(run, train_slm, SLM, then=f"{SLM} --ref-loss ref_loss.bin")
    refused_until_followed(run, train_slm, f"{SLM} --out again --ref-loss other.bin")


def test_losses_and_entropies_that_are_missing(run):
    args = f"{SLM} --score ref_entropy"
    refused_until_followed(run, train_slm, args, then=f"{args} --ref-loss ref_loss.bin")
    refused_until_followed(
        run, train_slm, f"{SLM} --out again --score ref_entropy --ref-loss other.bin"
    )


def test_entropies_beside_losses_that_are_there(run, inputs):
    assert run(score, SCORE)[0] == 0
    losses = (inputs / "ref_loss.bin").read_bytes()
    refused_until_followed(run, train_slm, f"{SLM} --score ref_entropy --ref-loss ref_loss.bin")
    assert (inputs / "ref_loss.bin").read_bytes() == losses


@pytest.mark.parametrize("flags", ["--seq-len 32", "--dtype bfloat16", "--document-mask"])
def test_losses_of_other_windows_precision_or_mask(run, flags):
    """The reference is named in the note: there is nothing to fill in. The losses stay: they may be
    another run's."""
    assert run(score, SCORE)[0] == 0
    args = f"{SLM} {flags} --seq-len 32 --ref-loss ref_loss"
    assert run(train_slm, f"{args}.bin")[0] == 2
    assert run.printed()[1:3] == ["--model", "r"] and "--overwrite" not in run.printed()
    refused_until_followed(run, train_slm, f"{args}.bin", then=f"{args}-2.bin")
    assert run(score, SCORE)[0] == 0


def test_losses_whose_note_is_lost(run, inputs):
    assert run(score, SCORE)[0] == 0
    (inputs / "ref_loss.json").unlink()
    args = f"{SLM} --ref-loss ref_loss"
    refused_until_followed(run, train_slm, f"{args}.bin", then=f"{args}-2.bin")


def test_losses_that_were_damaged(run, inputs):
    assert run(score, SCORE)[0] == 0
    with open(inputs / "ref_loss.bin", "r+b") as file:
        file.seek(100)
        file.write(b"\x11\x11")
    refused_until_followed(run, train_slm, f"{SLM} --ref-loss ref_loss.bin")
    (inputs / "ref_loss.json").write_text("{")
    refused_until_followed(run, train_slm, f"{SLM} --out again --ref-loss ref_loss.bin")


def test_a_validation_set_that_the_reference_was_not_asked_about(run):
    assert run(score, f"{SCORE} --val v")[0] == 0
    args = SLM.replace("--val v", "--val d")
    code, said = run(train_slm, f"{args} --ref-loss ref_loss.bin")
    assert code == 0
    run.said = next(line for line in said.splitlines() if line.startswith("note: "))
    run.follow()
    code, said = run(train_slm, f"{args} --out again --ref-loss ref_loss.bin")
    assert code == 0 and "the reference's validation loss is" in said


def test_another_vocabulary(run):
    refused_until_followed(
        run, score, SCORE.replace("--model r", "--model o"), then="--model o --data new --out x.bin"
    )


def test_a_validation_set_of_another_vocabulary(run):
    refused_until_followed(
        run, train_ref, f"--data d --val w --init m --out a {STEPS}",
        then=f"--data d --val new --init m --out a {STEPS}",
    )  # fmt: skip


def test_the_demo_on_several_ranks(run, monkeypatch):
    monkeypatch.setattr(corpus, "PAGES", {"base": 40, "corpus": 40, "curated": 40, "val": 40})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(train_ref, "")[0] == 2
    run.follow()
    assert "base/summary.json: is not there" in run(train_ref, "")[1]


def test_the_demo_s_problems(run, monkeypatch):
    pages = {"base": 40, "corpus": 40, "curated": 40, "val": 40}
    monkeypatch.setattr(corpus, "PAGES", pages)
    assert run(eval_math, "--model m")[0] == 2
    run.follow()
    assert "is not there yet" not in run(eval_math, "--model nowhere")[1]


def test_a_token_set_given_to_decontaminate(run, monkeypatch):
    problem = tasks.Example(0, "one two three four five six seven eight nine", "", "", "", {})
    monkeypatch.setattr(tasks, "load", lambda name, data_dir, answers: [problem])
    assert run(decontaminate, "--source d --tasks gsm8k")[0] == 2
    run.said = run.said.strip().splitlines()[-1]
    run.follow()


def test_losses_rounded_in_another_way(run):
    before, now = ({"device": name} for name in ("cpu", "gpu"))
    run.said = numerics.notice("ref_loss.bin", before, now)
    run.follow()


def test_tables_that_differ(run, monkeypatch):
    monkeypatch.setattr(results.pages, "update", lambda check: ["docs/results.md"] if check else [])
    refused_until_followed(run, results, "--check", then="")


def test_the_demo_s_losses_that_cannot_be_read(run, inputs):
    """It is made again by the command of the chain itself, but for --overwrite."""
    (inputs / "out/demo").mkdir(parents=True)
    (inputs / "out/demo/ref_loss.json").write_text("{")
    path, command = chain.commands(SEED)["ref_loss"]
    with pytest.raises(ValueError) as refused:
        chain.finished(path, command)
    assert str(refused.value).endswith(f"python {command} --overwrite")


MAKERS = ("command", "shell_line", "score_command")
CASES = {
    ("data.py", "__init__"),
    ("data.py", "remake"),
    ("data.py", "score_command"),
    ("demo/chain.py", "ensure"),
    ("demo/chain.py", "finished"),
    ("eval_math.py", "check"),
    ("common/numerics.py", "notice"),
    ("hf/models.py", "check_vocabulary"),
    ("tools/decontaminate.py", "main"),
    ("tools/results/__main__.py", "main"),
    ("training/columns.py", "command"),
    ("training/selector.py", "_reference_loss_on"),
    ("training/validation.py", "validation_sets"),
}


def test_no_message_has_a_command_that_is_not_run_above():
    """Each is made by common.errors.command, in one of the places that the tests above reach."""
    places, by_hand = set(), []
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name.startswith(("tests/", "figures/", "package/", ".")):
            continue
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                places |= {(name, function.name) for _ in calls_of_command(function)}
        if name not in NO_MESSAGES:
            by_hand += [(name, text) for text in messages(tree) if STAGE.search(text)]
    assert places == CASES
    assert by_hand == []


def calls_of_command(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MAKERS:
            yield node


def messages(tree):
    """The texts in a file's code that are no docstring, no help and no usage line."""
    passed_over = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed_over.add(id(node.value))
        if isinstance(node, ast.keyword) and node.arg == "help":
            passed_over |= {id(part) for part in ast.walk(node.value)}
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "usage":
            passed_over |= {id(part) for part in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in passed_over:
                yield node.value
