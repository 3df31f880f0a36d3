"""The text side of tools.bench.

The tokenizer beside `tokenizers`, prepare.py beside the bare tokenizer, generation beside
transformers.
"""

import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch

from evaluation.pinned import read_rows
from tools.bench.rows import resident
from tools.bench.timing import interleaved, ratio

# --------------------------------------------------------------------------------------------------
# the tokenizer


def tokenizer(args, env):
    """Megabytes of text per second of our tokenizer and of tokenizers' encode_batch_fast.

    `different` counts the documents that got other ids (0 is right). Texts: English, the manual
    pages inside Python; LaTeX, if `--data-dir` has the Stacks project. Vocabularies: one trained
    here, and `--model`'s.
    """
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read once, by the first use of tokenizers
    from hf.tokenizer import Tokenizer, train_bpe

    texts = {"English": list(pydoc_data.topics.topics.values())}
    if args.data_dir and stacks_project(args).exists():
        texts["LaTeX"] = [row["text"] for row in read_rows(stacks_project(args))[:120]]
    lines = (line for doc in texts["English"] for line in doc.splitlines())
    vocabularies = {"trained, 4096": train_bpe(lines, 4096)}
    if args.model:
        vocabularies[args.model] = Tokenizer.load(args.model)
    rows = []
    for name, ours in vocabularies.items():
        theirs = same_in_tokenizers(ours)
        for kind, docs in texts.items():
            row = {"vocab": name, "text": kind, **race(ours, theirs, docs, args, env)}
            rows.append(row)
    for row in rows:
        print(
            "tokenizer ({vocab}, {text}): ours {ours:.2f} MB/s, tokenizers {tokenizers:.2f} MB/s: "
            "{ratio:.2f}x ({low:.2f}-{high:.2f}), {different} documents differ".format(**row)
        )
    return rows


def stacks_project(args):
    return Path(args.data_dir) / "corpus" / "stacks_project.jsonl"


def same_in_tokenizers(ours):
    """Our tokenizer as one of `tokenizers`."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)  # so that a tokenizer.model has its tokenizer.json
        theirs = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    # Special tokens in the text are text, as they are for ours.
    theirs.encode_special_tokens = True
    return theirs


def race(ours, theirs, docs, args, env):
    """One row: both tokenizers take turns at the same documents."""
    size = sum(len(doc.encode()) for doc in docs) / 1e6
    ids = {}
    with ThreadPoolExecutor(args.threads) as pool:

        def with_ours():
            if args.threads == 1:
                ids["ours"] = ours.encode_batch(docs)
            else:
                ids["ours"] = list(pool.map(ours.encode, docs))

        def with_theirs():
            encoded = theirs.encode_batch_fast(docs, add_special_tokens=False)
            ids["theirs"] = [e.ids for e in encoded]

        seconds = interleaved({"ours": with_ours, "theirs": with_theirs}, args, env)
    faster, low, high = ratio(seconds["theirs"], seconds["ours"])
    return {
        "megabytes": size,
        "threads": args.threads,
        "ours": size / statistics.median(seconds["ours"]),
        "tokenizers": size / statistics.median(seconds["theirs"]),
        "ratio": faster,
        "low": low,
        "high": high,
        "different": sum(list(a) != b for a, b in zip(ids["ours"], ids["theirs"])),
    }


# --------------------------------------------------------------------------------------------------
# prepare.py


def prepare(args, env):
    """prepare.py from parquet to a finished token set, beside the bare tokenizer.

    Megabytes of text per CPU second, and the peak memory, with `--sizes` megabytes of LaTeX (the
    Stacks project, repeated). There is one worker, the process that reads and writes; its start
    counts. "clean": with --decontaminate gsm8k math.
    """
    from hf.tokenizer import Tokenizer

    variants = {
        "prepared": [],
        "clean": ["--decontaminate", "gsm8k", "math", "--data-dir", args.data_dir],
    }
    texts = [row["text"] for row in read_rows(stacks_project(args))]
    ours = Tokenizer.load(args.model)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "text.parquet"
            row = {"megabytes": write_parquet(file, texts, size * 1e6) / 1e6}
            for name, flags in variants.items():
                row["bare"] = bare_rate(ours, texts)
                flags = [*flags, "--tokenizer", args.model, "--out", Path(folder) / name]
                seconds, peak = run_prepare(file, flags)
                row[name] = row["megabytes"] / seconds
                row[f"{name}_ratio"] = row[name] / row["bare"]
                row[f"{name}_peak_bytes"] = peak
        rows.append(row)
        print(
            "prepare ({megabytes:.0f} MB): {prepared:.1f} MB/s, {prepared_ratio:.2f} of the bare "
            "tokenizer's rate, peak {GB[0]:.2f} GB; with --decontaminate {clean:.1f} MB/s, "
            "{clean_ratio:.2f}, {GB[1]:.2f} GB".format(
                **row, GB=[row[f"{name}_peak_bytes"] / 1e9 for name in ("prepared", "clean")]
            ),
            flush=True,
        )
    return rows


def write_parquet(path, texts, wanted):
    """At least `wanted` bytes of the texts, over and over, 64 to a row group; returns how many."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    endless = cycle(texts)
    written = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while written < wanted:
            part = list(islice(endless, 64))
            writer.write_table(pyarrow.table({"text": part}))
            written += sum(len(text.encode()) for text in part)
    return written


def bare_rate(ours, texts):
    """Megabytes per CPU second of the tokenizer alone."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    started = time.process_time()
    ours.encode_batch(texts)
    return size / (time.process_time() - started)


def run_prepare(file, flags):
    """(CPU seconds, peak memory in bytes) of prepare.py, a process of its own with one worker."""
    child = subprocess.Popen(
        [sys.executable, "prepare.py", "--source", file, "--workers", "1", *flags],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, status
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------
# generation


def generate(args, env, n=8, new_tokens=32):
    """Generated tokens per second on 8-shot GSM8K prompts, beside transformers' batched generate.

    EOS ends a text, and nothing else does, so both sides make the same tokens. `identical`: prompts
    with exactly transformers' ids.
    """
    from evaluation import generate, tasks
    from hf import checkpoint
    from hf.tokenizer import Tokenizer

    tokens = Tokenizer.load(args.model)
    problems = tasks.load("gsm8k", args.data_dir, n)
    prompts = [generate.encode_prompt(tokens, tasks.prompt(problem)) for problem in problems]
    model = checkpoint.load(args.model, env.dtype, env.device).eval()

    def with_ours(share_prefix):
        texts = generate.generate(
            model,
            tokens,
            prompts,
            new_tokens,
            share_prefix,
            batch_tokens=1 << 16,
            compiled=env.device.type == "cuda",
        )
        texts = dict(texts)
        return [texts[i].ids for i in range(len(prompts))]

    base = "transformers, batched"
    eos = generate.end_ids(model, tokens)
    runs = {
        base: transformers_generate(args, env, prompts, eos, new_tokens),
        "ours, shared prefix": lambda: with_ours(True),
        "ours, no shared prefix": lambda: with_ours(False),
    }
    seconds, ids, peak = generated(runs, args, env)
    rows = []
    for name in runs:
        faster, low, high = ratio(seconds[base], seconds[name])
        n_new = sum(map(len, ids[name]))
        row = {
            "variant": name,
            "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": n_new,
            "seconds": statistics.median(seconds[name]),
            "tok_per_s": n_new / statistics.median(seconds[name]),
            "ratio": faster,
            "low": low,
            "high": high,
            "peak_memory_bytes": int(statistics.median(peak[name][1:])),  # without the warm-up's
            "identical": sum(a == b for a, b in zip(ids[name], ids[base])),
        }
        rows.append(row)
        print(
            "generate ({variant}): {tok_per_s:.1f} tok/s, {ratio:.2f}x ({low:.2f}-{high:.2f}), "
            "{identical} of {prompts} texts identical, peak {GB:.2f} GB above the models".format(
                **row, GB=row["peak_memory_bytes"] / 1e9
            )
        )
    return rows


def transformers_generate(args, env, prompts, eos, new_tokens):
    """A function that returns transformers' new ids for each prompt, up to the first of `eos`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=env.dtype)
    model = model.to(env.device).eval()
    pad = min(eos)
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    padded = torch.tensor(padded, device=env.device)
    mask = torch.tensor(mask, device=env.device)

    @torch.inference_mode()
    def run():
        out = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(eos),
            pad_token_id=pad,
        )
        return [up_to_end(row, eos) for row in out[:, longest:].tolist()]

    return run


def up_to_end(ids, eos):
    """The ids up to the first of `eos`, which is kept; what follows it is padding."""
    for i, token in enumerate(ids):
        if token in eos:
            return ids[: i + 1]
    return ids


def generated(runs, args, env):
    """Of the functions in `runs`, by name: seconds of each round, the ids made, peaks in bytes.

    The peaks, above what was allocated before, are of the warm-up and of each round.
    """
    ids = {}
    peak = {name: [] for name in runs}

    def measured(name, run):
        def call():
            before = resident()
            if env.device.type == "cuda":
                before = torch.cuda.memory_allocated()
            env.peak_memory(reset=True)
            ids[name] = run()
            peak[name].append(max(0, env.peak_memory() - before))

        return call

    calls = {name: measured(name, run) for name, run in runs.items()}
    return interleaved(calls, args, env), ids, peak
