"""torch.compile, and several ranks: DDP or FSDP2 around the training module, and whole states."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.numerics import is_compiled


def compile_blocks(module, args, env):
    """torch.compile each block (`--compile`).

    Shapes are static there; selection and head stay outside.
    """
    if not is_compiled(args, env):
        return
    # It would cut blocks at DDP's buckets; a block is small enough.
    torch._dynamo.config.optimize_ddp = False
    for block in module.lm.model.layers:
        block.compile()


def wrap(module, args, env):
    """The training module, compiled, and with several ranks under DDP or FSDP2 (`--parallel`)."""
    compile_blocks(module, args, env)
    module.lm.checkpointing = args.checkpointing
    if env.world == 1:
        return module
    if args.parallel == "ddp":
        return DistributedDataParallel(module)
    # These take seconds to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(env.device.type, (env.world,))
    for block in module.lm.model.layers:
        fully_shard(block, mesh=mesh)
    # Embedding, norm and head are one group: tied weights stay together.
    return fully_shard(module, mesh=mesh)


def sync_gradients(module, last):
    """Reduce gradients over ranks in the backward pass of the last micro-batch only."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)


def full_state(module, optimizer=None):
    """Whole (gathered) states on the CPU, by parameter name: (model, optimiser).

    They are the same whatever the number of ranks. All ranks must call it. Without `optimizer`
    the second is None.
    """
    if dist.is_initialized():
        from torch.distributed.checkpoint import state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        if optimizer is None:
            return sharded.get_model_state_dict(module, options=options), None
        return sharded.get_state_dict(module, optimizer, options=options)
    if optimizer is None:
        return module.state_dict(), None
    names = dict(enumerate(_names(module, optimizer)))
    return module.state_dict(), _renamed(optimizer.state_dict(), names)


def restore(module, optimizer, state):
    """Load what `full_state` gave, on any number of ranks."""
    if dist.is_initialized():
        from torch.distributed.checkpoint import state_dict as sharded

        sharded.set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=sharded.StateDictOptions(full_state_dict=True),
        )
        return
    module.load_state_dict(state["model"])
    places = {name: i for i, name in enumerate(_names(module, optimizer))}
    optimizer.load_state_dict(_renamed(state["optimizer"], places))


def _names(module, optimizer):
    """Parameter names in the optimiser's order."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state, new):
    """An optimiser's state dict with its parameters called by other names or numbers."""
    groups = []
    for group in state["param_groups"]:
        groups.append({**group, "params": [new[key] for key in group["params"]]})
    return {
        "state": {new[key]: value for key, value in state["state"].items()},
        "param_groups": groups,
    }
