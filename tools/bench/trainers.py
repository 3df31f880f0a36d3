"""What the mixin of integrations/transformers.py costs a step of Trainer and of SFTTrainer.

The same model, texts and seeds, with the trainer's own loss and with the selection; the rows take
turns. A step is from the end of one to the end of the next, so loading and counting are in it.
"""

import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from common.errors import UserError
from slm import Selection
from tools.bench.rows import resident
from tools.bench.timing import ratio

STEPS = 4  # of a round, after one of warm-up
ROWS = ("trainer", "selective", "sft", "selective sft")
OWN = {"selective": "trainer", "selective sft": "sft"}  # the row whose loss is its own


def bench_trainers(args, env):
    """{row: {step_s, ratio, low, high, peak_memory_bytes}}; ratios to the trainer's own loss.

    The peak is that of a process of its own for each row, above what it holds before training.
    """
    if env.device.type != "cpu":
        raise UserError("trainers: are measured on a CPU; leave --device out")
    with tempfile.TemporaryDirectory() as folder:
        trainers = {row: trainer_of(row, args, folder) for row in ROWS}
        seconds = {row: [] for row in ROWS}
        peaks = {row: in_a_process_of_its_own(row, args, folder) for row in ROWS}
        for round_ in range(1 + args.repeats):
            for row in ROWS if round_ % 2 else reversed(ROWS):
                took = step_seconds(trainers[row], args)
                if round_:
                    seconds[row].append(took)
    results = {}
    for row in ROWS:
        middle, low, high = ratio(seconds[row], seconds[OWN.get(row, row)])
        results[row] = {
            "step_s": statistics.median(seconds[row]),
            "ratio": middle,
            "low": low,
            "high": high,
            "peak_memory_bytes": peaks[row],
        }
        print(
            f"{row:14} {results[row]['step_s']:.3f} s a step, {middle:.3f} of its own loss "
            f"({low:.3f}-{high:.3f}), peak {results[row]['peak_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    return results


def in_a_process_of_its_own(row, args, folder):
    """The peak memory in bytes of one round of a row."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_of, row, args, folder).result()


def peak_of(row, args, folder):
    torch.set_num_threads(args.threads or torch.get_num_threads())
    trainer = trainer_of(row, args, folder)
    before = resident()
    step_seconds(trainer, args)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def step_seconds(trainer, args):
    """Seconds of a step, the mean over STEPS; CPU seconds with one thread."""
    trainer.ends.clear()
    trainer.clock = time.process_time if args.threads == 1 else time.perf_counter
    trainer.train()
    return (trainer.ends[-1] - trainer.ends[0]) / STEPS


def trainer_of(row, args, folder):
    """A trainer of a fresh small Llama on random tokens, with `ends`: when each step ended."""
    import datasets
    import transformers
    import trl

    from integrations.transformers import SelectiveMixin

    own = trl.SFTTrainer if "sft" in row else transformers.Trainer
    selective = row in OWN

    class Timed(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            trainer.ends.append(trainer.clock())

    shape = {"output_dir": folder, "max_steps": 1 + STEPS, "report_to": [], "use_cpu": True}
    shape |= {"per_device_train_batch_size": args.batch_size, "save_strategy": "no"}
    shape |= {"logging_strategy": "no", "disable_tqdm": True, "bf16": False}
    if "sft" in row:
        arguments = trl.SFTConfig(**shape, max_length=None)
    else:
        arguments = transformers.TrainingArguments(**shape)
    texts = datasets.Dataset.from_list(rows_of_text(args, selective))
    more = {"selection": Selection(args.k)} if selective else {}
    kind = type("Selective", (SelectiveMixin, own), {}) if selective else own
    if "sft" in row:
        more["processing_class"] = tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    trainer = kind(model=model, args=arguments, train_dataset=texts, callbacks=[Timed()], **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.ends = []
    return trainer


def rows_of_text(args, selective):
    """Random tokens, each of them a target, for one round of steps; with losses to rank by."""
    draw = torch.Generator().manual_seed(0)
    draw_losses = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(args.batch_size * (1 + STEPS)):
        ids = torch.randint(3, args.vocab_size, (args.seq_len,), generator=draw).tolist()
        row = {"input_ids": ids, "labels": ids}
        if selective:
            row["ref_loss"] = torch.rand(args.seq_len, generator=draw_losses).tolist()
        rows.append(row)
    return rows


def tokenizer():
    """The least that SFTTrainer asks for: it tokenises nothing here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<pad>": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="a"
    )
