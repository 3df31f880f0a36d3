"""Several ranks: DDP or FSDP2 around the training module, and whole states."""

import gc

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.compiling import compile_blocks

COLLECT_EVERY = 50  # steps


def wrap(module, args, env):
    """The training module, compiled, and with several ranks under DDP or FSDP2 (`--parallel`)."""
    compile_blocks(module, args, env)
    module.lm.checkpointing = args.checkpointing
    if env.world == 1:
        if args.parallel == "fsdp":
            print("note: --parallel fsdp: a single rank shards nothing, it holds the whole state")
        return module
    if args.parallel == "ddp":
        # Gradients are views of the buckets that are reduced: 4 bytes a parameter and not 8.
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    return shard(module, args, env)


def shard(module, args, env):
    """FSDP2, as torchtitan runs it: fp32 shards, bf16 copies gathered, gradients reduced in fp32.

    `--reshard-after-forward`: which blocks give their gathered weights back between forward and
    backward pass, and gather them twice: all but the last one, which is needed again at once
    ("default"), all, or none, which keeps a copy of the whole model in bf16.

    With `--shard-size` N only N ranks share one copy of the states (HSDP): gathers stay among them,
    within a node perhaps, and the groups of N average their gradients as DDP does.
    """
    # These take seconds to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = args.shard_size or env.world
    if size == env.world:
        mesh = init_device_mesh(env.device.type, (size,))
    else:
        shape = (env.world // size, size)
        mesh = init_device_mesh(env.device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy()
    if env.dtype != torch.float32:
        # Inputs keep their dtype: the residual stream and RoPE's cosines are fp32.
        policy = MixedPrecisionPolicy(env.dtype, torch.float32, cast_forward_inputs=False)
    *others, last = module.lm.model.layers
    again = {"default": (True, False), "always": (True, True), "never": (False, False)}
    of_others, of_last = again[args.reshard_after_forward]
    for block in others:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=of_others)
    fully_shard(last, mesh=mesh, mp_policy=policy, reshard_after_forward=of_last)
    # Embedding, norm and head are one group: tied weights stay together. It is never given back.
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def sync_gradients(module, last):
    """Which gradients are reduced over ranks in the backward pass of a micro-batch.

    DDP: those of the last micro-batch, which are the sum of all. FSDP: each micro-batch's, among
    the ranks that share a copy; held back, they would be whole, 4 bytes a parameter on every rank.
    Between copies (HSDP) the last micro-batch's.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last
    elif hasattr(module, "set_requires_all_reduce"):
        module.set_requires_all_reduce(last)


def clear_gradients(module, optimizer):
    """After a step: gradients are freed, but DDP's, which are views of its buckets, are zeroed."""
    optimizer.zero_grad(set_to_none=not isinstance(module, DistributedDataParallel))


def tensors(module, optimizer):
    """{name: tensor} of the weights and of the optimiser's state: the live ones, no copies.

    Of an FSDP2 module each rank's shards (DTensors). Names do not depend on the number of ranks. A
    new optimiser gets its moments here, as zeros.
    """
    for part in module.modules():
        if hasattr(part, "reshard"):  # FSDP2: behind a validation some weights are still gathered
            part.reshard()
    if not optimizer.state and hasattr(optimizer, "begin"):  # `--moments int8`
        optimizer.begin()
    if not optimizer.state:
        from torch.distributed.checkpoint import state_dict as sharded

        sharded.get_optimizer_state_dict(module, optimizer)  # by a step of length 0
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(_names(module, optimizer), params):
        name = name.removeprefix("module.")  # DDP's
        found[f"model.{name}"] = p.detach()
        kept = optimizer.state[p]
        if hasattr(optimizer, "tensors_of"):  # `--moments int8`
            kept = optimizer.tensors_of(p)
        for key, value in kept.items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def collect_garbage(step, env):
    """With several ranks Python's garbage is collected at the same steps on all of them.

    Left to itself, it would stop now one rank and now another, and each time all wait.
    """
    if env.world > 1:
        gc.disable()
        if step % COLLECT_EVERY == 0:
            gc.collect(1)


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
    """Load what `full_state` gave, on any number of ranks: each takes its shards of it."""
    if dist.is_initialized():
        whole = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        for name, moments in state["optimizer"]["state"].items():
            whole |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
        with torch.no_grad():
            for name, tensor in tensors(module, optimizer).items():
                tensor.copy_(as_shards(whole[name], tensor))
        return
    module.load_state_dict(state["model"])
    places = {name: i for i, name in enumerate(_names(module, optimizer))}
    optimizer.load_state_dict(_renamed(state["optimizer"], places))


def as_shards(whole, like):
    """A tensor that every rank has, shared out as the DTensor `like` is; nothing is sent."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


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
