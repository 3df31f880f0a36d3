"""Which tokens of a text each token may see, and the kernel that such a mask goes with.

Plain causal attention has no mask: PyTorch's own attention takes a kernel that holds no scores. For
documents that do not see each other, and for windows shorter than the text, a GPU is given a
BlockMask and FlexAttention (compiled), which passes over blocks of 128 x 128 pairs that see
nothing. Elsewhere the mask is dense, for FlexAttention has no backward pass on a CPU.
"""

import functools

import torch

from common.errors import UserError

FLEX, SDPA = "flex", "sdpa"
NARROWEST = 16  # head_dim that FlexAttention's kernels take on a GPU


def path_of(device, document_mask):
    """The attention of a run on `device`, FLEX or SDPA, where its windows are not short."""
    return FLEX if document_mask and takes_blocks(device) else SDPA


def takes_blocks(device):
    return device.type == "cuda"


def text_mask(documents, window, length, device, head_dim):
    """Which tokens each may see: those before it, in its document, in the sliding window.

    documents (B, T): the document that each token is in; None: all are in one. Returns None for
    plain causal attention, a BlockMask, or (B or 1, 1, T, T) bool. Raises UserError where a GPU's
    kernel does not take heads so narrow.
    """
    if documents is None and (window is None or length <= window):
        return None
    may_see = rule(documents, window)
    rows = 1 if documents is None else len(documents)
    if takes_blocks(device):
        if head_dim < NARROWEST:
            raise UserError(
                f"attention: got heads of {head_dim} dimensions, and on a GPU documents or a "
                f"sliding window hide tokens; FlexAttention takes {NARROWEST} or more: give the "
                f"model fewer heads (--n-head) or leave --document-mask out"
            )
        return block_mask(may_see, rows, length, device)
    return dense_mask(may_see, rows, length, device)


def rule(documents, window):
    """may_see(row, head, place, other): does a token see the one at `other`? Index tensors."""

    def may_see(row, head, place, other):
        seen = place >= other
        if window is not None:
            seen = seen & (place - other < window)
        if documents is not None:
            seen = seen & (documents[row, place] == documents[row, other])
        return seen

    return may_see


def dense_mask(may_see, rows, length, device):
    """(rows, 1, T, T) bool."""
    row = torch.arange(rows, device=device)[:, None, None, None]
    places = torch.arange(length, device=device)
    return may_see(row, None, places[:, None], places).view(rows, 1, length, length)


def block_mask(may_see, rows, length, device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(may_see, rows, None, length, length, device)


def of_many_shapes():
    """A context for attention whose shapes never come again, without cuDNN's.

    PyTorch prefers that on the newest GPUs. It makes a plan for each shape, which takes as long as
    hundreds of steps.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(others))


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend_in_blocks(q, k, v, mask):
    """Attention of q (B, H, T, D) over k and v (B, H_kv, T, D) with a BlockMask."""
    from torch.nn.attention.flex_attention import flex_attention

    attention = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        # By itself it would hold all scores. Within a compiled block it is compiled with it.
        attention = compiled_flex_attention()
    return attention(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
