"""train_slm.py with other methods: normalisers, what they read, schedules, a fork's own scores."""

import importlib
import importlib.util
import inspect
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common.device import Env

import numpy as np
import pytest
import torch

import methods
import score
import slm
import train_ref
import train_slm
from common import provenance
from common.errors import UserError
from conftest import finish, finish_in_turn, launch, write_model, write_set
from data import TokenSet
from hf import checkpoint
from hf.tokenizer import Tokenizer
from training import arrays
from training.memory import Memory
from training.method_flags import defaults_of, k_at, set_to
from training.run import Run
from training.selector import Choice, Selector
from training.source import source_hash

TINY = "--seq-len 16 --batch-size 4 --device cpu --threads 1"
SLM = f"--data d --init m {TINY}"
FILES = "--ref-loss ref_loss.bin --base-loss base_loss.bin"
SCORING = "--data d --seq-len 16 --device cpu --threads 1"


@pytest.fixture
def inputs(vocabulary, tmp_path):
    """A corpus d of documents, most windows of `sparse` without a valid target, models m and r."""
    rng = np.random.RandomState(0)
    tokens = rng.randint(0, vocabulary.n_vocab, 1500)
    tokens[rng.rand(1500) < 0.04] = vocabulary.eos_id
    write_set(tmp_path / "d", vocabulary, tokens=tokens)
    mask = np.zeros(1500, np.uint8)
    mask[5::64] = mask[7::128] = 1
    write_set(tmp_path / "sparse", vocabulary, tokens=tokens, loss_mask=mask)
    write_model(tmp_path / "m", vocabulary)
    write_model(tmp_path / "r", vocabulary, seed=5)
    return tmp_path


@pytest.fixture
def scored(stage, inputs):
    for model, out in (("r", "ref_loss"), ("m", "base_loss")):
        code, _, err = stage(score, f"--model {model} {SCORING} --out {out}.bin --entropy")
        assert code == 0, err
    return inputs


def tensors(folder):
    paths = checkpoint.weight_files(folder)
    return {name: tensor for path in paths for name, tensor in checkpoint.read_tensors(path)}


def distance(a, b):
    a, b = tensors(a), tensors(b)
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def trained(stage, flags):
    code, out, err = stage(train_slm, f"{SLM} {flags}")
    assert code == 0, err
    return out


# Those whose divisor is known from the losses alone, from weights, and from masks.
NORMALISERS = [
    "--score profit --set tau=0.0033",
    "--score mile",
    "--score dft",
    "--score soft_excess --scope sequence",
    "--score document",
    "--score ref_or --scope sequence",
]


@pytest.mark.parametrize("flags", NORMALISERS)
def test_one_micro_batch_equals_four(stage, scored, flags):
    trained(stage, f"{FILES} --steps 4 {flags} --out one")
    trained(stage, f"{FILES} --steps 4 {flags} --out four --micro-batch-size 1")
    assert distance(scored / "one", scored / "four") < 1e-5
    assert distance(scored / "one", scored / "m") > 1e-4
    counts = [[r["tokens_selected"] for r in log(scored / out)] for out in ("one", "four")]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_where_most_have_no_valid_target(stage, inputs, parallel, ranks):
    """With one rank, a window each at a time; three of four have nothing to learn from."""
    scoring = SCORING.replace("--data d", "--data sparse")
    assert stage(score, f"--model r {scoring} --out sparse.bin")[0] == 0
    args = "--data sparse --steps 4 --micro-batch-size 1"
    scores = (
        "--score profit --set tau=0.0033",
        "--score mile",
        "--score deft",
        "--score document_ref --ref-loss sparse.bin",
    )
    finish_in_turn(f"train_slm.py {SLM} {args} --parallel {parallel}", scores, inputs, ranks)
    for number, flags in enumerate(scores):
        trained(stage, f"{args} {flags} --out one{number}")
        assert distance(inputs / f"one{number}", inputs / f"ranks{number}") < 1e-5, flags


@pytest.mark.parametrize("name, flag", [("rel", "base"), ("longce", "short")])
def test_a_missing_file_is_named_with_the_command_that_makes_it(stage, inputs, name, flag):
    code, _, err = stage(train_slm, f"{SLM} --steps 2 --score {name} --out a")
    assert code == 2 and f"--{flag}-loss: --score {name} needs" in err
    command = re.search(r"score\.py (.*)$", err.strip())[1].replace("MODEL", "m")
    code, _, err = stage(score, f"{command} --device cpu --threads 1")
    assert code == 0, err
    given = f"--{flag}-loss {flag}_loss.bin"
    trained(stage, f"--steps 2 --score {name} --out a {given}")
    other = {"base": "longce", "short": "rel"}[flag]  # the losses of one are not those of the other
    wrong = given.replace(f"--{flag}-loss", {"base": "--short-loss", "short": "--base-loss"}[flag])
    code, _, err = stage(train_slm, f"{SLM} --steps 2 --score {other} --out b {wrong}")
    assert code == 2 and "was scored with" in err and "name another file" in err


def test_losses_of_another_start_are_refused(stage, scored):
    code, _, err = stage(train_slm, f"{SLM} --steps 2 --score rel --base-loss ref_loss.bin --out a")
    assert code == 2 and "holds the losses of model" in err and "score.py --model m" in err
    assert not (scored / "a").exists()


def test_a_short_context_is_that_of_shorter_windows(stage, inputs):
    """Against a forward pass of each piece of 8 tokens: its second half, of the first one all."""
    args = f"--model m {SCORING} --out short_loss.bin"
    assert stage(score, f"{args} --context 8")[0] == 0
    code, _, err = stage(score, args)
    assert code == 2 and "context 8 -> None" in err
    for wrong in (7, 16):
        code, _, err = stage(score, f"{args} --context {wrong} --overwrite")
        assert code == 2 and f"--context: got {wrong}, wanted an even number below" in err
    found = np.fromfile(inputs / "short_loss.bin", "<f2").astype(np.float32)
    tokens = torch.from_numpy(np.array(TokenSet(inputs / "d").tokens, np.int64))
    model = checkpoint.load(inputs / "m")
    for window in (0, 5):
        for start in (0, 4, 8):
            of_piece = piece_losses(model, tokens, window * 16 + start, 8)[0]
            first = 0 if start == 0 else 4
            at = window * 16 + start + 1
            stored = torch.from_numpy(found[at + first : at + 8])
            assert (of_piece[first:] - stored).abs().max() < 0.01


def piece_losses(model, tokens, at, length):
    """Losses and entropies of `length` targets, from tokens[at] on."""
    with torch.no_grad():
        log_p = model.logits(tokens[None, at : at + length])[0].log_softmax(-1)
    losses = -log_p.gather(1, tokens[at + 1 : at + length + 1, None])[:, 0]
    return losses, -(log_p.exp() * log_p).sum(-1)


def test_a_short_context_ends_where_the_window_does(stage, inputs):
    """Windows of 18 tokens: the last piece of 8 has two of them behind its first half, no more."""
    flags = SCORING.replace("--seq-len 16", "--seq-len 18")
    args = f"--model m {flags} --out short_loss.bin --context 8 --entropy"
    assert stage(score, args)[0] == 0
    found = [
        torch.from_numpy(np.fromfile(inputs / f"{name}.bin", "<f2").astype(np.float32))
        for name in ("short_loss", "short_loss.entropy")
    ]
    tokens = torch.from_numpy(np.array(TokenSet(inputs / "d").tokens, np.int64))
    model = checkpoint.load(inputs / "m")
    for at in (12, 18 * 5 + 12):  # the last piece of the first window and of the sixth
        for values, stored in zip(piece_losses(model, tokens, at, 6), found):
            assert (values[4:] - stored[at + 5 : at + 7]).abs().max() < 0.01


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--score exces", "--score"),
        ("--score dft --k 0.5", "--k: got 0.5 with --score dft, which weighs each token"),
        ("--score dft --k 1.0:0.5@0.5", "--k: got 1.0:0.5@0.5 with --score dft"),
        ("--score dft --k 1.0", "for plain training give --score excess --k 1.0"),
        ("--k 1.0:0.6", "wanted K:K@SHARE"),
        ("--k 1.0:0.6@0.5:0.4@0.3", "wanted K:K@SHARE"),
        ("--k 1.0:60@0.5", "--k: got 60, wanted a share"),
        ("--scope set", "--scope set: --score excess looks at the student, wanted one that is the"),
        ("--score mile --set gama=2", "--set: got gama=2 with --score mile, wanted one of gamma"),
        ("--score dft --set p=2", "--set: got p=2 with --score dft, which takes none"),
        ("--score mile --set gamma", "--set: got gamma, wanted NAME=NUMBER"),
        ("--score loss --stored quality", "--stored: got quality, wanted NAME=FILE"),
        ("--score loss --stored loss=x.bin", "t.loss is something else already"),
        ("--score document", "--base-loss: --score document needs the losses of the model that"),
        ("--score negative", "64 of 64 weights are below 0 or not finite"),
        ("--score nothing", "the weights of all 64 targets of a batch are 0"),
        ("--score longce --seq-len 2", "--seq-len: got 2 with --score longce, wanted at least 3"),
        ("--score unknown", "--score unknown needs t.quality, wanted one of loss, entropy"),
        ("--score unknown --stored quality=x.bin", "--stored quality: x.bin does not exist"),
        ("--score memft --backward pruned", "--backward pruned: got it with --score memft"),
        ("--score mile --backward pruned", "--backward pruned: got it with --score mile"),
        ("--score remembers --k 1.0:0.5@0.5", "which remembers what it has seen"),
        ("--score soft_excess --rank-windows 3", "--rank-windows: got 3 with --scope micro"),
        ("--score rel --init scratch", "--init scratch is none that can be scored"),
        ("--score alone --scope sequence --k 0.5", "--score alone: ranks windows among each other"),
        ("--score loss --k 0.9:0.6@1", "wanted K:K@SHARE with shares of the steps that rise and"),
        ("--score harder", "--score harder: the function gives yes and no (bool): wanted numbers"),
        ("--score clamped", "--score clamped: changes t.loss in place; wanted a new tensor"),
        ("--score forgetful", "--score forgetful: changes t.memory in place"),
    ],
)
def test_bad_lines(stage, inputs, monkeypatch, flags, message):
    needs = ("loss",)
    for name, value in (("negative", -1.0), ("nothing", 0.0)):
        weight = slm.Weight(lambda t, value=value: torch.full_like(t.loss, value), needs=needs)
        monkeypatch.setitem(slm.SCORES, name, weight)
    monkeypatch.setitem(slm.SCORES, "unknown", slm.Score(lambda t: t.quality, needs=("quality",)))
    monkeypatch.setitem(slm.SCORES, "remembers", REMEMBERS)
    harder = slm.Score(lambda t: t.loss > t.loss.mean(), needs=needs)
    monkeypatch.setitem(slm.SCORES, "harder", harder)
    monkeypatch.setitem(slm.SCORES, "nearest", slm.Score(nearest, needs=needs))
    clamped = slm.Score(lambda t: t.loss.clamp_(max=3.0), needs=needs)
    monkeypatch.setitem(slm.SCORES, "clamped", clamped)
    forgetful = replace(REMEMBERS, remember=lambda t: t.memory.mul_(0.9).add_(t.loss))
    monkeypatch.setitem(slm.SCORES, "forgetful", forgetful)
    rho = methods.SCORES["rho"]
    alone = replace(rho, function=lambda t: rho.function(with_reference(t)), needs=needs)
    monkeypatch.setitem(slm.SCORES, "alone", alone)
    code, _, err = stage(train_slm, f"{SLM} --steps 2 --out a {flags}")
    assert code == 2 and message in err.splitlines()[-1], err
    assert err.count("--score ") <= 1 + message.count("--score "), err


def nearest(t, n=3):
    """How near a loss is to the n largest of its window."""
    return -(t.loss[..., None] - t.loss.topk(n).values[:, None]).abs().amin(-1)


def test_numbers_of_a_method_have_their_default_s_type(stage, inputs, monkeypatch):
    monkeypatch.setitem(slm.SCORES, "nearest", slm.Score(nearest, needs=("loss",)))
    trained(stage, "--score nearest --set n=5 --steps 2 --out a")
    assert arguments(inputs / "a")["set"] == ["n=5"]


def test_the_same_numbers_are_the_same_run(stage, inputs, monkeypatch):
    """However they are written, and where they are the defaults; so is a schedule."""
    for name, flags, same, another in (
        ("a", "--score mile --set gamma=2", "--set gamma=2.0", "--set gamma=2.1"),
        ("b", "--score mile", "--set gamma=1", "--set gamma=.5"),
        ("c", "--score loss --k 1.0:0.6@0.3", "--k 1:0.6@0.30", "--k 1:0.6@0.31"),
    ):
        trained(stage, f"{flags} --steps 2 --out {name}")
        trained(stage, f"{flags} --steps 2 --out {name} {same}")
        code, _, err = stage(train_slm, f"{SLM} {flags} --steps 2 --out {name} {another}")
        assert code == 2 and "with other arguments" in err
    # As it was noted before.
    path = inputs / "a/args.json"
    path.write_text(path.read_text().replace("gamma=2", "gamma=2.0"))
    trained(stage, "--score mile --set gamma=2 --steps 2 --out a")
    path = inputs / "b/args.json"
    path.write_text(json.dumps(arguments(inputs / "b") | {"set": ["gamma=1"]}))
    trained(stage, "--score mile --steps 2 --out b")
    path = inputs / "c/args.json"  # a switch that never comes was not refused
    path.write_text(json.dumps(arguments(inputs / "c") | {"k_schedule": "1.0:0.6@1"}))
    code, _, err = stage(train_slm, f"{SLM} --score loss --k 0.6 --steps 2 --out c")
    assert code == 2 and "with other arguments" in err


def test_what_can_be_set():
    """What each function takes behind what it is given, dropped only where it is every default."""
    method = slm.Score(
        lambda t, gamma=1.0, *, least=None: t.loss,
        needs=("loss", "memory"),
        choose=lambda values, valid, k=0.5, together=None, n=3: valid,
        remember=lambda t, gamma=2.0: t.loss,
    )
    assert {*defaults_of(method)} == {"gamma", "least", "n"}
    assert set_to(method, {"gamma": 1.0, "n": 3}) == ["gamma=1"]
    assert set_to(method, {"least": 2.5, "n": 4}) == ["least=2.5", "n=4"]
    selection = slm.Selection(0.6, settings=(("k", 2), ("n", 4)))
    assert selection.settings_of(method.choose, 4) == {"n": 4}


def arguments(folder):
    return json.loads((folder / "args.json").read_text())


def test_the_baseline_of_a_score_that_is_not_registered_here(stage, inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(slm.SCORES, "nearest", slm.Score(nearest, needs=("loss",)))
        trained(stage, "--score nearest --set n=5 --steps 2 --out a")
    flags = "--from a/args.json --out b"
    code, _, err = stage(train_slm, flags)
    assert code == 2 and "--from: --score is nearest there, wanted one of" in err
    code, _, err = stage(train_slm, f"{flags} --score excess --k 1.0")
    assert code == 0, err
    trained(stage, "--k 1.0 --steps 2 --out c")
    assert distance(inputs / "b", inputs / "c") == 0


def with_reference(t):
    return slm.Tokens(**{**vars(t), "ref_loss": torch.zeros_like(t.loss)})


@pytest.mark.parametrize("steps", [100, 300, 1000])
def test_a_schedule_switches_at_its_share_of_the_steps(steps):
    for percent in range(1, 100):
        args = SimpleNamespace(k=0.5, k_schedule=f"1.0:0.5@{percent / 100}", steps=steps)
        ks = [k_at(step, args) for step in range(steps)]
        assert ks.index(0.5) == steps * percent // 100


def test_a_choice_by_values_that_are_gone_is_not_shown(scored, monkeypatch):
    """The noise that ranked the set is that of the first step; settled weights stay as they are."""
    monkeypatch.chdir(scored)
    found = selector("--score random --scope set --k 0.5")
    windows = np.arange(4)
    valid = torch.from_numpy(found.data.valid(windows, 16))
    found.begin(None, 3, [windows])
    choice = found.choice(3, 0, windows, valid)
    choice.keep(torch.zeros(4, 16))
    assert choice.ranked() is None

    weights = torch.rand(4, 16)
    choice = Choice(slm.Selection(1.0, "dft", "batch"), slm.Tokens(), valid, weights)
    choice.keep(torch.zeros(4, 16))
    assert torch.equal(choice.ranked(), weights)


def test_a_schedule_switches_k(stage, inputs):
    trained(stage, "--score loss --k 1.0:0.5@0.5 --steps 4 --out a")
    counts = [record["tokens_selected"] for record in log(inputs / "a")]
    assert counts == [64, 128, 160, 192]
    assert stage(train_slm, "--from a/args.json --out b")[0] == 0
    assert distance(inputs / "a", inputs / "b") == 0


def test_one_epoch_stays_one_epoch_where_the_batch_changes(stage, inputs):
    trained(stage, "--score loss --k 0.5 --out a")
    assert stage(train_slm, "--from a/args.json --batch-size 2 --out b")[0] == 0
    n_windows = TokenSet("d").n_windows(16)
    for folder, batch in (("a", 4), ("b", 2)):
        saved = json.loads((inputs / folder / "args.json").read_text())
        assert saved["steps"] == -(-n_windows // batch)


def test_a_run_of_before_defaults_were_noted_goes_on(stage, inputs):
    """args.json had no epochs where none were named; the steps say the same."""
    trained(stage, "--score loss --k 0.5 --out a")
    path = inputs / "a/args.json"
    saved = json.loads(path.read_text())
    assert saved["epochs"] == 1
    path.write_text(json.dumps(saved | {"epochs": None}))
    trained(stage, "--score loss --k 0.5 --out a")
    trained(stage, f"--score loss --k 0.5 --steps {saved['steps']} --out a")


def test_plain_training_from_a_weights_arguments_is_asked_for_by_name(stage, inputs):
    """`--from RUN/args.json --k 1.0` must not be that weight again."""
    trained(stage, "--score dft --steps 2 --out a")
    trained(stage, "--k 1.0 --steps 2 --out plain")
    code, _, err = stage(train_slm, "--from a/args.json --k 1.0 --out b")
    assert code == 2 and "--k: got 1.0 with --score dft" in err and not (inputs / "b").exists()
    assert stage(train_slm, "--from a/args.json --score excess --k 1.0 --out b")[0] == 0
    assert distance(inputs / "plain", inputs / "b") == 0
    assert stage(train_slm, "--from a/args.json --out c")[0] == 0
    assert distance(inputs / "a", inputs / "c") == 0


def test_the_reference_s_trainer_does_not_repeat_a_selective_run(stage, inputs):
    """It would be plain training without a word. The baseline is plain training, and may be."""
    trained(stage, "--score loss --k 0.5 --steps 2 --out a")
    trained(stage, "--score dft --steps 2 --out w")
    trained(stage, "--k 1.0 --steps 2 --out plain")
    for run in ("a", "w"):
        code, _, err = stage(train_ref, f"--from {run}/args.json --out b")
        assert code == 2 and "--from: is a run of train_slm.py, which chose or weighed" in err
    assert stage(train_ref, "--from plain/args.json --out b")[0] == 0
    assert distance(inputs / "plain", inputs / "b") == 0


def test_windows_ranked_together_are_the_same_however_they_are_named(stage, inputs):
    """A micro-batch of 4, then of 2 with the same windows ranked; and --score without a choice."""
    trained(stage, "--score loss --k 0.5 --steps 3 --micro-batch-size 2 --out a")
    named = "--score loss --k 0.5 --steps 3 --micro-batch-size 4 --rank-windows 2"
    code, out, err = stage(train_slm, f"{SLM} {named} --out a")
    assert code == 0, err
    code, _, err = stage(train_slm, f"{SLM} {named.replace('windows 2', 'windows 4')} --out a")
    assert code == 2 and "windows ranked together 2 -> 4" in err
    trained(stage, "--k 1.0 --steps 2 --out plain")
    trained(stage, "--k 1.0 --score loss --scope batch --steps 2 --out plain")


def test_settings_that_are_no_numbers_and_functions_that_fail_are_one_line(stage, inputs):
    for flags, said in (
        ("--score profit --set tau=nan", "--set: got tau=nan, wanted a finite number"),
        ("--score memft --set tau=0", "--score memft: math domain error"),
        ("--score loss --epochs 1e308", "--epochs: got 1e+308, wanted at most"),
    ):
        code, _, err = stage(train_slm, f"{SLM} {flags} --out a")
        assert code == 2 and said in err and "Traceback" not in err


def test_from_leaves_the_shape_to_another_start(stage, inputs):
    """What a run from scratch says of its shape is not asked of a model that --init names."""
    flags = f"--data d --score loss --k 0.5 --steps 2 {TINY}"
    shape = "--init scratch --n-layer 1 --d-model 16 --n-head 2"
    for named in (f"{flags} {shape} --out a", f"{flags} --init m --out b"):
        assert stage(train_slm, named)[0] == 0
    assert stage(train_slm, "--from a/args.json --init m --out c")[0] == 0
    assert distance(inputs / "b", inputs / "c") == 0
    code, _, err = stage(train_slm, "--from a/args.json --init scratch --out again")
    assert code == 0, err
    assert distance(inputs / "a", inputs / "again") == 0


@pytest.mark.parametrize("flag, value", [("score", "mine"), ("head", "fused"), ("dtype", "fp8")])
def test_from_refuses_what_the_flag_would_refuse(stage, inputs, flag, value):
    trained(stage, "--score loss --k 0.5 --steps 2 --out a")
    saved = json.loads((inputs / "a/args.json").read_text())
    where = saved["execution"] if flag in saved["execution"] else saved
    where[flag] = value
    (inputs / "a/args.json").write_text(json.dumps(saved))
    code, _, err = stage(train_slm, "--from a/args.json --out b")
    assert code == 2 and f"--from: --{flag} is {value} there, wanted one of" in err
    assert len(err.strip().splitlines()) == 1 and not (inputs / "b").exists()


def test_a_schedule_may_end_with_every_token(stage, scored):
    trained(stage, f"{FILES} --k 0.5:1.0@0.5 --steps 4 --out a")
    counts = [record["tokens_selected"] for record in log(scored / "a")]
    assert counts == [32, 64, 128, 192]


def test_a_schedule_ranks_the_whole_set_anew(scored, monkeypatch):
    monkeypatch.chdir(scored)
    found = selector(f"{FILES} --score clean --k 0.8:0.4@0.5:1.0@0.75")
    n_targets = len(found.of_set) - 1
    everything = [np.arange(found.data.n_windows(16))]
    shares = [found.begin(None, step, everything)[1] / n_targets for step in range(4)]
    assert shares == pytest.approx([0.8, 0.8, 0.4, 1.0], abs=1 / n_targets)


@pytest.mark.parametrize("per", ["kept", "valid", "weights"])
def test_weights_of_one_are_plain_training(stage, inputs, vocabulary, monkeypatch, per):
    """Bit for bit, where no window is padded: 4 windows of 16 tokens, and the last target."""
    ones = slm.Weight(lambda t: torch.ones_like(t.loss), needs=("loss",), per=per)
    monkeypatch.setitem(slm.SCORES, "ones", ones)
    write_set(inputs / "full", vocabulary, 4 * 16 + 1)
    trained(stage, "--data full --k 1.0 --steps 3 --out plain")
    trained(stage, "--data full --score ones --steps 3 --out weighed")
    assert distance(inputs / "plain", inputs / "weighed") == 0


def selector(flags):
    args = train_slm.arguments(f"{SLM} {flags}".split())
    args.micro_batch_size = 4
    args.steps = 4
    return Selector(args, TokenSet("d"), Env(args))


DIVISORS = {  # what docs/methods.md says of each
    "mile": "weights",
    "sigmoid_excess": "weights",
    "dft": "valid",
    "profit": "kept",
    "excess": "kept",
}


@pytest.mark.parametrize("name", DIVISORS)
def test_the_gradient_is_divided_by_what_the_method_names(scored, monkeypatch, name):
    """A gradient of 1, divided as the trainer and then `finish` do it."""
    monkeypatch.chdir(scored)
    found = selector(f"{FILES} --score {name} --scope micro")
    windows = np.arange(4)
    valid = torch.from_numpy(found.data.valid(windows, 16))
    _, divisor = found.begin(None, 0, [windows])
    choice = found.choice(0, 0, windows, valid)
    torch.manual_seed(0)
    wanted = {field: torch.rand(4, 16) for field in found.selection.wants}
    kept = choice.keep(torch.rand(4, 16) * 5, **wanted)
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.grad = torch.ones(1, 1) / divisor
    found.finish(module)
    amounts = {"weights": kept.sum(), "valid": valid.sum(), "kept": (kept != 0).sum()}
    assert len({round(amount.item(), 3) for amount in amounts.values()}) > 1
    by_hand = amounts[DIVISORS[name]].item()
    assert 1 / module.weight.grad.item() == pytest.approx(by_hand, rel=1e-5)


def test_what_a_score_remembers_has_to_be_finite(scored, monkeypatch):
    monkeypatch.chdir(scored)
    memory = Memory(TokenSet("d"), 8)
    with pytest.raises(UserError, match="not finite or above 65504"):
        memory.put([0], torch.full((1, 8), 1e6))
    assert memory.values.abs().sum() == 0


def test_the_document_control_keeps_whole_documents_and_as_many_tokens(scored, monkeypatch):
    monkeypatch.chdir(scored)
    for name in ("document", "document_ref"):
        kept = selector(f"{FILES} --score {name} --k 0.4").of_set[1:]
        tokens = np.array(TokenSet("d").tokens)
        end = np.flatnonzero(tokens == ends_of(scored))
        numbers = np.searchsorted(end, np.arange(1, len(tokens)))
        losses = {n: np.fromfile(f"{n}_loss.bin", "<f2").astype(float)[1:] for n in ("ref", "base")}
        value = -losses["ref"] + (losses["base"] if name == "document" else 0)
        means = {n: value[numbers == n].mean() for n in np.unique(numbers)}
        shares = {n: kept[numbers == n].mean() for n in means}
        assert set(shares.values()) == {0.0, 1.0}
        in_set = [means[n] for n, share in shares.items() if share]
        out_of_set = [means[n] for n, share in shares.items() if not share]
        assert min(in_set) > max(out_of_set)
        longest = max((numbers == n).sum() for n in means)
        assert abs(kept.sum() - 0.4 * len(kept)) <= longest / 2


def ends_of(folder):
    from hf.tokenizer import Tokenizer

    return Tokenizer.load(folder / "d").eos_id


def test_the_whole_set_is_ranked_at_once(scored, monkeypatch):
    monkeypatch.chdir(scored)
    kept = selector(f"{FILES} --score clean --k 0.3").of_set[1:]
    base, ref = (np.fromfile(f"{n}_loss.bin", "<f2")[1:].astype("f4") for n in ("base", "ref"))
    best = np.argsort(-(base - ref), kind="stable")[: int(0.3 * len(kept) + 0.5)]
    assert set(np.flatnonzero(kept)) == set(best)


def test_an_array_of_ones_own_is_checked_like_stored_losses(stage, inputs, monkeypatch):
    best = slm.Score(lambda t: t.quality, needs=("quality",))
    monkeypatch.setitem(slm.SCORES, "best", best)
    data = TokenSet(inputs / "d")
    quality = np.random.RandomState(1).rand(data.count)
    arrays.save(inputs / "q.bin", quality, data)
    given = "--score best --k 0.5 --scope set --stored quality=q.bin --steps 2"
    trained(stage, f"{given} --out a")
    record = json.loads((inputs / "a/args.json").read_text())
    known = record["inputs"]["quality"]
    note = json.loads((inputs / "q.json").read_text())
    other = {"<f4": "<i4", "<f8": "<i8"}[note["dtype"]]
    (inputs / "q.json").write_text(json.dumps(note | {"dtype": other}))
    assert arrays.Array("quality", inputs / "q.bin", data, 16).hash != known
    (inputs / "q.json").write_text(json.dumps(note))
    kept = selector(given).of_set
    assert kept[1:].sum() == (data.count - 1 + 1) // 2
    assert quality[1:][kept[1:]].min() > quality[1:][~kept[1:]].max()

    content = bytearray((inputs / "q.bin").read_bytes())
    content[100] ^= 1
    (inputs / "q.bin").write_bytes(content)
    code, _, err = stage(train_slm, f"{SLM} {given} --out b")
    assert code == 2 and "its checksum differs" in err
    arrays.save(inputs / "q.bin", quality, TokenSet(inputs / "sparse"))
    note = json.loads((inputs / "q.json").read_text())
    (inputs / "q.json").write_text(json.dumps(note | {"data": "another"}))
    code, _, err = stage(train_slm, f"{SLM} {given} --out b")
    assert code == 2 and "--stored quality: q.bin has values of token set another" in err


def test_another_reference_is_an_array_too(stage, scored, monkeypatch):
    both = slm.Score(lambda t: t.loss - t.second, needs=("loss", "second"))
    monkeypatch.setitem(slm.SCORES, "both", both)
    trained(stage, "--score both --stored second=ref_loss.bin --steps 3 --out a")
    trained(stage, f"{FILES} --score excess --steps 3 --out b")
    assert distance(scored / "a", scored / "b") == 0


def test_another_reference_s_entropies_are_an_array_too(stage, scored, monkeypatch):
    sure = slm.Score(lambda t: t.loss - t.unsure, needs=("loss", "unsure"))
    monkeypatch.setitem(slm.SCORES, "sure", sure)
    known = slm.Score(lambda t: t.loss - t.ref_entropy, needs=("loss", "ref_entropy"))
    monkeypatch.setitem(slm.SCORES, "known", known)
    trained(stage, "--score sure --stored unsure=ref_entropy.bin --steps 3 --out a")
    trained(stage, f"{FILES} --score known --steps 3 --out b")
    assert distance(scored / "a", scored / "b") == 0
    trained(stage, "--score sure --stored unsure=base_loss.entropy.bin --steps 3 --out c")
    assert distance(scored / "a", scored / "c") > 0
    hashes = [arguments(scored / out)["inputs"]["unsure"] for out in "ac"]
    assert hashes[0].startswith("entropies of ") and hashes[0] != hashes[1]


def test_a_value_of_each_document_is_that_of_its_tokens(scored):
    data = TokenSet(scored / "d")
    ends = data.tokens == Tokenizer.load(scored / "d").eos_id
    document = np.cumsum(ends) - ends
    values = np.random.RandomState(0).rand(document[-1] + 1).astype(np.float32)
    arrays.save_by_document(scored / "q.bin", values, data)
    assert np.array_equal(np.fromfile(scored / "q.bin", "<f4"), values[document])
    with pytest.raises(UserError, match="a value for each document of .*blank records"):
        arrays.save_by_document(scored / "q.bin", values[1:], data)


def test_an_array_in_the_place_of_losses_is_told_what_it_is(stage, scored):
    data = TokenSet(scored / "d")
    arrays.save(scored / "q.bin", np.zeros(data.count, np.float32), data)
    code, _, err = stage(train_slm, f"{SLM} --ref-loss q.bin --out a")
    assert code == 2 and "--ref-loss q.bin: is an array of arrays.save" in err
    assert "--stored NAME=q.bin" in err


def test_another_reference_is_checked_like_the_first(stage, scored, monkeypatch):
    both = slm.Score(lambda t: t.loss - t.second, needs=("loss", "second"))
    monkeypatch.setitem(slm.SCORES, "both", both)
    assert stage(score, f"--model r {SCORING} --out masked.bin --document-mask")[0] == 0
    code, _, err = stage(train_slm, f"{SLM} --score both --stored second=masked.bin --out a")
    assert code == 2 and "has the document mask True" in err
    assert not (scored / "a").exists()


@pytest.mark.parametrize("name", ["quality.json", "quality", "ref_loss.bin", "ref_loss.q"])
def test_an_array_takes_no_other_file_s_place(name, scored):
    data = TokenSet(scored / "d")
    before = (scored / "ref_loss.json").read_bytes()
    with pytest.raises(UserError, match="wanted one that ends in .bin"):
        arrays.save(scored / name, np.zeros(data.count), data)
    assert (scored / "ref_loss.json").read_bytes() == before


def test_an_array_that_no_score_reads_is_refused(stage, inputs):
    code, _, err = stage(train_slm, f"{SLM} --score loss --stored q=nofile.bin --out a")
    assert code == 2 and "--stored: got q, which --score loss does not read" in err


@pytest.mark.parametrize("needs, remember", [(("loss",), True), (("loss", "memory"), False)])
def test_a_memory_is_written_and_read(needs, remember, stage, inputs, monkeypatch):
    function = slm.Score(lambda t: t.loss, needs, remember=mean_loss if remember else None)
    monkeypatch.setitem(slm.SCORES, "half", function)
    code, _, err = stage(train_slm, f"{SLM} --score half --out a")
    assert code == 2 and "t.memory; wanted both" in err


def test_pruned_of_one_micro_batch_is_pruned(stage, scored, monkeypatch):
    """How many are kept is known only from the losses: a first pass tells, as of several."""
    extremes = slm.Score(lambda t: (t.loss, -t.loss), ("loss",), choose=methods.keep_either)
    monkeypatch.setitem(slm.SCORES, "extremes", extremes)
    flags = "--score extremes --scope batch --k 0.2 --steps 2"
    trained(stage, f"{flags} --out exact")
    trained(stage, f"{flags} --out pruned --backward pruned")
    assert distance(scored / "exact", scored / "pruned") > 1e-5


# --------------------------------------------------------------------------------------------------
# a fork goes on with the code that it began with

MINE = '''
SHARPNESS = 2.0


def power(x):
    """A helper."""
    return x.abs() ** SHARPNESS  # sharper


def mine(t):
    return -power(t.loss - 5)
'''


def mine(folder, code):
    path = folder / "mine.py"
    path.write_text(code)
    # Two codes of one length, written within a second, would have one compiled file.
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine"] = module
    import linecache

    linecache.checkcache()
    spec.loader.exec_module(module)
    return slm.Score(module.mine, needs=("loss",))


def test_a_run_goes_on_with_the_code_of_its_score_alone(stage, inputs, monkeypatch):
    args = "--score mine --steps 2 --out a"
    monkeypatch.setitem(slm.SCORES, "mine", mine(inputs, MINE))
    trained(stage, args)
    other_words = MINE.replace("A helper.", "The same.").replace("  # sharper", "")
    monkeypatch.setitem(slm.SCORES, "mine", mine(inputs, other_words))
    trained(stage, args)  # finished: shows its summary
    for old, new in (("loss - 5", "loss - 4"), ("= 2.0", "= 3.0"), (".abs() **", ".square() **")):
        assert old in MINE
        monkeypatch.setitem(slm.SCORES, "mine", mine(inputs, MINE.replace(old, new)))
        code, _, err = stage(train_slm, f"{SLM} {args}")
        assert code == 2 and "a holds a run with other arguments (the code of its score)" in err
    sys.modules.pop("mine")


def test_the_choice_is_part_of_the_code_and_a_field_s_name_is_not(monkeypatch):
    """t.loss names no function `loss` that stands beside it."""
    before = {name: source_hash(score) for name, score in slm.SCORES.items()}

    def other(*args):
        return None

    monkeypatch.setattr(slm, "loss", other)
    monkeypatch.setattr(methods, "entropy", other)
    assert source_hash(slm.SCORES["excess"]) == before["excess"]
    assert source_hash(slm.SCORES["mile"]) == before["mile"]
    monkeypatch.setattr(slm, "keep_top", other)
    changed = {name for name, score in slm.SCORES.items() if source_hash(score) != before[name]}
    assert "excess" in changed and "document" not in changed
    monkeypatch.undo()
    excess = slm.SCORES["excess"]
    for other_one in (replace(excess, per="valid"), replace(excess, remember=other)):
        assert source_hash(other_one) != before["excess"]
    for name in ("n_keep", "weights_of"):
        with monkeypatch.context() as patch:
            patch.setattr(slm, name, other)
            assert source_hash(excess) != before["excess"]
    monkeypatch.setitem(slm.PREDICTION, "entropy", other)
    assert source_hash(slm.SCORES["mile"]) != before["mile"]
    assert source_hash(excess) == before["excess"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("torch.tensor([1.0, 0.5])", "torch.tensor([1.0, 0.4])"),
        ("np.array([1.0, 0.5])", "np.array([1.0, 0.4])"),
        ("Config(tau=1.0)", "Config(tau=9.0)"),
        ("clamp(min=0)", "clamp(min=1)"),
        ("PLACE = 0", "PLACE = 1"),
        ("max=3", "max=4"),
        ("sum(x)", "max(x)"),
        ("x * 5", "x * 6"),
        ("fill_(2.0)", "fill_(3.0)"),
        ("{1: 0.5}", "{1: 0.4}"),
        ('"b"]', '"c"]'),
    ],
)
def test_what_a_score_uses_of_other_files_is_part_of_its_code(old, new, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the same second and size

    def hashed(old="", new=""):
        for name, text in OWN_FILES.items():
            (tmp_path / f"{name}.py").write_text(text.replace(old, new))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        inspect.linecache.clearcache()
        return source_hash(slm.Score(importlib.import_module("own_score").own, needs=("loss",)))

    before = hashed()
    assert hashed() == before
    assert hashed("A comment.", "Another.") == before
    assert old in "".join(OWN_FILES.values())
    assert hashed(old, new) != before
    for name in OWN_FILES:
        sys.modules.pop(name, None)


OWN_FILES = {
    "own_settings": "PLACE = 0\n",
    "own_helpers": "# A comment.\ndef gate(x):\n    return x.clamp(min=0)\n",
    "own_score": """
import dataclasses
import functools

import numpy as np
import torch

import own_settings
from own_helpers import gate


@dataclasses.dataclass
class Config:
    tau: float


class Base:
    def scale(self, x):
        return x * 5


class Scale(Base):
    @staticmethod
    def first(x):
        return once(x)


@functools.lru_cache
def once(x):
    return sum(x)


C = Config(tau=1.0)
SCALE = Scale()
CUT = functools.partial(torch.clamp, max=3)
LINEAR = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(LINEAR.weight).data.fill_(2.0)
BY_KEY = {1: 0.5}
WORDS = np.array(["a", None, "b"], dtype=object)
TABLE = torch.tensor([1.0, 0.5])
ARRAY = np.array([1.0, 0.5])


def own(t):
    first = SCALE.first((BY_KEY[1], len(WORDS)))
    return LINEAR(CUT(gate(t.loss / C.tau))) * TABLE[own_settings.PLACE] * ARRAY[0] * first
""",
}


TAU = 0.1


class Callable:
    def __call__(self, t):
        return t.loss * TAU


def test_defaults_and_what_a_class_names_are_part_of_the_code(monkeypatch):
    def with_default(tau):
        def score(t, tau=tau):
            return t.loss > tau

        return slm.Score(score, needs=("loss",))

    assert source_hash(with_default(0.1)) == source_hash(with_default(0.1))
    assert source_hash(with_default(0.1)) != source_hash(with_default(0.9))
    instance = slm.Score(Callable(), needs=("loss",))
    before = source_hash(instance)
    monkeypatch.setitem(globals(), "TAU", 0.9)
    assert source_hash(instance) != before


def test_what_has_no_source_is_known_by_its_code_or_version():
    namespace = {}
    exec("def f(t): return t.loss * 2", namespace)
    first = source_hash(slm.Score(namespace["f"], needs=("loss",)))
    exec("def f(t): return t.loss * 3", namespace)
    assert source_hash(slm.Score(namespace["f"], needs=("loss",))) != first
    built_in = slm.Score(torch.neg, needs=("loss",))
    assert source_hash(built_in) == source_hash(slm.Score(torch.neg, needs=("loss",)))
    assert source_hash(built_in) != source_hash(slm.Score(torch.abs, needs=("loss",)))
    assert source_hash(None) is None


@pytest.fixture
def stopped(monkeypatch):
    """stopped(step) lets the next run end, as by Ctrl-C, when it has saved that step's state."""

    step_to_stop = [None]
    real = Run.save_state

    def arm(step):
        step_to_stop[0] = step

        def save_state(self, done, *rest):
            real(self, done, *rest)
            if done == step_to_stop[0]:
                self.states.wait()
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "save_state", save_state)

    return arm


def test_another_commit_is_named_and_not_refused(stage, inputs, monkeypatch, stopped):
    args = f"{SLM} --score loss --steps 4 --save-every 2 --out a"
    made = {"commit": "abc", "changed": []}
    monkeypatch.setattr(provenance, "of_the_kit", lambda: made)
    stopped(2)
    assert stage(train_slm, args)[0] == 130
    stopped(None)
    made = {"commit": "def", "changed": ["slm.py"]}
    code, out, err = stage(train_slm, args)
    assert code == 0, err
    said = "begun by another kit or machine (commit abc -> def; files changed since the commit: "
    assert f"{said}none -> slm.py)" in out.replace("commit none", "commit: none")
    assert json.loads((inputs / "a/args.json").read_text())["made"]["commit"] == "abc"
    assert len(log(inputs / "a")) == 4


# --------------------------------------------------------------------------------------------------
# memory


def surprise(t):
    """Keep what is above its own mean so far."""
    return t.loss - t.memory


def mean_loss(t):
    """Exponential; the first time the loss itself."""
    return torch.where(t.memory == 0, t.loss, 0.9 * t.memory + 0.1 * t.loss)


REMEMBERS = slm.Score(surprise, needs=("loss", "memory"), remember=mean_loss)


def test_memory_is_what_the_score_wrote(stage, inputs, monkeypatch):
    """One window a step, thrice through a set of two: by hand, from the losses of the log."""
    seen = []

    def watched(t):
        seen.append((t.loss.clone(), t.memory.clone()))
        return t.loss - t.memory

    score = slm.Score(watched, needs=("loss", "memory"), remember=mean_loss)
    monkeypatch.setitem(slm.SCORES, "watched", score)
    flags = "--batch-size 1 --epochs 3 --seq-len 750 --score watched --out a"
    trained(stage, flags)
    assert len(seen) == 6  # once a step
    order = [w for epoch in range(3) for w in np.random.RandomState([0, epoch]).permutation(2)]
    kept = {0: torch.zeros(1, 750), 1: torch.zeros(1, 750)}
    for window, (loss, memory) in zip(order, seen):
        known = kept[window].half().float()
        n = 750 if window == 0 else 749  # the last one is padded
        assert torch.equal(memory[:, :n], known[:, :n])
        kept[window] = torch.where(known == 0, loss, 0.9 * known + 0.1 * loss)


def test_the_numbers_of_remember_and_of_the_choice_are_set_too(stage, inputs, monkeypatch):
    def mean(t, decay=0.9):
        return torch.where(t.memory == 0, t.loss, decay * t.memory + (1 - decay) * t.loss)

    def best(values, valid, k, together=None, least=0):
        return slm.keep_top(values, valid, max(k, least), together)

    score = slm.Score(surprise, needs=("loss", "memory"), remember=mean, choose=best)
    monkeypatch.setitem(slm.SCORES, "settable", score)
    memories = []
    finish = Run.finish
    monkeypatch.setattr(
        Run, "finish", lambda run, student: memories.append(run.extra) or finish(run, student)
    )
    for name, flags in (("a", ""), ("b", "--set decay=0.5"), ("c", "--set least=0.9")):
        trained(stage, f"--score settable --epochs 2 --out {name} {flags}")
    first, second, _ = (extra["memory"] for extra in memories)
    assert (first - second).abs().max() > 0.01
    counts = [sum(r["tokens_selected"] for r in log(inputs / name)) for name in "abc"]
    assert counts[0] == counts[1] < counts[2]


def test_memory_belongs_to_the_checkpoint(stage, inputs, monkeypatch, stopped):
    monkeypatch.setitem(slm.SCORES, "remembers", REMEMBERS)
    args = "--score remembers --k 0.5 --steps 60 --save-every 20 --lr 1e-2"
    trained(stage, f"{args} --out whole")
    stopped(40)
    assert stage(train_slm, f"{SLM} {args} --out cut")[0] == 130
    stopped(None)
    trained(stage, f"{args} --out cut")
    assert distance(inputs / "whole", inputs / "cut") == 0
    states = [torch.load(inputs / name / "train_state.pt") for name in ("whole", "cut")]
    assert torch.equal(states[0]["memory"], states[1]["memory"])
    assert states[0]["memory"].dtype == torch.float16 and (states[0]["memory"] != 0).sum() > 1000


FORK = """
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

sys.path.insert(0, {root!r})
from slm_kit import slm, train_slm
from slm_kit.common.errors import cli


def surprise(t):
    return t.loss - t.memory


def mean_loss(t):
    return torch.where(t.memory == 0, t.loss, 0.9 * t.memory + 0.1 * t.loss)


slm.SCORES["remembers"] = slm.Score(surprise, needs=("loss", "memory"), remember=mean_loss)

if __name__ == "__main__":
    cli(train_slm.main)
"""


@pytest.mark.slow
def test_memory_on_ranks_and_from_one_number_of_them_to_another(inputs):
    """A state's folder of two ranks, gone on with by one: as one rank all the way."""
    from conftest import ROOT

    (inputs / "mine.py").write_text(FORK.format(root=str(ROOT / "package")))
    script = inputs / "mine.py"
    args = f"{SLM} --micro-batch-size 1 --score remembers --scope sequence --k 0.5 --save-every 10"
    finish(launch([script, *f"{args} --steps 40 --out one".split()], inputs))
    finish(launch([script, *f"{args} --steps 40 --out two".split()], inputs, ranks=2))
    assert distance(inputs / "one", inputs / "two") < 1e-5
    assert [r["tokens_selected"] for r in log(inputs / "one")] == [
        r["tokens_selected"] for r in log(inputs / "two")
    ]
    one = torch.load(inputs / "one/train_state.pt")["memory"]
    from training import checkpoints

    two = torch.zeros_like(one)
    checkpoints.load(inputs / "two/state-000040", {"memory": two})
    assert (one.float() - two.float()).abs().max() < 0.01
