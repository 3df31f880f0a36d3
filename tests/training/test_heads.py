"""Cheap forms against plain ones: heads against full logits, pruned backward against hooks."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import slm
from common import compiling
from common.errors import UserError
from model import Config, Transformer, initialise
from training import heads
from training.loss import BACKWARD, FastLoss

CASES = {
    "micro": (0.6, "micro"),
    "sequence": (0.6, "sequence"),
    "batch": (0.3, "batch"),
    "k=1": (1.0, "micro"),
    "one": (0.001, "micro"),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(
        heads.CHUNK_BYTES, "cpu", 4 * 50 * 4
    )  # 4 rows of 50 logits: every head works in several chunks


def tiny(dtype=torch.float32, seed=1, rows=3, **changes):
    config = Config(
        **{
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(50, (rows, 9), generator=generator) for _ in range(2))
    ref = torch.rand(rows, 9, generator=generator, dtype=dtype) * 5
    valid = torch.rand(rows, 9, generator=generator) < 0.8
    torch.manual_seed(0)  # of biases, which `initialise` leaves as PyTorch makes them
    return initialise(Transformer(config), 0).to(dtype), x, y, ref, valid


def selection(ref, valid, k=0.6, scope="micro"):
    return lambda losses: slm.Selection(k, scope=scope).mask(
        slm.Tokens(loss=losses.view_as(ref), ref_loss=ref), valid
    )


def results(module, x, y, select, count):
    """One step's total, losses, choice and gradients, by name; the divisor is not 1."""
    module.zero_grad()
    total, losses, kept = module(x, y, select, count=count)
    (total / 7).backward()
    assert not losses.requires_grad
    return {
        "total": total.detach(),
        "losses": losses,
        "kept": kept,
        **{name: p.grad.clone() for name, p in module.lm.named_parameters()},
    }


def distance(a, b):
    """The largest difference of any tensor, relative to its largest entry."""
    assert a.keys() == b.keys()
    pairs = [(a[k].double(), b[k].double()) for k in a]
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in pairs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["kept", "lean"])
def test_heads_give_the_loss_and_gradients_of_full_logits(head, case, dtype, tolerance):
    """The head alone: losses, choice, gradients; targets with masks, scores with ties."""
    (k, scope), (_, _, y, ref, valid) = CASES[case], tiny(dtype)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=dtype) for n in (27, 50))
    hidden[5] = hidden[4]  # equal losses and reference losses: a tie
    y, ref = y.clone(), ref.clone()
    y.view(-1)[5], ref.view(-1)[5] = y.view(-1)[4], ref.view(-1)[4]
    count = slm.Selection(k, scope=scope).count(valid.numpy())
    outcome = []
    for f, n in ((slm.head_full, ()), (heads.HEADS[head], (count,)), (heads.HEADS[head], ())):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, losses, kept = f(
            h, w, y.flatten(), lambda l: selection(ref, valid, k, scope)(l).flatten(), *n
        )
        (total / 7).backward()
        outcome.append(
            {
                "total": total.detach(),
                "losses": losses,
                "kept": kept,
                "hidden": h.grad,
                "weight": w.grad,
            }
        )
    assert outcome[0]["kept"].sum() == count
    for other in outcome[1:]:
        assert torch.equal(outcome[0]["kept"], other["kept"])
        assert distance(other, outcome[0]) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "qk_norm": True, "head_dim": 12},
    ],
)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", ["kept", "lean"])
def test_a_whole_model_learns_the_same_with_any_exact_form(head, checkpointing, changes):
    """The last block's backward on kept rows included; fp64 shows that it is exact."""
    for k, scope in CASES.values():
        model, x, y, ref, valid = tiny(torch.float64, **changes)
        plain, quick = slm.WithLoss(copy.deepcopy(model)), FastLoss(model, head)
        plain.lm.checkpointing = quick.lm.checkpointing = checkpointing
        count, select = (
            slm.Selection(k, scope=scope).count(valid.numpy()),
            selection(ref, valid, k, scope),
        )
        wanted = results(_WithoutCount(plain), x, y, select, count)
        assert distance(results(quick, x, y, select, count), wanted) < 1e-12
        assert distance(results(quick, x, y, select, None), wanted) < 1e-12


class _WithoutCount(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.lm = module, module.lm

    def forward(self, x, y, select, count=None):
        return self.module(x, y, select)


@pytest.mark.parametrize("head", heads.HEADS)
@pytest.mark.parametrize("backward", BACKWARD)
def test_nothing_valid_gives_zero_loss_and_zero_gradients(head, backward):
    model, x, y, ref, valid = tiny()
    out = results(FastLoss(model, head, backward), x, y, selection(ref, torch.zeros_like(valid)), 0)
    assert out["total"] == 0 and not out["kept"].any()
    assert all(value.abs().max() == 0 for name, value in out.items() if name.endswith("weight"))


@pytest.mark.parametrize("head", ["kept", "lean"])
def test_bf16_autocast_stays_near_fp32_and_keeps_fp32_gradients_and_losses(head):
    model, x, y, ref, valid = tiny()
    count, select = slm.Selection(1.0).count(valid.numpy()), selection(ref, valid, 1.0)
    exact = results(FastLoss(copy.deepcopy(model), head), x, y, select, count)
    module = FastLoss(model, head)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses, kept = module(x, y, select, count=count)
    (total / 7).backward()
    assert losses.dtype == torch.float32 and (losses - exact["losses"]).abs().max() < 0.1
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), exact[name].flatten(), dim=0) > 0.995, name


@pytest.fixture
def products_of_a_gpu(monkeypatch):
    """bf16 factors, and an operator with an fp32 result that a CPU lacks; the list of its calls."""
    calls = []

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        calls.append(tuple(a.shape))
        return a.float() @ b.float()

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    monkeypatch.setattr(heads, "factor_dtype", lambda hidden: hidden.dtype)
    yield calls
    library._destroy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["kept", "lean"])
def test_under_autocast_only_factors_are_rounded(head, case, products_of_a_gpu):
    """Losses against fp64 products of bf16 hidden states and weights, by the path of a GPU."""
    (k, scope), (_, _, y, ref, valid) = CASES[case], tiny()
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 16, generator=generator) * 3 for n in (27, 50))
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    count = slm.Selection(k, scope=scope).count(valid.numpy())

    def select(losses):
        return selection(ref, valid, k, scope)(losses).flatten()

    exact, exact_losses, exact_kept = slm.head_full(*wide, y.flatten(), select)
    exact.div(7).backward()
    for form, operators in ((heads.HEADS[head], True), (heads.head_full, False)):
        hidden.grad = weight.grad = None
        products_of_a_gpu.clear()
        with torch.autocast("cpu", torch.bfloat16):
            total, losses, kept = form(hidden, weight, y.flatten(), select, count)
        total.div(7).backward()
        assert bool(products_of_a_gpu) == operators
        assert losses.dtype == torch.float32 and torch.equal(kept, exact_kept)
        assert (losses - exact_losses).abs().max() < 1e-4  # logits near 100, steps of 8e-6
        assert abs(total - exact) < 1e-5 * exact
        for mine, true in zip((hidden, weight), wide):  # gradients of logits are bf16 factors
            assert (mine.grad - true.grad).abs().max() < 0.01 * true.grad.abs().max()
    rounded = F.cross_entropy(
        F.linear(*(t.detach().bfloat16() for t in (hidden, weight))).float(),
        y.flatten(),
        reduction="none",
    )
    assert (rounded - exact_losses).abs().max() > 0.03  # what the kit did before


def test_several_micro_batches_before_one_backward_do_not_share_their_rows():
    model, x, y, ref, valid = tiny(torch.float64, rows=4)
    quick, plain = FastLoss(copy.deepcopy(model)), slm.WithLoss(model)
    for module in (quick, plain):
        totals = []
        for rows in (slice(0, 1), slice(1, 4)):
            select = selection(ref[rows], valid[rows])
            options = (
                {"count": slm.Selection(0.6).count(valid[rows].numpy())} if module is quick else {}
            )
            totals.append(module(x[rows], y[rows], select, **options)[0])
        sum(totals).backward()
    for a, b in zip(quick.parameters(), plain.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-12 * b.grad.abs().max().clamp(min=1)


def zero_dropped_rows(model, kept, names):
    """The outside truth: hooks on plain linear layers zero the gradient of dropped rows."""

    def hook(module, inputs, output):
        output.register_hook(lambda grad: grad * kept[..., None])

    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_hook(hook)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_norm": True, "head_dim": 12}])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", heads.HEADS)
def test_pruned_backward_is_the_one_with_dropped_rows_zeroed_by_hooks(head, checkpointing, changes):
    names = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model, x, y, ref, valid = tiny(torch.float64, **changes)
    plain, count = copy.deepcopy(model), slm.Selection(0.6).count(valid.numpy())
    model.checkpointing = checkpointing
    out = results(FastLoss(model, head, "pruned"), x, y, selection(ref, valid), count)
    exact = results(_WithoutCount(slm.WithLoss(plain)), x, y, lambda losses: out["kept"], count)
    zero_dropped_rows(plain, out["kept"], names)
    pruned = results(_WithoutCount(slm.WithLoss(plain)), x, y, lambda losses: out["kept"], count)
    assert distance(out, pruned) < 1e-12
    assert distance(out, exact) > 1e-3  # it is an approximation


@pytest.mark.parametrize("backward", BACKWARD)
def test_all_rows_kept_changes_nothing(backward):
    model, x, y, ref, valid = tiny(torch.float64)
    everything, plain = torch.ones_like(valid), copy.deepcopy(model)
    wanted = results(_WithoutCount(slm.WithLoss(plain)), x, y, lambda losses: everything, 27)
    for count in (27, None):
        assert (
            distance(
                results(
                    FastLoss(copy.deepcopy(model), "kept", backward),
                    x,
                    y,
                    lambda losses: everything,
                    count,
                ),
                wanted,
            )
            < 1e-12
        )


def test_evaluation_after_training_finds_no_stale_rows():
    model, x, y, ref, valid = tiny()
    fresh, module = copy.deepcopy(model), FastLoss(model, "kept", "pruned")
    names = list(dict(fresh.named_parameters()))
    module(x, y, selection(ref, valid), count=slm.Selection(0.6).count(valid.numpy()))[0].backward()
    assert any(part.rows is not None for part in module.parts)
    with torch.no_grad():
        assert torch.equal(
            module(x[:1], y[:1]), slm.WithLoss(fresh)(x[:1], y[:1])
        )  # another number of rows
    assert all(part.rows is None for part in module.parts)
    assert list(dict(model.named_parameters())) == names  # weights keep their names
    model.zero_grad()
    for m in (model, fresh):  # and plain autograd through the bare model is whole again
        m(x).square().sum().backward()
    grads = [(a.grad, b.grad) for a, b in zip(model.parameters(), fresh.parameters())]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6 * b.abs().max()) for a, b in grads)


def test_a_wrong_count_and_a_second_backward_are_refused():
    model, x, y, ref, valid = tiny()
    module, count = FastLoss(model), slm.Selection(0.6).count(valid.numpy())
    with pytest.raises(AssertionError):
        module(x, y, selection(ref, valid), count=count - 1)
    total = module(x, y, selection(ref, valid), count=count)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.fixture
def compiled(monkeypatch):
    """compiled(module) compiles its blocks as the trainers do, to the graphs that autograd sees."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", partial(real, backend="aot_eager"))
    args = SimpleNamespace(compile="on")
    env = SimpleNamespace(device=torch.device("cpu"))
    yield lambda module: compiling.compile_blocks(module, args, env)
    torch._dynamo.reset()


def graphs():
    from torch._dynamo.utils import counters

    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# Of any other block and of the last: with gradients and without, the last also with some rows kept,
# with any number of them, with none, with one, and with all.
GRAPHS_OF = {"exact": (5, 8), "pruned": (3, 6)}


@pytest.mark.slow
@pytest.mark.parametrize("backward", BACKWARD)
def test_so_many_graphs_are_made_and_compiled_gradients_are_the_same(backward, compiled):
    """T is fixed; the choice, and how many are chosen, change from step to step."""
    model = tiny()[0]
    plain = FastLoss(copy.deepcopy(model), "kept", backward)
    quick = FastLoss(model, "kept", backward)
    compiled(quick)
    usual, all_kinds = GRAPHS_OF[backward]
    counts = []
    for step in range(9):
        _, x, y, ref, valid = tiny(seed=step)
        if step > 5:
            valid[:] = {6: False, 7: False, 8: True}[step]
            valid[0, 4] = step > 6
        k = 1.0 if step == 8 else 0.6
        counts.append(slm.Selection(k).count(valid.numpy()))
        select = selection(ref, valid, k)
        out = [results(module, x, y, select, counts[-1]) for module in (plain, quick)]
        if counts[-1]:
            assert distance(*out) < 1e-5
        with torch.no_grad():
            quick(x, y)
        if step == 5:
            assert len(set(counts)) > 2 and graphs() == usual
    assert counts[6:] == [0, 1, 27]
    assert graphs() == all_kinds


@pytest.mark.slow
def test_a_graph_too_many_stops_the_run_with_one_line(compiled, monkeypatch):
    monkeypatch.setattr(compiling, "GRAPHS", 2)
    module = FastLoss(tiny()[0])
    compiled(module)
    with pytest.raises(UserError, match="has made 2 graphs of one function.*--compile off runs"):
        for step in range(4):
            _, x, y, ref, valid = tiny(seed=step)
            results(module, x, y, selection(ref, valid), slm.Selection(0.6).count(valid.numpy()))
            with torch.no_grad():
                module(x, y)


@pytest.mark.slow
def test_a_backward_pass_that_cannot_be_built_stops_the_run_before_it_is_needed():
    """The trainers call backward() outside of what turns the compiler's errors into one line."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    def build(graph, inputs, is_backward=False, **options):
        if is_backward:
            raise InductorError(RuntimeError("no such kernel"), None)
        return lambda arguments: graph(*arguments)

    backend = partial(compile_fx, inner_compile=build)
    square = compiling.whole_graphs(lambda x: (x * x).sum(), backend=backend)
    with pytest.raises(UserError, match=r"cannot build .*no such kernel.*--compile off runs"):
        square(torch.ones(3, requires_grad=True))
