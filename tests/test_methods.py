"""Each method against a brute-force form of its paper's formula in fp64, through every head."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

import methods
import slm
from common.errors import UserError
from model import Config, Transformer, initialise
from training import heads
from training.loss import FastLoss

K = 0.5
T = 9


@functools.cache
def world():
    """A tiny fp64 model, a batch, what is stored of its targets, and the model's predictions."""
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    config = Config(**shape, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    model = initialise(Transformer(config), 0).double()
    with torch.no_grad():  # predictions that differ: some sure, some not
        model.head_weight.mul_(12)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(40, (4, T), generator=generator) for _ in range(2))
    best = logits_of(model, x).argmax(-1)
    y[:, ::3] = best[:, ::3]  # and some targets are what the model expects
    stored = {}
    for name in slm.STORED:
        stored[name] = torch.rand(4, T, generator=generator, dtype=torch.float64) * 5
    stored["document"] = torch.arange(4 * T).view(4, T) // 7
    stored["noise"] = torch.rand(4, T, generator=generator, dtype=torch.float64)
    valid = torch.rand(4, T, generator=generator) < 0.8
    valid[2] = False  # an empty window
    with torch.no_grad():
        p = logits_of(model, x).softmax(-1).numpy()
    return model, x, y, stored, valid, p


def logits_of(model, x):
    """In fp64, (B, T, V)."""
    return torch.nn.functional.linear(model(x), model.head_weight)


def sums(p):
    """(entropy, collision, entropy of the 20 likeliest) of one prediction, one token at a time."""
    entropy = -sum(q * math.log(q) for q in p if q > 0)
    collision = sum(q * q for q in p)
    likeliest = sorted(p)[-20:]
    whole = sum(likeliest)
    first = -sum(q / whole * math.log(q / whole) for q in likeliest if q > 0)
    return entropy, collision, first


# The formula of each method, of one token: p, l, H, c, H of 20, r, r's entropy, b, s.
TOP = {
    "excess": lambda v: v["l"] - v["r"],
    "loss": lambda v: v["l"],
    "random": lambda v: v["noise"],
    "ref_loss": lambda v: -v["r"],
    "ref_entropy": lambda v: -v["re"],
    "rel": lambda v: v["b"] - v["l"],
    "clean": lambda v: v["b"] - v["r"],
    "entropy": lambda v: v["H"],
}
SETS = {
    "profit": lambda v: v["p"] > 0.1,
    "memft": lambda v: v["l"] > math.log(2),
    "ent": lambda v: v["norm"] <= 1.3,
}
WEIGHTS = {
    "mile": lambda v: 1 + v["H"],
    "dft": lambda v: v["p"],
    "deft": lambda v: v["p"] ** v["c"],
    "eaft": lambda v: v["H20"] / 3,
    "sigmoid_excess": lambda v: 1 / (1 + math.exp(v["r"] - v["l"])),
    "longce": lambda v: min(v["p"] / math.exp(-v["s"]), 5),
}


def known_of_each():
    """{(row, column): the letters of that target}, of the valid ones."""
    _, _, y, stored, valid, p = world()
    found = {}
    for at in zip(*np.nonzero(valid.numpy())):
        of_target = p[at][y[at]]
        entropy, collision, first = sums(p[at])
        onehot = np.zeros(40)
        onehot[y[at]] = 1
        found[at] = {
            "p": of_target,
            "l": -math.log(of_target),
            "H": entropy,
            "c": collision,
            "H20": first,
            "norm": np.linalg.norm(p[at] - onehot),
            "r": stored["ref_loss"][at].item(),
            "re": stored["ref_entropy"][at].item(),
            "b": stored["base_loss"][at].item(),
            "s": stored["short_loss"][at].item(),
            "noise": stored["noise"][at].item(),
            "document": stored["document"][at].item(),
        }
    return found


def top(of_each, score):
    n = max(1, math.floor(K * len(of_each) + 0.5))
    return sorted(of_each, key=lambda at: (-score(of_each[at]), at))[:n]


def whole(of_each, score, piece_of):
    """Pieces by mean score, best first, until the number of tokens is nearest to the share."""
    pieces = {}
    for at, v in of_each.items():
        pieces.setdefault(piece_of(at, v), []).append(at)
    means = {n: np.mean([score(of_each[at]) for at in ats]) for n, ats in pieces.items()}
    best_first = sorted(pieces, key=lambda n: (-means[n], n))
    budget = max(1, math.floor(K * len(of_each) + 0.5))
    options = []
    for m in range(1, len(best_first) + 1):
        kept = [at for n in best_first[:m] for at in pieces[n]]
        options.append((abs(len(kept) - budget), m, kept))
    return min(options)[2]


def brute(name):
    """({target: weight}, the divisor)."""
    of_each = known_of_each()
    if name in TOP:
        kept = top(of_each, TOP[name])
    elif name in SETS:
        kept = [at for at, v in of_each.items() if SETS[name](v)]
    elif name == "ref_and":
        kept = set(top(of_each, TOP["ref_loss"])) & set(top(of_each, TOP["ref_entropy"]))
    elif name == "ref_or":
        kept = set(top(of_each, TOP["ref_loss"])) | set(top(of_each, TOP["ref_entropy"]))
    elif name == "document":
        kept = whole(of_each, TOP["clean"], lambda at, v: v["document"])
    elif name == "document_ref":
        kept = whole(of_each, TOP["ref_loss"], lambda at, v: v["document"])
    elif name == "rho":
        kept = whole(of_each, TOP["excess"], lambda at, v: at[0])
    elif name == "soft_excess":
        gaps = {at: abs(v["l"] - v["r"]) for at, v in of_each.items()}
        mean = sum(gaps.values()) / len(gaps)
        return {at: 0.5 + 0.5 * gap / mean for at, gap in gaps.items()}, len(of_each)
    else:
        weights = {at: WEIGHTS[name](v) for at, v in of_each.items()}
        weighted_mean = name in ("mile", "sigmoid_excess")
        return weights, sum(weights.values()) if weighted_mean else len(of_each)
    return dict.fromkeys(kept, 1.0), len(kept)


def selection_of(name):
    scope = "micro" if slm.SCORES[name].scope == "set" else slm.SCORES[name].scope
    k = 1.0 if isinstance(slm.SCORES[name], slm.Weight) else K
    return slm.Selection(k, name, scope)


def chosen(selection, stored, valid):
    """The function that a head calls."""

    def select(losses, **also):
        return selection.mask(slm.Tokens(loss=losses, **also, **stored), valid)

    return select


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", 5 * 40 * 4)  # 5 rows at a time


@pytest.mark.parametrize("name", sorted(slm.SCORES))
def test_choice_loss_and_gradient_are_those_of_the_formula(name):
    model, x, y, stored, valid, _ = world()
    weights, divisor = brute(name)
    plain = copy.deepcopy(model)
    losses = torch.nn.functional.cross_entropy(
        logits_of(plain, x).flatten(0, 1), y.flatten(), reduction="none"
    ).view(4, T)
    wanted = sum(weight * losses[at] for at, weight in weights.items()) / divisor
    wanted.backward()
    assert 0 < len(weights)

    selection = selection_of(name)
    if isinstance(slm.SCORES[name], slm.Weight) and name not in ("dft", "mile"):
        assert len({round(w, 6) for w in weights.values()}) > 1 or len(weights) < len(
            known_of_each()
        )
    for head in heads.HEADS:
        module = FastLoss(copy.deepcopy(model), head)
        total, _, kept = module(x, y, chosen(selection, stored, valid), selection.wants)
        per = {"kept": (kept != 0).sum(), "weights": kept.sum(), "valid": valid.sum()}
        true = per[selection.method.per]
        assert abs(true - divisor) < 1e-9 * divisor
        (total / true).backward()
        found = {at: kept[at].item() for at in zip(*np.nonzero(kept.numpy()))}
        assert found.keys() == weights.keys()
        assert all(abs(found[at] - weights[at]) < 1e-9 for at in weights)
        assert abs(total / true - wanted) < 1e-9
        for (parameter, a), b in zip(module.lm.named_parameters(), plain.parameters()):
            assert (a.grad - b.grad).abs().max() < 1e-9 * b.grad.abs().max(), (head, parameter)


@pytest.mark.parametrize("name", ["dft", "deft"])
def test_weights_are_the_gradient_of_the_papers_own_loss(name):
    """-p, and -(p^c - 1) / c with c held: their gradients by autograd, against our weights."""
    model, x, y, stored, valid, _ = world()
    plain = copy.deepcopy(model)
    log_p = logits_of(plain, x).log_softmax(-1)
    p = log_p.gather(2, y[..., None])[..., 0].exp()
    losses = -p
    if name == "deft":
        c = log_p.exp().square().sum(-1).detach()
        losses = -(p**c - 1) / c
    (losses * valid).sum().backward()
    module = FastLoss(copy.deepcopy(model), "lean")
    selection = selection_of(name)
    module(x, y, chosen(selection, stored, valid), selection.wants)[0].backward()
    for a, b in zip(module.lm.parameters(), plain.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-10 * b.grad.abs().max()


def test_rel_with_the_reference_as_base_is_minus_the_excess():
    _, _, _, stored, _, _ = world()
    loss = torch.rand(4, T, dtype=torch.float64)
    tokens = slm.Tokens(loss=loss, base_loss=stored["ref_loss"], ref_loss=stored["ref_loss"])
    assert torch.equal(methods.rel(tokens), -slm.excess(tokens))


@pytest.mark.parametrize("head", heads.HEADS)
def test_weights_of_one_are_plain_training_bit_for_bit(head, monkeypatch):
    """In fp32, where no target is masked: the two ways through a head make the same sums."""
    ones = slm.Weight(lambda t: torch.ones_like(t.loss), needs=("loss",), per="weights")
    monkeypatch.setitem(slm.SCORES, "ones", ones)
    model, x, y, stored, valid, _ = world()
    grads = []
    for selection in (slm.Selection(1.0), slm.Selection(1.0, "ones")):
        module = FastLoss(copy.deepcopy(model).float(), head)
        plain = selection.method is None
        select = chosen(selection, stored, torch.ones_like(valid))
        total, losses, _ = module(x, y, select, count=x.numel() if plain else None)
        total.backward()
        grads.append([total, losses, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_dropped_row_costs_no_product(monkeypatch):
    """kept and lean make gradients of the rows with a weight alone."""
    half = slm.Weight(lambda t: (t.noise > 0.5) * 2.0, needs=("noise",))
    monkeypatch.setitem(slm.SCORES, "half", half)
    model, x, y, stored, valid, _ = world()
    n_rows = int(((stored["noise"] > 0.5) & valid).sum())
    rows = []
    real = heads.product
    for head in ("kept", "lean"):
        rows.clear()

        def counted(a, b):
            if a.shape[1] == 40:  # of d_logits (rows, V) with the weight
                rows.append(len(a))
            return real(a, b)

        monkeypatch.setattr(heads, "product", counted)
        selection = slm.Selection(1.0, "half")
        FastLoss(copy.deepcopy(model), head)(x, y, chosen(selection, stored, valid))
        assert sum(rows) == n_rows


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, -0.1, 2.0], "1 of 3 weights are below 0 or not finite"),
        ([1.0, math.nan, math.inf], "2 of 3 weights"),
    ],
)
def test_wrong_weights_are_refused_where_they_are_valid(values, message):
    values, valid = torch.tensor([values]), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(UserError, match=message):
        slm.weights_of(values, valid)
    valid[0, 1:] = False
    assert slm.weights_of(values, valid).tolist() == [[1.0, 0.0, 0.0]]


def test_means_are_taken_over_what_is_ranked_together():
    """soft_excess: with two windows ranked together, as each pair by itself."""
    _, _, _, stored, valid, _ = world()
    loss = torch.rand(4, T, dtype=torch.float64)
    tokens = slm.Tokens(loss=loss, ref_loss=stored["ref_loss"])
    pairs = slm.Selection(1.0, "soft_excess", "micro", rank_windows=2).mask(tokens, valid)
    alone = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = slm.Tokens(loss=loss[rows], ref_loss=stored["ref_loss"][rows])
        alone.append(slm.Selection(1.0, "soft_excess").mask(part, valid[rows]))
    assert torch.allclose(pairs, torch.cat(alone), rtol=1e-12)
    mean = pairs[:2][valid[:2]].mean()
    assert abs(mean - 1) < 1e-12
