"""How long training stands still while its state is saved: gathered to one rank, and sharded.

    torchrun --nproc-per-node 4 -m tools.bench.saves --preset cpu-130m --seq-len 16 --device cpu
    torchrun --nproc-per-node 8 -m tools.bench.saves --preset tinyllama-1b

"Gathered" is one file that the first rank writes, and the others wait for. "Sharded" is what the
trainers do on several ranks: each copies its part, and writes it while training goes on. The last
rank to go on counts.
"""

import statistics
import tempfile
import time
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import torch
import torch.distributed as dist

from common import changes, files
from common.command_line import Parser, add_machine, whole
from common.errors import UserError, cli
from model import Transformer, initialise
from tools.bench.rows import PRESETS, config_of
from training import parallel
from training.loss import FastLoss
from training.optimizer import make_optimizer
from training.states import States


def arguments(argv=None):
    parser = Parser(__doc__)
    parser.usage = "torchrun --nproc-per-node N -m tools.bench.saves [--FLAG VALUE ...]"
    add = parser.add_argument
    add("--preset", default="cpu-130m", choices=[*PRESETS], help="model")
    add("--seq-len", type=whole(1), default=16, help="tokens per window, one window per rank")
    add("--parallel", default="fsdp", choices=["ddp", "fsdp"], help="how ranks share the model")
    add("--saves", type=whole(1), default=3, help="of each kind")
    add("--out", metavar="DIR", help="where the states are written; default: a temporary folder")
    add_machine(parser)
    parser.set_defaults(threads=1)
    args = parser.parse_args(argv)
    args.vocab_size = PRESETS[args.preset].vocab_size
    args.moments, args.lr, args.weight_decay = "float32", 1e-4, 0.1
    args.compile, args.checkpointing, args.shard_size = "off", False, None
    args.reshard_after_forward = "default"
    return args


class Trainer:
    """Plain training on random tokens."""

    def __init__(self, args, env):
        config = config_of(args)
        model = initialise(Transformer(config).to(env.device), 0)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.env = env
        self.student = parallel.wrap(FastLoss(model, "full"), args, env)
        self.optimizer = make_optimizer(self.student, args)
        shape = (1, args.seq_len)
        self.x = torch.randint(config.vocab_size, shape, device=env.device)

    def step(self):
        """One step; its seconds."""
        started = time.perf_counter()
        valid = torch.ones_like(self.x, dtype=torch.bool)
        with self.env.autocast():
            total, *_ = self.student(self.x, self.x, lambda losses: valid, count=valid.numel())
        total.backward()
        self.optimizer.step()
        parallel.clear_gradients(self.student, self.optimizer)
        self.env.total(torch.zeros(1, device=self.env.device)).item()  # all ranks have ended it
        return time.perf_counter() - started


def gathered(trainer, env, folder):
    """Seconds of one save as one file."""
    dist.barrier()
    started = time.perf_counter()
    model_state, optimizer_state = parallel.full_state(trainer.student, trainer.optimizer)
    if env.main:
        with files.renamed_when_whole(folder / "gathered.pt") as temporary:
            torch.save({"model": model_state, "optimizer": optimizer_state}, temporary)
    dist.barrier()
    return time.perf_counter() - started


def sharded(trainer, states, number):
    """(seconds that training stands still, seconds until all is on the disk, those of the steps
    meanwhile)."""
    dist.barrier()
    started = time.perf_counter()
    states.save(trainer.student, trainer.optimizer, {"step": number}, extra={})
    dist.barrier()
    still = time.perf_counter() - started
    steps = []
    while states.env.any_rank(not states.saving.done())[0]:
        steps.append(trainer.step())
    whole = time.perf_counter() - started
    states.wait()
    return still, whole, steps


def main():
    args = arguments()
    env = Env(args)
    if env.world == 1:
        raise UserError("one rank saves one file; start this under torchrun")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or env.from_main(lambda: temporary))
        if env.main:
            changes.make_folder(folder)
        env.wait()
        measure(args, env, folder)
        env.wait()


def measure(args, env, folder):
    trainer = Trainer(args, env)
    steps = [trainer.step() for _ in range(6)][1:]
    before = [gathered(trainer, env, folder) for _ in range(args.saves)]
    states = States(folder, env, minutes=None)
    after = [sharded(trainer, states, number + 1) for number in range(args.saves)]
    if not env.main:
        return
    still, whole, during = zip(*after)
    during = [seconds for each in during for seconds in each]
    rows = {
        "parameters": f"{trainer.parameters:,}",
        "ranks": f"{env.world}, {args.parallel}",
        "a step": seconds_of(steps),
        "stands still, gathered": seconds_of(before),
        "stands still, sharded": seconds_of(still),
        "on the disk after, sharded": seconds_of(whole),
        f"a step meanwhile ({len(during)} of them)": seconds_of(during),
    }
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def seconds_of(values):
    if not values:
        return "none"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.2f} s ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    cli(main)
