"""The method against brute force: scores, selection, counts, loss and gradients."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import methods  # noqa: F401  ref_and, ref_or
import slm
import train_slm
from common.errors import UserError
from model import Config, Transformer, initialise


def brute_force(scores, valid, k, scope):
    """The rules in plain Python: one at a time, best first, lowest position first among equals."""
    kept = np.zeros(valid.shape, bool)
    groups = [[(r, c) for c in range(valid.shape[1])] for r in range(valid.shape[0])]
    if scope != "sequence":
        groups = [sum(groups, [])]
    for group in groups:
        places = [(r, c) for r, c in group if valid[r, c]]
        n = max(1, math.floor(k * len(places) + 0.5)) if places else 0
        for r, c in sorted(places, key=lambda p: (-scores[p], group.index(p)))[:n]:
            kept[r, c] = True
    return kept


@pytest.mark.parametrize("scope", ["micro", "sequence", "batch"])
@pytest.mark.parametrize("seed", range(12))
def test_selection_is_brute_force(scope, seed):
    rng = np.random.RandomState(seed)
    B, T = rng.randint(1, 5), rng.randint(1, 20)
    scores = rng.randint(-3, 4, (B, T)).astype(np.float32)  # few values: many ties
    if seed % 3 == 0:
        scores = rng.randn(B, T).astype(np.float32)
    valid = rng.rand(B, T) < rng.choice([0.0, 0.1, 0.6, 1.0])
    for k in (0.01, 0.25, 0.5, 0.6, 0.999, 1.0):
        expected = brute_force(scores, valid, k, scope)
        together = 1 if scope == "sequence" else None
        kept = slm.keep_top(torch.from_numpy(scores), torch.from_numpy(valid), k, together).numpy()
        assert (kept == expected).all(), (k, scores, valid)
        assert slm.Selection(k, scope=scope).count(valid) == expected.sum()


def test_a_tie_keeps_the_lowest_position_and_not_all():
    kept = slm.keep_top(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), 0.5)
    assert kept.tolist() == [[True] * 4, [False] * 4]
    assert (
        slm.keep_top(
            torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), 0.5, together=1
        ).tolist()
        == [[True, True, False, False]] * 2
    )


@pytest.mark.parametrize("together", [1, 2, 3, 6])
def test_windows_that_are_ranked_together_are_a_batch_of_their_own(together):
    """Six windows in groups: mask and count are those of each group given by itself."""
    rng = np.random.RandomState(together)
    scores, other = (torch.from_numpy(rng.randn(6, 11).astype(np.float32)) for _ in range(2))
    valid = torch.from_numpy(rng.rand(6, 11) < 0.7)
    documents = torch.arange(66).view(6, 11) // 5
    for score in ("excess", "ref_and", "document_ref", *(["rho"] if together > 1 else [])):
        tokens = slm.Tokens(loss=scores, ref_loss=other, ref_entropy=scores, document=documents)
        whole = slm.Selection(0.6, score, "micro", rank_windows=together)
        parts = []
        for rows in torch.arange(6).split(together):
            part = {name: value[rows] for name, value in vars(tokens).items()}
            parts.append(slm.Selection(0.6, score).mask(slm.Tokens(**part), valid[rows]))
        mask = whole.mask(tokens, valid)
        assert torch.equal(mask, torch.cat(parts))
        if score == "excess":
            assert whole.count(valid.numpy()) == mask.sum()


def test_windows_that_make_no_whole_groups_cannot_be_counted():
    valid = np.ones((3, 4), bool)
    with pytest.raises(UserError, match="rank_windows: got 2, wanted a divisor of the 3 windows"):
        slm.Selection(0.6, rank_windows=2).count(valid)
    assert slm.Selection(1.0, rank_windows=2).count(valid) == 12


def test_rows_that_make_no_whole_groups_are_refused():
    with pytest.raises(RuntimeError, match="invalid for input"):
        slm.keep_top(torch.zeros(5, 4), torch.ones(5, 4, dtype=torch.bool), 0.5, together=2)


def test_a_choice_that_keeps_masked_targets_keeps_the_others_alone(monkeypatch):
    greedy = slm.Score(slm.loss, ("loss",), choose=lambda values, valid, k, _: values > 0)
    monkeypatch.setitem(slm.SCORES, "greedy", greedy)
    valid = torch.tensor([[True, False, True]])
    tokens = slm.Tokens(loss=torch.tensor([[1.0, 2.0, -1.0]]))
    kept = slm.Selection(0.5, "greedy").mask(tokens, valid)
    assert kept.tolist() == [[True, False, False]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_where_it_is_valid(bad):
    scores, valid = torch.tensor([[0.0, bad, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 of 3 scores"):
        slm.keep_top(scores, valid, 0.5)
    valid[0, 1] = False  # a masked target may be anything
    assert slm.keep_top(scores, valid, 0.5).tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    "n, k, expected",
    [
        (10, 0.6, 6),
        (10, 0.65, 7),
        (10, 0.649, 6),
        (5, 0.5, 3),
        (1, 0.01, 1),
        (0, 0.6, 0),
        (3, 1.0, 3),
        (1000, 0.0001, 1),
        (7, 0.5, 4),
    ],
)
def test_number_kept(n, k, expected):
    assert slm.n_keep(n, k) == expected == slm.n_keep(torch.tensor(n), k).item()


@pytest.mark.parametrize("k", ["0", "60", "nan", "-0.1", "1.0001", "inf", "half"])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(UserError, match=f"--k: got {k}, wanted a share"):
        train_slm.arguments(["--k", k])


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 60}, {"k": math.nan}, {"scope": "window"}])
def test_a_selection_that_means_nothing_is_refused(wrong):
    """A loop of one's own has no command line that would say so."""
    with pytest.raises(UserError, match=f"{list(wrong)[0]}: got .*, wanted"):
        slm.Selection(**{"k": 0.6, **wrong})


def test_a_score_says_what_it_needs():
    silent = slm.Score(lambda t: t.loss - t.ref_entropy, needs=("loss",))
    with pytest.raises(UserError, match=r"reads t.ref_entropy, which was not loaded.*needs="):
        silent.function(slm.Tokens(loss=torch.zeros(1, 2)))
    with pytest.raises(UserError, match="reads t.los, wanted some of loss.*--stored NAME=FILE"):
        _ = slm.Tokens().los
    assert copy.copy(slm.Tokens(loss=1)).loss == 1
    static = {name for name, score in slm.SCORES.items() if score.static}
    stored_alone = {"ref_loss", "ref_entropy", "ref_and", "ref_or"}
    assert static == {"random", "clean", "document", "document_ref"} | stored_alone
    assert slm.Selection(0.6, "ref_and").needs == ("ref_loss", "ref_entropy")
    assert slm.Selection(1.0, "excess").needs == ()
    assert slm.Selection(1.0, "dft").needs == ("loss",)  # a weight has no k
    with pytest.raises(UserError, match="--score: got exces, wanted one of excess, loss"):
        slm.Selection(0.6, "exces").mask(slm.Tokens(), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        (slm.Score, {"needs": "loss"}, "needs: got 'loss', wanted a tuple"),
        (slm.Score, {"per": "vaild"}, "per: got 'vaild', wanted one of kept, valid"),
        (slm.Score, {"per": "weights"}, "per: got 'weights', wanted one of kept, valid"),
        (slm.Weight, {"per": "all"}, "per: got 'all', wanted one of kept, valid, weights"),
        (slm.Weight, {"choose": slm.keep_top}, "choose: got one in a Weight"),
    ],
)
def test_a_score_that_would_be_read_in_another_way_is_refused(kind, wrong, message):
    with pytest.raises(UserError, match=message):
        kind(slm.loss, **wrong)


def test_each_score_keeps_what_the_paper_says():
    tokens = slm.Tokens(
        loss=torch.tensor([[5.0, 1.0, 3.0, 2.0]]),
        ref_loss=torch.tensor([[4.9, 0.1, 1.0, 2.5]]),
        ref_entropy=torch.tensor([[0.1, 0.9, 0.2, 0.8]]),
        noise=torch.tensor([[0.1, 0.2, 0.9, 0.8]]),
    )
    valid = torch.ones(1, 4, dtype=torch.bool)

    def kept(score):
        return slm.Selection(0.5, score).mask(tokens, valid)[0].nonzero().flatten().tolist()

    assert kept("excess") == [1, 2]  # 0.1, 0.9, 2.0, -0.5: signed, so the last is lowest
    assert kept("loss") == [0, 2]
    assert kept("random") == [2, 3]
    assert kept("ref_loss") == [1, 2]  # the LOWEST reference losses
    assert kept("ref_entropy") == [0, 2]  # the LOWEST entropies
    assert kept("ref_and") == [2]
    assert kept("ref_or") == [0, 1, 2]


def tiny(dtype):
    model = initialise(
        Transformer(
            Config(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        ),
        0,
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(50, (3, 9), generator=generator) for _ in range(2))
    ref = torch.rand(3, 9, generator=generator, dtype=dtype) * 5
    valid = torch.rand(3, 9, generator=generator) < 0.8
    return model, x, y, ref, valid


@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_loss_and_gradients_equal_masked_full_logits_in_fp64(scope):
    model, x, y, ref, valid = tiny(torch.float64)
    other = copy.deepcopy(model)
    total, losses, kept = slm.WithLoss(model)(
        x,
        y,
        lambda l: slm.Selection(0.6, scope=scope).mask(slm.Tokens(loss=l, ref_loss=ref), valid),
    )
    (total / slm.Selection(0.6, scope=scope).count(valid.numpy())).backward()

    # fp64 all the way, the mask as weights of a plain cross-entropy over all logits
    per_token = F.cross_entropy(
        F.linear(other(x), other.head_weight).flatten(0, 1), y.flatten(), reduction="none"
    )
    mask = brute_force(
        (per_token.view(3, 9).detach() - ref).float().numpy(), valid.numpy(), 0.6, scope
    )
    expected = (per_token * torch.from_numpy(mask).flatten()).sum() / mask.sum()
    expected.backward()
    assert (kept.numpy() == mask).all()
    assert abs(total.item() / mask.sum() - expected.item()) < 1e-12
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-13), name


def test_unselected_tokens_are_still_read():
    """An input whose own target is not kept still changes the loss of kept targets after it."""
    model, x, y, ref, _ = tiny(torch.float64)
    keep_last = torch.zeros(3, 9, dtype=torch.bool)
    keep_last[:, -1] = True
    before = slm.WithLoss(model)(x, y, lambda l: keep_last)[0]
    x[:, 2] = (x[:, 2] + 1) % 50
    assert slm.WithLoss(model)(x, y, lambda l: keep_last)[0] != before


def test_only_kept_targets_touch_the_gradient():
    model, x, y, ref, valid = tiny(torch.float64)
    kept = torch.zeros(3, 9, dtype=torch.bool)
    kept[1, 3] = True
    grads = []
    for change in (0, 1):
        model.zero_grad()
        target = torch.where(kept, y, (y + change) % 50)
        slm.WithLoss(model)(x, target, lambda l: kept)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_no_valid_target_gives_zero_loss_and_zero_gradient():
    model, x, y, ref, valid = tiny(torch.float32)
    nothing = torch.zeros_like(valid)
    total, _, kept = slm.WithLoss(model)(
        x, y, lambda l: slm.Selection(0.6).mask(slm.Tokens(loss=l, ref_loss=ref), nothing)
    )
    total.backward()
    assert (
        total == 0 and not kept.any() and all(p.grad.abs().max() == 0 for p in model.parameters())
    )


def test_token_losses_and_entropy_are_those_of_full_logits():
    model, x, y, _, _ = tiny(torch.float32)
    with torch.no_grad():
        logits = model.logits(x).double()
    losses, entropy = slm.WithLoss(model)(x, y, wants=("entropy",))
    p = logits.softmax(-1)
    assert torch.allclose(losses.double(), -p.log().gather(2, y[..., None])[..., 0], atol=1e-5)
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_logits_are_summed_in_fp32_under_autocast():
    """Plain form and scoring, against fp64 products of the same bf16 factors."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (40, 300))
    targets = torch.randint(300, (40,), generator=generator)
    factors = [t.bfloat16().double() for t in (hidden, weight)]
    exact = F.cross_entropy(F.linear(*factors), targets, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        scored = slm.token_losses(hidden.bfloat16(), weight, targets)
        _, losses, _ = slm.head_full(hidden.bfloat16(), weight, targets, lambda l: l > 0)
        rounded = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    assert scored.dtype == losses.dtype == torch.float32
    assert torch.equal(scored, losses)
    assert (scored - exact).abs().max() < 1e-4 < 0.01 < (rounded - exact).abs().max()


def test_scores_that_differ_beyond_fp32_are_told_apart():
    whole = torch.tensor([[2**24, 2**24 + 1, 5, 6]])
    fine = torch.tensor([[1, 1 + 1e-9, 0, 0]], dtype=torch.float64)
    for scores in (whole, fine):
        kept = slm.keep_top(scores, torch.ones(1, 4, dtype=torch.bool), 0.25)
        assert kept.tolist() == [[False, True, False, False]]
