"""torch.compile of blocks (`--compile`): each whole, or not at all."""

import torch

from common.errors import UserError, reason_of
from common.numerics import is_compiled

# Graphs of one block that a run may make: with and without gradients, the last block and the
# others, all rows kept or none, or one, or any number of them. (tests/training/test_heads.py: 8)
GRAPHS = 16


def compile_blocks(module, args, env, **options):
    """torch.compile each block (`--compile`), whole, or stop. `options`: torch.compile's.

    Shapes are static there; selection and head stay outside, and so do FSDP's and other hooks.
    """
    if not is_compiled(args, env.device):
        return
    # It would cut blocks at DDP's buckets; a block is small enough.
    torch._dynamo.config.optimize_ddp = False
    for block in module.lm.model.layers:
        block.forward = whole_graphs(block.forward, **options)


def whole_graphs(function, **options):
    """torch.compile of a function; an error where a part cannot be compiled, and past GRAPHS."""
    torch._dynamo.config.recompile_limit = GRAPHS
    # The backward pass is built with the forward pass, where `or_stop` sees it fail.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return or_stop(torch.compile(function, fullgraph=True, **options))


def or_stop(compiled):
    """A compiled function. Raises UserError past the limit of graphs, and where nothing is built.

    The first would be a slow run in silence.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._inductor.exc import InductorError

    def call(*args, **kwargs):
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            raise UserError(
                f"torch.compile has made {GRAPHS} graphs of one function and wants another; "
                f"TORCH_LOGS=recompiles says why. --compile off runs without"
            ) from None
        except InductorError as error:
            reason = reason_of(error)
            if " " in torch.__file__:
                reason += f"; a C++ build takes no space in torch's own folder, {torch.__file__}"
            raise UserError(
                f"torch.compile cannot build this model here ({reason}); --compile off runs without"
            ) from None

    return call
