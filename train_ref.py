"""Stage 1: plain causal training. It makes the reference model (Rho-1, section 2.2).

    python train_ref.py                       # the demo's reference: makes all that is missing
    python train_ref.py --data data/curated --init TinyLlama/TinyLlama_v1.1 --out out/ref \\
        --seq-len 2048 --batch-size 64 --micro-batch-size 8 --lr 5e-5 --epochs 3     # one GPU
    torchrun --nproc-per-node 8 train_ref.py ...                                     # eight
Interrupted, the same command goes on. `diff train_ref.py train_slm.py` shows the method.
"""

import math
import time

from common.device import Env  # first: it sets how torch's threads wait

from tqdm import tqdm

import demo.chain
from common.command_line import Parser
from common.errors import cli
from data import Loader, TokenSet
from hf import models
from training import parallel
from training.arguments import add_arguments, parse, settle
from training.identity import hashes_of
from training.loss import FastLoss
from training.meter import Meter
from training.optimizer import clip_gradients, finite_norm, lr_at, make_optimizer
from training.run import Run
from training.validation import is_due, validate, validation_sets


def arguments(argv=None):
    parser = Parser(__doc__)
    add_arguments(parser)
    return parse(parser, argv)


def main():
    args = arguments()
    demo.chain.ensure(args, "ref")
    settle(args)
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    val = validation_sets(args, data, env)
    loader = Loader(data.n_windows(args.seq_len), args.batch_size, args.seed)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * loader.n_windows / args.batch_size)
    model, tokenizer_from, init = models.initial_model(args, data, env)
    inputs = {**hashes_of(data, val), "init": init}
    run = Run(args, inputs, env, model, tokenizer_from)
    if not run.summary:
        train(args, env, run, data, val, loader, model)
    run.show_summary()


def train(args, env, run, data, val, loader, model):
    student = parallel.wrap(FastLoss(model, args.head), args, env)
    optimizer = make_optimizer(student, args)
    run.restore(student, optimizer)
    T = args.seq_len

    bar = tqdm(total=args.steps, initial=run.step, desc=args.out, unit="step", disable=not env.main)
    if val and run.step == 0 and is_due(0, args):
        run.record_start(validate(student, val, args, env), bar)
    for step in range(run.step, args.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        # Of all ranks, in one order: rank r of R takes number r, r + R, ...
        micro_batches = loader.micro_batches(step, args.micro_batch_size)
        mine = range(env.rank, len(micro_batches), env.world)
        # Dividing by how many tokens carry loss, over all micro-batches and ranks, makes the loss
        # the exact mean, however they are spread.
        counts = {i: int(data.valid(micro_batches[i], T).sum()) for i in mine}
        divisor = max(1, env.count(counts.values()))
        meter = Meter(env, data.kinds)
        for i in mine:
            windows = micro_batches[i]
            x, y, valid = map(env.tensor, data.batch(windows, T))

            def keep(losses, valid=valid):
                return valid

            parallel.sync_gradients(student, last=i == mine[-1])
            with env.autocast():
                total, losses, kept = student(x, y, keep, count=counts[i])
            # DDP and FSDP average over the ranks: the factor `world` undoes that.
            (total * (env.world / divisor)).backward()
            meter.add(losses, valid, kept, data.labels(windows, T))
        grad_norm = clip_gradients(student, args)
        optimizer.step()
        parallel.clear_gradients(student, optimizer)
        parallel.collect_garbage(step, env)
        grad_norm = finite_norm(grad_norm, args, step)

        record = {"tokens_seen": data.n_read(loader.windows(step), T), **meter.read()}
        record |= {"grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}
        seconds = time.perf_counter() - started
        done = step + 1
        if val and is_due(done, args):
            record |= validate(student, val, args, env)
        run.record_step(done, record, seconds, bar)
        run.save_if_due(done, student, optimizer)
    bar.close()
    run.finish(student)


if __name__ == "__main__":
    cli(main)
