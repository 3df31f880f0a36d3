"""Masks of documents and windows: dense and in blocks they are one, and so is attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

import model as M
from common import attention
from common.errors import UserError

WINDOWS = [None, 1, 130]
LENGTH = 300  # two blocks of 128 and a part of one
# The last token of each document; the last one of a row may be cut. One of 128, some of one token.
ENDS = ((0, 3, 130, 299), (127, 255))


def documents():
    tokens = torch.ones(len(ENDS), LENGTH, dtype=torch.long)
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = 0
    return M.documents_of(tokens, 0)[0]


def by_hand(ends, window, length=LENGTH):
    """(1, T, T): a triangle, or a band of one, for each document."""
    mask = np.zeros((1, length, length), dtype=bool)
    starts = [0, *(end + 1 for end in ends)]
    for start, stop in zip(starts, [*starts[1:], length]):
        n = stop - start
        triangle = np.tri(n, dtype=bool)
        if window is not None:
            triangle &= ~np.tri(n, k=-window, dtype=bool)
        mask[0, start:stop, start:stop] = triangle
    return torch.from_numpy(mask)


def wanted_mask(window):
    return torch.stack([by_hand(ends, window) for ends in ENDS])


@pytest.mark.parametrize("window", WINDOWS)
def test_the_dense_mask_is_what_the_rule_says(window):
    made = attention.text_mask(documents(), window, LENGTH, torch.device("cpu"), 16)
    assert torch.equal(made, wanted_mask(window))


def test_without_documents_a_mask_is_for_windows_shorter_than_the_text_alone():
    cpu = torch.device("cpu")
    assert attention.text_mask(None, None, 40, cpu, 16) is None
    assert attention.text_mask(None, 40, 40, cpu, 16) is None
    made = attention.text_mask(None, 39, 40, cpu, 16)
    assert torch.equal(made[0], by_hand([], 39, length=40))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_blocks_of_a_mask_are_full_part_or_empty_as_the_dense_one_says(window):
    wanted = wanted_mask(window)
    blocks = attention.block_mask(attention.rule(documents(), window), 2, LENGTH, "cpu")
    # Within a block that is neither full nor empty the kernel asks this function:
    asked = flex.create_mask(blocks.mask_mod, 2, 1, LENGTH, LENGTH, "cpu")
    assert torch.equal(asked, wanted)
    padded = F.pad(wanted, (0, 384 - LENGTH, 0, 384 - LENGTH))
    seen = padded.view(2, 3, 128, 3, 128).sum(dim=(2, 4))  # pairs of (row, block, block)
    full = chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    part = chosen(blocks.kv_num_blocks, blocks.kv_indices)
    assert torch.equal(full, seen == 128 * 128)
    assert torch.equal(part, (seen > 0) & (seen < 128 * 128))


def chosen(counts, indices):
    """Which blocks a BlockMask names, (row, block, block) bool."""
    found = torch.zeros(2, 3, 3, dtype=torch.bool)
    for row in range(2):
        for block in range(3):
            n = int(counts[row, 0, block])
            found[row, block, indices[row, 0, block, :n].long()] = True
    return found


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_attention_in_blocks_is_attention_with_the_dense_mask(window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, LENGTH, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, LENGTH, 16, generator=generator)
    may_see = attention.rule(documents(), window)
    blocks = attention.block_mask(may_see, 2, LENGTH, "cpu")
    dense = attention.dense_mask(may_see, 2, LENGTH, "cpu")
    assert (M.attend(q, k, v, blocks) - M.attend(q, k, v, dense)).abs().max() < 1e-6


@pytest.mark.parametrize("window, end", [(20, 7), (20, None)])
def test_a_model_gives_the_same_in_blocks(monkeypatch, window, end):
    """Its hidden states, and with FlexAttention's refusal taken out its gradients, on a CPU."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "NARROWEST", 1)  # a GPU's kernels' limit
    config = M.Config(50, 24, 40, 2, 6, 2, sliding_window=window)
    tokens = torch.randint(50, (2, 150), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 150, 24, generator=torch.Generator().manual_seed(1))
    found = []
    for takes_blocks in (True, False):
        monkeypatch.setattr(attention, "takes_blocks", lambda device, blocks=takes_blocks: blocks)
        model = M.initialise(M.Transformer(config), 0)
        model.document_end = end
        hidden = model(tokens)
        (hidden * weights).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((hidden, gradients))
    (blocks, in_them), (dense, wanted) = found
    assert (blocks - dense).abs().max() < 1e-5
    for a, b in zip(in_them, wanted):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_a_compiled_block_takes_any_mask_of_blocks_in_one_graph(monkeypatch):
    """As on a GPU: documents change in each micro-batch, the graph does not."""
    monkeypatch.setattr(attention, "takes_blocks", lambda device: True)
    monkeypatch.setattr(attention, "NARROWEST", 1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = M.initialise(M.Transformer(M.Config(50, 24, 40, 1, 6, 2)), 0)
    model.document_end = 7
    block = model.model.layers[0]
    plain = block.forward
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    block.forward = torch.compile(plain, fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(3):
            tokens = torch.randint(50, (2, 150), generator=generator)
            compiled = model(tokens)
    assert len(graphs) == 1
    block.forward = plain
    with torch.no_grad():
        assert (model(tokens) - compiled).abs().max() < 1e-5


def test_heads_too_narrow_for_a_gpu_are_refused_where_a_mask_is_needed(monkeypatch):
    monkeypatch.setattr(attention, "takes_blocks", lambda device: True)
    model = M.Transformer(M.Config(50, 24, 40, 1, 3, 3))
    tokens = torch.ones(1, 20, dtype=torch.long)
    model(tokens)
    model.document_end = 7
    with pytest.raises(UserError, match="got heads of 8 dimensions.*16 or more.*--document-mask"):
        model(tokens)


def test_the_path_is_named_where_it_is_chosen():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [attention.path_of(device, True) for device in (cpu, gpu)] == ["sdpa", "flex"]
    assert [attention.path_of(device, False) for device in (cpu, gpu)] == ["sdpa", "sdpa"]
