"""The text side of tools/bench.py: the tokenizer beside `tokenizers`, prepare.py beside the bare tokenizer, generation
beside transformers."""

import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from evaluation.pinned import read_rows
from tools.bench.__main__ import interleaved, ratio
from tools.bench.rows import resident


def tokenizer(args, env):
    """Megabytes of text per second, of ours and of tokenizers' encode_batch_fast, and how many documents got different
    ids (0 is right). Texts: English, the manual pages inside Python; LaTeX, if `--data-dir` has the Stacks project.
    Vocabularies: one trained here, and `--model`'s."""
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read once, by the first use of tokenizers
    import tokenizers

    from hf.tokenizer import Tokenizer, train_bpe

    texts = {"English": list(pydoc_data.topics.topics.values())}
    latex = Path(args.data_dir or "") / "corpus" / "stacks_project.jsonl"
    if args.data_dir and latex.exists():
        texts["LaTeX"] = [row["text"] for row in read_rows(latex)[:120]]
    vocabularies = {
        "trained, 4096": train_bpe(
            (line for doc in texts["English"] for line in doc.splitlines()), 4096
        )
    }
    if args.model:
        vocabularies[args.model] = Tokenizer.load(args.model)
    rows = []
    for name, ours in vocabularies.items():
        with tempfile.TemporaryDirectory() as folder:
            ours.save(folder)  # so that a tokenizer.model has its tokenizer.json
            theirs = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        theirs.encode_special_tokens = (
            True  # special tokens in the text are text, as they are for ours
        )
        rows += [
            {"vocab": name, "text": kind, **race(ours, theirs, docs, args, env)}
            for kind, docs in texts.items()
        ]
    for row in rows:
        print(
            "tokenizer ({vocab}, {text}): ours {ours:.2f} MB/s, tokenizers {tokenizers:.2f} MB/s: {ratio:.2f}x "
            "({low:.2f}-{high:.2f}), {different} documents differ".format(**row)
        )
    return rows


def race(ours, theirs, docs, args, env):
    """One row: both tokenizers take turns at the same documents."""
    size, ids = sum(len(doc.encode()) for doc in docs) / 1e6, {}
    with ThreadPoolExecutor(args.threads) as pool:

        def with_ours():
            ids["ours"] = (
                ours.encode_batch(docs) if args.threads == 1 else list(pool.map(ours.encode, docs))
            )

        def with_theirs():
            ids["theirs"] = [
                e.ids for e in theirs.encode_batch_fast(docs, add_special_tokens=False)
            ]

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


def prepare(args, env):
    """prepare.py from parquet to a finished token set beside the bare tokenizer: megabytes of text per CPU second, and the
    peak memory, with `--sizes` megabytes of LaTeX (the Stacks project, repeated). One worker, which is the process that
    reads and writes, too; its start counts. "clean": with --decontaminate gsm8k math."""
    import pyarrow
    import pyarrow.parquet

    from hf.tokenizer import Tokenizer

    texts = [
        row["text"] for row in read_rows(Path(args.data_dir) / "corpus" / "stacks_project.jsonl")
    ]
    ours, rows = Tokenizer.load(args.model), []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file, written, number = Path(folder) / "text.parquet", 0, 0
            with pyarrow.parquet.ParquetWriter(
                file, pyarrow.schema([("text", pyarrow.string())])
            ) as writer:
                while written < size * 1e6:
                    part = [texts[(number + i) % len(texts)] for i in range(64)]
                    writer.write_table(pyarrow.table({"text": part}))
                    written, number = (
                        written + sum(len(text.encode()) for text in part),
                        number + 64,
                    )
            row = {"megabytes": written / 1e6}
            for name, more in (
                ("prepared", []),
                ("clean", ["--decontaminate", "gsm8k", "math", "--data-dir", args.data_dir]),
            ):
                started = time.process_time()
                ours.encode_batch(texts)
                row["bare"] = (
                    sum(len(text.encode()) for text in texts)
                    / 1e6
                    / (time.process_time() - started)
                )
                child = subprocess.Popen(
                    [
                        sys.executable,
                        "prepare.py",
                        "--source",
                        file,
                        "--tokenizer",
                        args.model,
                        "--workers",
                        "1",
                        "--out",
                        Path(folder) / name,
                        *more,
                    ],
                    cwd=Path(__file__).parents[2],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                _, status, used = os.wait4(child.pid, 0)
                assert status == 0, status
                row[name] = row["megabytes"] / (used.ru_utime + used.ru_stime)
                row[name + "_ratio"], row[name + "_peak_bytes"] = (
                    row[name] / row["bare"],
                    used.ru_maxrss * 1024,
                )
        rows.append(row)
        print(
            "prepare ({megabytes:.0f} MB): {prepared:.1f} MB/s, {prepared_ratio:.2f} of the bare tokenizer's rate, peak "
            "{prepared_peak_bytes:.2e} bytes; with --decontaminate {clean:.1f} MB/s, {clean_ratio:.2f}, "
            "{clean_peak_bytes:.2e} bytes".format(**row),
            flush=True,
        )
    return rows


def generate(args, env, n=8, new_tokens=32):
    """Generated tokens per second on 8-shot GSM8K prompts, beside transformers' batched generate. EOS ends a text, and
    nothing else does, so both sides make the same tokens. `identical`: prompts with exactly transformers' ids."""
    from transformers import AutoModelForCausalLM

    from evaluation import generate, tasks
    from hf import checkpoint
    from hf.tokenizer import Tokenizer

    tokens, device = Tokenizer.load(args.model), env.device
    prompts = [
        generate.encode_prompt(tokens, tasks.prompt(e))
        for e in tasks.load("gsm8k", args.data_dir, n)
    ]
    ours = checkpoint.load(args.model, env.dtype, device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=env.dtype).to(device).eval()
    eos = generate.end_ids(ours, tokens)
    longest = max(map(len, prompts))
    padded = torch.tensor([[min(eos)] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    ids, peak = {}, {}

    def with_transformers():
        with torch.inference_mode():
            out = theirs.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=sorted(eos),
                pad_token_id=min(eos),
            )[:, longest:].tolist()
        ends = [
            next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in out
        ]
        return [row[:end] for row, end in zip(out, ends)]

    def with_ours(share):
        texts = dict(
            generate.generate(
                ours,
                tokens,
                prompts,
                new_tokens,
                share,
                batch_tokens=1 << 16,
                compiled=device.type == "cuda",
            )
        )
        return [texts[i].ids for i in range(len(prompts))]

    def measured(name, run):
        def call():
            before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
            env.peak_memory(reset=True)
            ids[name] = run()
            peak.setdefault(name, []).append(max(0, env.peak_memory() - before))

        return call

    base = "transformers, batched"
    runs = {
        base: with_transformers,
        "ours, shared prefix": lambda: with_ours(True),
        "ours, no shared prefix": lambda: with_ours(False),
    }
    seconds = interleaved({name: measured(name, run) for name, run in runs.items()}, args, env)
    rows = []
    for name in runs:
        faster, low, high = ratio(seconds[base], seconds[name])
        n_new = sum(map(len, ids[name]))
        rows.append(
            {
                "variant": name,
                "prompts": len(prompts),
                "prompt_tokens": sum(map(len, prompts)),
                "new_tokens": n_new,
                "seconds": statistics.median(seconds[name]),
                "tok_per_s": n_new / statistics.median(seconds[name]),
                "ratio": faster,
                "low": low,
                "high": high,
                "peak_memory_bytes": int(statistics.median(peak[name][1:])),
                "identical": sum(a == b for a, b in zip(ids[name], ids[base])),
            }
        )
        print(
            "generate ({variant}): {tok_per_s:.1f} tok/s, {ratio:.2f}x ({low:.2f}-{high:.2f}), {identical} of "
            "{prompts} texts identical, peak {peak_memory_bytes:.2e} bytes above the models".format(
                **rows[-1]
            )
        )
    return rows
