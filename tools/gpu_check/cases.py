"""The cases of tools.gpu_check: each is measured in a process of its own."""

import statistics
import tempfile
import time
from functools import partial
from unittest import mock

from common.device import Env  # first: it sets how torch's threads wait

import numpy as np
import torch

import slm
from common import attention
from common.compiling import compile_blocks
from common.numerics import is_compiled
from evaluation.generate import generate
from tools.bench.rows import SCORED, Rows, config_of
from tools.gpu_check.stages import stages_case
from tools.plan.memory import memory
from training import parallel
from training.loss import FastLoss
from training.optimizer import flops_per_token, make_optimizer

TRAIN = {  # case: (row of tools.bench, head, backward, k or None for --k)
    "CLM": ("clm_kept", "kept", "exact", 1.0),
    "SLM, exact": ("slm_kept", "kept", "exact", None),
    "SLM, lean": ("slm_lean", "lean", "exact", None),
    "SLM, pruned": ("slm_pruned", "kept", "pruned", None),
    "SLM, the usual way": ("slm_usual", None, None, None),
}
RANKS = ("ddp", "fsdp")
WARM_UP = 3  # steps: compilation, and the allocator's first blocks
NEW_TOKENS = 64  # of each generated text
PROMPT = 256  # tokens of each prompt
OPERATOR = "aten::_scaled_dot_product_"  # and the name of a kernel


def measure(case, args):
    env = Env(args)
    if case in TRAIN:
        return train_case(case, args, env)
    if case in RANKS:
        return ranks_case(case, args, env)
    if case.startswith("stages"):
        return stages_case(case, args, env)
    return NUMBERS[case](args, env)


def random_rows(args, env):
    """Rows of tools.bench on this machine, in a folder that goes."""
    folder = tempfile.TemporaryDirectory()
    rows = Rows(args, env, folder.name)
    rows.temporary = folder  # goes when they go
    return rows


def seconds_of(step, args, env):
    """Seconds of each measured step, after the warm-up."""
    found = []
    for i in range(WARM_UP + args.steps):
        if env.device.type == "cuda":
            torch.cuda.synchronize()
        if i == WARM_UP:
            env.peak_memory(reset=True)
        started = time.perf_counter()
        step()
        if env.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= WARM_UP:
            found.append(time.perf_counter() - started)
    return found


def rate(seconds, tokens, flops, env):
    """{tok_per_s, step_s, mfu} of the median step."""
    step = statistics.median(seconds)
    return {
        "tok_per_s": round(tokens / step),
        "step_s": step,
        "mfu": env.mfu(flops * tokens / step),
    }


def train_case(case, args, env):
    """A training step: its rate, its memory beside the plan's, the graphs that it compiled."""
    row, head, backward, k = TRAIN[case]
    rows = random_rows(args, env)
    if case == "CLM":  # what train_slm.py --k 1 runs
        step = partial(rows.our_step, "kept", "exact", False)
    else:
        step = rows.step(row)
    seconds = seconds_of(step, args, env)
    flops = flops_per_token(rows.ours("full")[0].lm, args.seq_len)
    result = {**rate(seconds, rows.n, flops, env), "peak_memory_bytes": env.peak_memory()}
    if head:
        planned, total = memory(
            config_of(args),
            args.batch_size,
            args.seq_len,
            bf16=env.dtype == torch.bfloat16,
            k=k or args.k,
            head=head,
            backward=backward,
        )
        result["planned_bytes"] = total
    result["graphs"] = n_graphs()
    return result


def n_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def attention_case(args, env):
    """Does the model's attention run where only the flash kernel is allowed?

    And which PyTorch takes where it may choose: on the newest GPUs it prefers cuDNN's.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.profiler import ProfilerActivity, profile

    rows = random_rows(args, env)
    model = rows.our_model().to(env.device)
    has_kernel = env.device.type == "cpu" or env.dtype != torch.float32  # a GPU's takes no fp32
    if has_kernel:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), env.autocast():
            model(rows.x).float().sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad(), env.autocast():
        model(rows.x)
    chosen = {e.name for e in seen.events() if e.name.startswith(OPERATOR)}
    names = sorted(name.removeprefix(OPERATOR) for name in chosen)
    return {"flash": has_kernel, "chosen": ", ".join(names)}


def documents_case(args, env):
    """--document-mask: FlexAttention's blocks against the dense mask, on the same documents.

    Losses, gradients, and seconds of a forward and backward pass of each and without a mask.
    """
    rows = random_rows(args, env)
    module, _ = rows.ours("kept")
    end = int(rows.x.max())
    rows.x[:, :: max(2, args.seq_len // 8)] = end  # documents of an eighth of a window
    result = {"path": attention.path_of(env.device, True)}
    found = {}
    for name in ("causal", "blocks", "dense"):
        module.lm.document_end = None if name == "causal" else end
        in_blocks = name == "blocks" and result["path"] == attention.FLEX
        with mock.patch.object(attention, "takes_blocks", lambda device, yes=in_blocks: yes):
            with torch.no_grad(), env.autocast():
                losses = module(rows.x, rows.y).double()
            micro_batch(module, rows, args, env)
            gradients = [p.grad.clone() for p in module.parameters()]
            found[name] = losses, gradients
            module.zero_grad()
            step = partial(micro_batch, module, rows, args, env)
            result[f"{name}_s"] = statistics.median(seconds_of(step, args, env))
            module.zero_grad()
    (losses, gradients), (wanted, wanted_gradients) = found["blocks"], found["dense"]
    result["sd_nats"] = (losses - wanted).std().item()
    result["largest_nats"] = (losses - wanted).abs().max().item()
    pairs = zip(gradients, wanted_gradients)
    result["gradients_off"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    return result


def micro_batch(module, rows, args, env):
    """Forward and backward pass of a selective step, as the trainer makes them."""
    count = slm.n_keep(rows.n, args.k)

    def keep(losses):
        tokens = slm.Tokens(loss=losses, ref_loss=rows.ref_loss)
        return slm.Selection(args.k).mask(tokens, rows.valid)

    with env.autocast():
        total, _, _ = module(rows.x, rows.y, keep, count=count)
    (total / count).backward()


def synchronisation_case(args, env):
    """A micro-batch's forward and backward pass where each wait for the GPU would be an error."""
    rows = random_rows(args, env)
    module, _ = rows.ours("kept")
    micro_batch(module, rows, args, env)  # compiled, and the allocator is warm
    if env.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    micro_batch(module, rows, args, env)
    if env.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return {"waits_in_a_micro_batch": 0, "checked": env.device.type == "cuda"}


def graphs_case(args, env):
    """How many graphs are compiled when T stays and the number kept changes."""
    rows = random_rows(args, env)
    counts = []
    for k in (args.k, 0.5, 0.7, 1.0):
        rows.args.k = k
        for _ in range(2):
            rows.our_step("kept", "pruned", k < 1)
        counts.append(n_graphs())
    return {"graphs_after_each_k": counts}


def compiled_case(args, env):
    """Losses of compiled and of eager blocks, on the same tokens."""
    rows = random_rows(args, env)
    plain = slm.WithLoss(rows.our_model().to(env.device)).eval()
    with torch.no_grad(), env.autocast():
        eager = plain(rows.x, rows.y)
        compile_blocks(plain, args, env)
        compiled = plain(rows.x, rows.y)
    error = (compiled - eager).double()
    return {"sd_nats": error.std().item(), "largest_nats": error.abs().max().item()}


def score_case(args, env):
    """score.py's rate, and that of the bare forward pass."""
    rows = random_rows(args, env)
    forward = seconds_of(rows.forward, args, env)
    flops = flops_per_token(rows.ours("full")[0].lm, args.seq_len) / 3  # no backward pass
    result = rate(forward, rows.n, flops, env)
    result["forward_tok_per_s"] = result.pop("tok_per_s")
    rows.score()  # makes its tokens
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        rows.score()
        seconds.append(time.perf_counter() - started)
    result["tok_per_s"] = round(SCORED * rows.n / statistics.median(seconds))
    return result


def generate_case(args, env):
    """Greedy decoding of random prompts, ids alone: new tokens per second."""
    rows = random_rows(args, env)
    model = rows.our_model().to(env.device, env.dtype).eval()
    model.config.max_position_embeddings = PROMPT + NEW_TOKENS + 1
    model.config.eos_token_id = []
    on_gpu = env.device.type == "cuda"
    n = 64 if on_gpu else 4
    prompts = np.random.RandomState(0).randint(0, args.vocab_size, (n, PROMPT)).tolist()
    compiled = is_compiled(args, env.device)
    for _ in range(2):  # the first compiles
        started = time.perf_counter()
        outputs = generate(
            model, Wordless(), prompts, NEW_TOKENS, batch_tokens=1 << 16, compiled=compiled
        )
        made = sum(len(output.ids) for _, output in outputs)
        seconds = time.perf_counter() - started
    return {"new_tok_per_s": round(made / seconds), "new_tokens": made, "prompts": n}


class Wordless:
    """Stands for a tokenizer where there are ids alone."""

    eos_id = None
    n_vocab = 0

    def stream(self):
        return self

    def push(self, _):
        return ""

    def flush(self):
        return ""


def ranks_case(case, args, env):
    """A training step on all GPUs."""
    args.parallel = case
    rows = random_rows(args, env)
    module = FastLoss(rows.our_model().to(env.device), "kept", "exact")
    student = parallel.wrap(module, args, env)
    optimizer = make_optimizer(student, args)

    def step():
        micro_batch(student, rows, args, env)
        optimizer.step()
        parallel.clear_gradients(student, optimizer)

    seconds = seconds_of(step, args, env)
    flops = flops_per_token(Rows(args, env, rows.folder).our_model(), args.seq_len)
    result = rate(seconds, rows.n * env.world, flops, env)
    return {**result, "peak_memory_bytes": env.peak_memory(), "ranks": env.world}


NUMBERS = {
    "attention": attention_case,
    "documents": documents_case,
    "synchronisation": synchronisation_case,
    "graphs": graphs_case,
    "compiled": compiled_case,
    "score": score_case,
    "generate": generate_case,
}
