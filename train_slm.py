"""Stage 3: selective training (Rho-1, section 2.2): every token is read, the top k carry loss.

    python train_slm.py --k 0.6               # the demo: makes all that is missing
    python train_slm.py --data data/owm --init TinyLlama/TinyLlama_v1.1 --out out/slm --lr 8e-5 \\
        --ref-loss out/owm/ref_loss.bin --seq-len 2048 --batch-size 512 --micro-batch-size 8
    torchrun --nproc-per-node 8 train_slm.py ...                                     # eight
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
from training.method_flags import add_method, drop_what_followed, settle_method
from training.optimizer import clip_gradients, finite_norm, lr_at, make_optimizer
from training.run import Run
from training.selector import Selector
from training.validation import is_due, validate, validation_sets


def arguments(argv=None):
    parser = Parser(__doc__)
    add_method(parser)
    add_arguments(parser)
    args = parse(parser, argv, drop_what_followed)
    return settle_method(args)


def main():
    args = arguments()
    demo.chain.ensure(args, "slm")
    settle(args)
    env = Env(args)
    data = TokenSet(args.data, args.verify)
    val = validation_sets(args, data, env)
    loader = Loader(data.n_windows(args.seq_len), args.batch_size, args.seed)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * loader.n_windows / args.batch_size)
    selector = Selector(args, data, env, val)
    model, tokenizer_from, init = models.initial_model(args, data, env)
    inputs = {**hashes_of(data, val), "init": init, **selector.started_from(init)}
    run = Run(args, inputs, env, model, tokenizer_from, selector)
    if not run.summary:
        train(args, env, run, data, val, loader, model, selector)
    run.show_summary()
    demo.chain.report(args, env)


def train(args, env, run, data, val, loader, model, selector):
    student = parallel.wrap(FastLoss(model, args.head, args.backward), args, env)
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
        # The divisor is one for all micro-batches and ranks, however tokens are spread over them:
        # how many carry loss, or what else a method divides by.
        counts, divisor = selector.begin(student, step, micro_batches)
        meter = Meter(env, data.kinds, args.score, histogram=bool(args.track))
        for i in mine:
            windows = micro_batches[i]
            x, y, valid = map(env.tensor, data.batch(windows, T))
            choice = selector.choice(step, i, windows, valid)

            parallel.sync_gradients(student, last=i == mine[-1])
            with env.autocast():
                total, losses, kept = student(x, y, choice.keep, choice.wants, counts[i])
            # DDP and FSDP average over the ranks: the factor `world` undoes that.
            (total * (env.world / divisor)).backward()
            ranked = choice.ranked()
            meter.add(losses, valid, kept, data.labels(windows, T), ranked, choice.wrong)
        selector.finish(student)  # where only the losses told the divisor
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
