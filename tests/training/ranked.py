"""What several ranks compute, against one process; test_ranks.py starts it under torchrun.

torchrun --nproc-per-node 2 tests/training/ranked.py exact      # fp64: equal gradients
torchrun --nproc-per-node 2 tests/training/ranked.py bfloat16   # how far the policy is off
torchrun --nproc-per-node 2 tests/training/ranked.py bytes      # gathered and held
torchrun --nproc-per-node 4 tests/training/ranked.py int8       # equal codes of moments
"""

import copy
import json
import os
import sys
from collections import Counter
from types import SimpleNamespace

import common.device  # noqa: F401  first: it sets how torch's threads wait

import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_heads import selection, tiny

import slm
from training import parallel
from training.loss import BACKWARD, FastLoss
from training.optimizer import make_optimizer

MICRO_BATCHES = 4
WEIGHTS = (0.3, 1.7, 0.9, 0.1)  # of the micro-batches' sums: no two tokens of theirs weigh the same


def kinds_of(world):
    """{name: (--parallel, --shard-size, --reshard-after-forward)} of the ways to share the work."""
    kinds = {
        "ddp": ("ddp", None, "default"),
        "fsdp": ("fsdp", None, "default"),
        "always": ("fsdp", None, "always"),
        "never": ("fsdp", None, "never"),
    }
    if world > 2:
        kinds["hsdp"] = ("fsdp", 2, "default")
    return kinds


def wrapped(model, kind, backward, dtype, checkpointing=False):
    world = dist.get_world_size()
    how, size, reshard = kinds_of(world)[kind]
    args = SimpleNamespace(compile="off", checkpointing=checkpointing, parallel=how)
    args.shard_size, args.reshard_after_forward = size, reshard
    env = SimpleNamespace(world=world, device=torch.device("cpu"), dtype=dtype)
    return parallel.wrap(FastLoss(model, "kept", backward), args, env)


def learn(module, batches, weights, dtype=torch.float32):
    """One step's gradients of several micro-batches; a token's loss weighs its batch's weight."""
    for i, ((x, y, ref, valid), weight) in enumerate(zip(batches, weights)):
        parallel.sync_gradients(module, last=i == len(batches) - 1)
        count = slm.Selection(0.6).count(valid.numpy())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, losses, _ = module(x, y, selection(ref, valid), count=count)
        (total * weight).backward()
    return losses


def gradients(module):
    found = {}
    for name, p in module.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = grad
    return found


def off(mine, wanted):
    """The largest difference of two sets of gradients, each relative to its largest entry."""
    assert mine.keys() == wanted.keys()
    return max(
        ((mine[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item()
        for name in wanted
    )


def exact():
    """DDP, FSDP2 and HSDP give one process's gradients, to fp64's rounding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shape = {"qkv_bias": True, "qk_norm": True, "head_dim": 12}  # all that attention may have
    for backward in BACKWARD:
        batches = [tiny(torch.float64, seed=seed)[1:] for seed in range(MICRO_BATCHES)]
        single = FastLoss(tiny(torch.float64, **shape)[0], "lean", backward)
        learn(single, batches, WEIGHTS)
        wanted = gradients(single)
        for kind in kinds_of(world):
            model = tiny(torch.float64, **shape)[0]
            module = wrapped(model, kind, backward, torch.float32, kind == "fsdp")
            for _ in range(2):  # the second step finds what the first left
                learn(module, batches[rank::world], [world * w for w in WEIGHTS[rank::world]])
                distance = off(gradients(module), wanted)
                assert distance < 1e-12, (backward, kind, distance)
                optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
                parallel.clear_gradients(module, optimizer)
                if kind == "ddp":  # one bucket holds all gradients
                    storages = {p.grad.untyped_storage().data_ptr() for p in module.parameters()}
                    assert len(storages) == 1, len(storages)


def bfloat16():
    """Relative errors (norms) of the gradients, and of losses, in bf16, all against fp32."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    batches = [tiny(seed=seed, rows=8, **shape)[1:] for seed in range(MICRO_BATCHES)]
    truth = FastLoss(tiny(**shape)[0], "lean")
    learn(truth, batches, WEIGHTS)
    wanted = gradients(truth)
    alone = FastLoss(tiny(**shape)[0], "lean")
    learn(alone, batches, WEIGHTS, torch.bfloat16)
    module = wrapped(tiny(**shape)[0], "fsdp", "exact", torch.bfloat16)
    learn(module, batches[rank::world], [world * w for w in WEIGHTS[rank::world]], torch.bfloat16)
    result = {}
    for name, found in (("autocast", gradients(alone)), ("policy", gradients(module))):
        errors = [(found[n] - wanted[n]).norm() / wanted[n].norm() for n in wanted]
        angles = [F.cosine_similarity(found[n].flatten(), wanted[n].flatten(), 0) for n in wanted]
        result[name] = {"worst": max(errors).item(), "cosine": min(angles).item()}
    return result


def count_bytes():
    """Bytes a parameter: gathered and reduced in a micro-batch, gradients held after it."""
    world = dist.get_world_size()
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "rows": 8}
    moved = Counter()
    count_calls("gathered", ("all_gather_single", "all_gather_into_tensor"), moved)
    count_calls("reduced", ("reduce_scatter_single", "reduce_scatter_tensor"), moved)
    model, *batch = tiny(**shape)
    n = sum(p.numel() for p in model.parameters())
    outer = sum(p.numel() for name, p in model.named_parameters() if "layers" not in name)
    result = {"blocks": model.config.num_hidden_layers, "outer": outer / n}
    cases = [("fsdp", torch.float32)]
    cases += [(kind, torch.bfloat16) for kind in ("fsdp", "always", "never")]
    for kind, dtype in cases:
        module = wrapped(tiny(**shape)[0], kind, "exact", dtype)
        learn(module, [batch], [1.0], dtype)  # the first one also makes what later ones reuse
        moved.clear()
        parallel.sync_gradients(module, last=False)
        learn_one(module, batch, dtype)
        row = {name: size / n for name, size in moved.items()}
        row["held"] = held(module) / n
        name = str(dtype).removeprefix("torch.")
        result[name if kind == "fsdp" else kind] = row
    return {"world": world, **result}


def learn_one(module, batch, dtype):
    x, y, ref, valid = batch
    count = slm.Selection(0.6).count(valid.numpy())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        module(x, y, selection(ref, valid), count=count)[0].backward()


def count_calls(what, names, moved):
    """Add the whole tensor's bytes of each call of a collective to `moved`.

    `names`: what FSDP calls it, in PyTorch 2.13 and before.
    """
    name = next(name for name in names if hasattr(dist, name))
    real = getattr(dist, name)

    def counted(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        moved[what] += max(t.nbytes for t in tensors)
        return real(*args, **kwargs)

    setattr(dist, name, counted)


def held(module):
    """Bytes of gradients on this rank: sharded ones, and whole ones that wait for reduction."""
    total = 0
    for part in module.modules():
        state = getattr(part, "_get_fsdp_state", None)
        group = state()._fsdp_param_group if state else None
        for p in group.fsdp_params if group else ():
            waiting = p.unsharded_accumulated_grad
            total += 0 if waiting is None else waiting.nbytes
            whole = getattr(p, "_unsharded_param", None)
            total += 0 if whole is None or whole.grad is None else whole.grad.nbytes
            grad = p.sharded_param.grad
            total += 0 if grad is None else grad.to_local().nbytes
    return total


def int8():
    """Moments in codes: each rank's are those of one process, bit for bit, also when restored."""
    # Keys and values have two rows of 2,048: some of four ranks have none.
    shape = {"hidden_size": 2048, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    args = SimpleNamespace(moments="int8", weight_decay=0.1, lr=1e-2, compile="off")
    single = FastLoss(tiny(**shape)[0])
    alone = make_optimizer(single, args)
    step_with_random_gradients(single, alone, seeds=(1, 2))
    halfway = copy.deepcopy(saved_alone(single, alone))
    step_with_random_gradients(single, alone, seeds=(3,))
    wanted = parallel.tensors(single, alone)
    coded = [name for name in wanted if name.endswith("codes")]
    assert any(len(wanted[name]) == 2 for name in coded), coded
    for kind in kinds_of(dist.get_world_size()):
        for restored in (False, True):
            module = wrapped(tiny(**shape)[0], kind, "exact", torch.float32)
            optimizer = make_optimizer(module, args)
            if restored:
                parallel.restore(module, optimizer, halfway)
            seeds = (3,) if restored else (1, 2, 3)
            step_with_random_gradients(module, optimizer, seeds)
            found = parallel.tensors(module, optimizer)
            assert found.keys() == wanted.keys()
            for name, tensor in found.items():
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                assert torch.equal(whole, wanted[name]), (kind, restored, name)


def step_with_random_gradients(module, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.grad = parallel.as_shards(torch.randn(p.shape, generator=generator), p)
        optimizer.step()


def saved_alone(module, optimizer):
    """What one process saves as a file."""
    names = dict(enumerate(parallel._names(module, optimizer)))
    state = parallel._renamed(optimizer.state_dict(), names)
    return {"model": module.state_dict(), "optimizer": state}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    what = {"exact": exact, "bfloat16": bfloat16, "bytes": count_bytes, "int8": int8}[sys.argv[1]]
    outcome = what()
    dist.barrier()
    if dist.get_rank() == 0:
        print("outcome:", json.dumps(outcome), flush=True)
    dist.barrier()
    # Once in hundreds of runs a thread of gloo's aborts while PyTorch takes itself down.
    os._exit(0)
