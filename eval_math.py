"""Stage 4: the maths evaluation of the Rho-1 paper (tables 1 and 2), few-shot chain of thought or with tools.

    python eval_math.py --model out/demo/slm --tasks demo                               # the demo's exact match
    python eval_math.py --model microsoft/rho-math-1b-v0.1 --tasks gsm8k math --out out/rho-1b    # one GPU
    torchrun --nproc-per-node 8 eval_math.py ...                                        # the problems shared out
    python eval_math.py --model microsoft/rho-math-1b-interpreter-v0.1 --tasks math --mode tool --out out/rho-1b-int
    python eval_math.py --regrade outputs.jsonl --tasks math --out out/again            # grades a file, no model needed

Writes OUT/TASK.jsonl (a line per problem: verdict and text), OUT/results.json and OUT/results.md. Every finished answer
is kept at once: interrupted, it goes on where it stopped, and the files end the same.
"""

import argparse
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from common.device import Env  # first: it sets how torch's threads wait

import torch
from tqdm import tqdm

from common.errors import UserError, cli
from common.files import read_json, write_atomic
from evaluation import grading, tasks
from evaluation import results as report
from evaluation.generate import Decoder, common_prefix, encode_prompt, stop_strings
from evaluation.sandbox import Sandbox, program_of, result_text
from hf import checkpoint, downloads
from hf.tokenizer import Tokenizer

MAX_CALLS = 4  # of the interpreter, per problem
NEW_TOKENS = {"demo": 48}  # else 1,024: per call of the model
IDENTITY = (
    "model_hash",
    "prompt_hash",
    "mode",
    "dtype",
    "max_new_tokens",
)  # what decides the answers


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("input")
    group.add_argument("--model", help="model to evaluate (folder or hub id)")
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument(
        "--tasks",
        nargs="+",
        default=["demo"],
        metavar="NAME",
        help=f"which test sets (default: demo): {' '.join(tasks.TASKS)}",
    )
    group.add_argument(
        "--data-dir",
        help="folder with eval/ and prompts/ (default: download them); "
        "for demo the folder of test.jsonl (default: data/demo)",
    )
    group.add_argument("--limit", type=int, help="only the first so many problems of each task")
    group.add_argument(
        "--regrade",
        metavar="FILE",
        help="grade this file of generations again, for the one task named",
    )
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--mode",
        default="cot",
        choices=list(tasks.STOP),
        help="cot: few-shot chain of thought; tool: zero-shot, the model's Python is run",
    )
    group.add_argument(
        "--max-new-tokens", type=int, help="per call of the model (default: 1024; demo: 48)"
    )
    group.add_argument(
        "--batch-tokens",
        type=int,
        help="tokens in the KV cache, rows times their length "
        "(default: what 1 GB holds, on a GPU 40%% of the free memory)",
    )
    group.add_argument(
        "--strict-sandbox",
        action="store_true",
        help="tool: refuse to run programs where the system cannot enforce every limit",
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the weights and the forward pass; auto: bfloat16 on a GPU, float32 on CPU",
    )
    group.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="compile the one-token step; auto: on a GPU",
    )
    group.add_argument("--threads", type=int, help="CPU threads per rank")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", help="folder for the results (default: MODEL/eval, taken up again without a flag)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with, or show, what is in --out"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start the named tasks over in --out"
    )
    return parser.parse_args()


def main():
    args = arguments()
    args.tasks = list(
        dict.fromkeys(name for names in args.tasks for name in names.split(",") if name)
    )
    for name in args.tasks:
        tasks.check(name)
    for flag in ("limit", "max_new_tokens", "batch_tokens", "threads"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(
                f"--{flag.replace('_', '-')}: got {getattr(args, flag)}, wanted at least 1"
            )
    if args.regrade:
        return regrade(args)
    if not args.model:
        raise UserError("--model: got none, wanted a model's folder or hub id (or --regrade FILE)")
    if args.mode == "tool" and "demo" in args.tasks:
        raise UserError("--mode tool: demo has chain of thought only; name other --tasks")
    env = Env(args)
    folder = env.main_first(lambda: downloads.resolve(args.model, args.revision))
    if not args.out and not Path(args.model).is_dir():
        raise UserError(f"--out: name a folder for the results of {args.model}")
    out = Path(args.out or folder / "eval")
    model_hash = env.from_main(lambda: checkpoint.model_hash(folder))
    tokenizer = Tokenizer.load(folder)
    model = cache(
        lambda: checkpoint.load(folder, env.dtype, env.device).eval()
    )  # loaded when the first prompt needs it
    for task in args.tasks:
        evaluate(task, args, env, folder, model_hash, out, tokenizer, model)
    if env.main:
        results = read_json(out / "results.json", "results")
        write_atomic(out / "results.md", report.markdown(results, args.model))
        print(report.table(results))


def regrade(args):
    if len(args.tasks) != 1:
        raise UserError(
            f"--regrade: got --tasks {' '.join(args.tasks)}, wanted the one task that the file answers"
        )
    task, out = args.tasks[0], Path(args.out or Path(args.regrade).parent / "regraded")
    settings = {"regraded": args.regrade, "mode": args.mode}
    if task == "demo":
        rows = tasks.read_rows(args.regrade)
        for line, row in enumerate(rows, 1):
            if not isinstance(row.get("text"), str) or "gt" not in row:
                raise UserError(
                    f"{args.regrade}, sample {line}: got fields {' '.join(row)}, wanted gt and text"
                )
        verdicts = [demo_verdict(row["text"], row["gt"]) for row in rows]
        results = report.write_results(task, [row["text"] for row in rows], verdicts, out, settings)
    else:
        results = report.regrade(args.regrade, task, out, settings, result_name(task, args.mode))
    write_atomic(out / "results.md", report.markdown(results, args.regrade))
    print(report.table(results))


def result_name(task, mode):
    return task if mode == "cot" else f"{task}-{mode}"


# ---------------------------------------------------------------------------------------------------------------------
# the model


def extra_eos(folder):
    """Ids that generation_config.json ends a text with."""
    path = folder / "generation_config.json"
    eos = read_json(path, "model").get("eos_token_id") if path.exists() else None
    return eos if isinstance(eos, list) else [eos]


def batch_tokens(args, env, config):
    """How many tokens the KV cache holds: as asked for, or 1 GB on CPU and 40% of the free memory on a GPU."""
    if args.batch_tokens:
        return args.batch_tokens
    free = 0.4 * torch.cuda.mem_get_info(env.device)[0] if env.device.type == "cuda" else 1e9
    per_token = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * env.dtype.itemsize
    )
    return max(4096, min(int(free / per_token), 65536 if env.device.type == "cpu" else 1 << 18))


# ---------------------------------------------------------------------------------------------------------------------
# one task


def evaluate(task, args, env, folder, model_hash, out, tokenizer, model):
    """Answer what is not answered yet, grade, and write the task's files."""
    examples = tasks.load(task, demo_file(args) if task == "demo" else args.data_dir)
    prompts = [tasks.prompt(example, args.mode) for example in examples]
    name = result_name(task, args.mode)
    settings = {
        "model": args.model,
        "model_hash": model_hash[:16],
        "mode": args.mode,
        "prompt_hash": hashlib.sha256("\0".join(prompts).encode()).hexdigest()[
            :16
        ],  # of all, whatever the --limit
        "dtype": str(env.dtype).removeprefix("torch."),
        "device": env.device.type,
        "max_new_tokens": args.max_new_tokens or NEW_TOKENS.get(task, 1024),
        "batch_tokens": args.batch_tokens or "auto",
    }
    examples, prompts = examples[: args.limit], prompts[: args.limit]
    texts = env.from_main(lambda: earlier_answers(out, name, settings, args))
    todo = [i for i in range(len(examples)) if i not in texts]
    grader = Grader(task, examples)
    try:
        for i in set(range(len(examples))) & set(texts):
            grader.add(i, texts[i])
        if todo:
            ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
            prefix = ids[0][: common_prefix(ids)]
            mine = sorted(todo, key=lambda i: (-len(ids[i]), i))[env.rank :: env.world]
            stop = end_of_demo if task == "demo" else stop_strings(tasks.STOP[args.mode])
            compiled = args.compile == "on" or args.compile == "auto" and env.device.type == "cuda"
            decoder = Decoder(
                model(),
                tokenizer,
                settings["max_new_tokens"],
                stop,
                extra_eos(folder),
                prefix,
                batch_tokens(args, env, model().config),
                compiled,
            )
            answers = (
                chain_of_thought(decoder, {i: ids[i] for i in mine})
                if args.mode == "cot"
                else with_tools(
                    decoder,
                    {i: prompts[i] for i in mine},
                    lambda text: encode_prompt(tokenizer, text),
                    args.strict_sandbox,
                )
            )
            texts |= keep(
                answers, out, name, settings, grader, env, len(mine), len(examples) - len(todo)
            )
            env.wait()
        if env.main:
            for i, text in read_answers(out, name).items() if todo else ():
                if i < len(examples) and i not in texts:
                    texts[i] = text
                    grader.add(i, text)
            verdicts = [grader.verdict(i) for i in range(len(examples))]
            texts = [texts[i] for i in range(len(examples))]
            report.write_results(task, texts, verdicts, out, settings, name)
            for path in out.glob(f"{name}.partial-*.jsonl"):
                path.unlink()
            if task == "demo" and not args.limit and (folder / "summary.json").exists():
                exact_match = sum(v["strict"] for v in verdicts) / max(len(verdicts), 1)
                note_exact_match(folder / "summary.json", exact_match)
    finally:
        grader.close()


def demo_file(args):
    path = Path(args.data_dir or "data/demo")
    return path / "test.jsonl" if path.is_dir() else path


def note_exact_match(path, exact_match):
    """Put the demo's exact match (a share, 0..1) into a run's summary."""
    write_atomic(path, json.dumps({**read_json(path, "run"), "exact_match": exact_match}, indent=1))


def chain_of_thought(decoder, prompts):
    """Yields (i, text, tokens) of `prompts` {i: ids} as they end."""
    for i, ids in prompts.items():
        decoder.add(i, ids)
    while decoder.busy:
        for i, output in decoder.step():
            yield i, output.text.strip(), len(output.ids)


def with_tools(decoder, prompts, encode, strict=False):
    """Tool-integrated reasoning: yields (i, text, tokens) of `prompts` {i: text} as they end.

    A call of the model that ends a code block has its program run and the output appended, then the model goes on; at
    most MAX_CALLS calls. Programs run beside the decoding. `encode`: text -> ids of a whole prompt.
    """
    workers = min(8, os.cpu_count() or 1)
    texts, calls, tokens, running = (
        dict.fromkeys(prompts, ""),
        dict.fromkeys(prompts, 0),
        dict.fromkeys(prompts, 0),
        {},
    )
    with Sandbox(workers, strict=strict) as sandbox, ThreadPoolExecutor(workers) as pool:
        for i, prompt in prompts.items():
            decoder.add(i, encode(prompt))
        while decoder.busy or running:
            for future in [f for f in running if f.done() or not decoder.busy]:
                i = running.pop(future)
                texts[i] += f"\n```output\n{result_text(future.result()[0])}\n```\n"
                if calls[i] == MAX_CALLS:
                    yield i, texts[i] + "\nReach max function call limit.", tokens[i]
                else:
                    decoder.add(i, encode(prompts[i] + texts[i]))
            for i, output in decoder.step() if decoder.busy else ():
                new = output.text.rstrip()
                texts[i], calls[i], tokens[i] = (
                    texts[i] + new,
                    calls[i] + 1,
                    tokens[i] + len(output.ids),
                )
                if "boxed" not in new and new.endswith("```"):
                    running[pool.submit(sandbox.run, [program_of(texts[i])])] = i
                else:
                    yield i, texts[i].strip(), tokens[i]


# ---------------------------------------------------------------------------------------------------------------------
# verdicts


def end_of_demo(text, new):
    """The demo's stop condition: the end of the line with "####"."""
    if "\n" not in text[len(text) - new :]:
        return None
    match = re.search(r"####[^\n]*\n", text)
    return match and match.end()


def demo_verdict(text, gt):
    """The demo's answer is the first number after "####" on its line."""
    match = re.search(r"####[^\n\d]*?(-?\d+)", text)
    right = bool(match) and match[1] == str(gt)
    return {
        "pred": match[1] if match else "",
        "gt": str(gt),
        "published": right,
        "strict": right,
        "reason": "" if match else "no answer found",
    }


class Grader:
    """Grades answers beside the decoding, one at a time: some comparisons take seconds."""

    def __init__(self, task, examples):
        self.task, self.examples, self.slot, self.verdicts = task, examples, [None], {}
        self.pool, self.graded, self.right = ThreadPoolExecutor(1), 0, 0

    def add(self, i, text):
        self.verdicts[i] = self.pool.submit(self._grade, text, self.examples[i].gt)

    def _grade(self, text, gt):
        verdict = (
            demo_verdict(text, gt)
            if self.task == "demo"
            else grading.verdict(self.slot, self.task, text, gt)
        )
        self.graded, self.right = self.graded + 1, self.right + verdict["published"]
        return verdict

    def accuracy(self):
        """Per cent of the answers graded so far, as text."""
        return f"{100 * self.right / max(self.graded, 1):.1f}%"

    def verdict(self, i):
        return self.verdicts[i].result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        if self.slot[0]:
            grading.stop_worker(self.slot[0])


# ---------------------------------------------------------------------------------------------------------------------
# answers on disk: a header line with the settings, then a line per answer, in the order in which they ended; one file
# per rank until the task is finished


def keep(answers, out, name, settings, grader, env, n, n_before):
    """Write each answer down as it comes, and show how far and how good it is. Returns {i: text}."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.partial-{env.rank}.jsonl"
    if path.exists():  # a kill may have cut the last line
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    texts, n_tokens, started = {}, 0, time.perf_counter()
    with (
        open(path, "a") as file,
        tqdm(
            total=n + n_before, initial=n_before, desc=name, unit="problem", disable=not env.main
        ) as bar,
    ):
        if file.tell() == 0:
            print(json.dumps({"settings": settings}), file=file, flush=True)
        for i, text, tokens in answers:
            print(json.dumps({"idx": i, "text": text}), file=file, flush=True)
            grader.add(i, text)
            texts[i], n_tokens = text, n_tokens + tokens
            bar.set_postfix_str(
                f"{grader.accuracy()} right, {n_tokens / (time.perf_counter() - started):.0f} tok/s",
                refresh=False,
            )
            bar.update()
    return texts


def read_answers(out, name):
    """{i: text} of all ranks' unfinished files; a last line that a kill cut short is left out."""
    texts = {}
    for path in sorted(out.glob(f"{name}.partial-*.jsonl")):
        for line in path.read_text().split("\n")[1:-1]:
            row = json.loads(line)
            texts[row["idx"]] = row["text"]
    return texts


def earlier_answers(out, name, settings, args):
    """{i: text} of what was answered before with these settings. Raises UserError where it was with others, or where
    neither --resume nor --overwrite says what is meant."""
    partial, finished, saved = (
        sorted(out.glob(f"{name}.partial-*.jsonl")),
        out / f"{name}.jsonl",
        [],
    )
    if args.overwrite:
        for path in [*partial, finished]:
            path.unlink(missing_ok=True)
        return {}
    for path in partial:
        first = path.read_text().split("\n")[0]
        saved.append((path, json.loads(first)["settings"] if first.endswith("}") else settings))
    texts = {}
    if finished.exists():
        entry = (
            read_json(out / "results.json", "results").get(name, {})
            if (out / "results.json").exists()
            else {}
        )
        saved.append((finished, entry.get("settings", {})))
        texts = {row["idx"]: row["text"] for row in tasks.read_rows(finished)}
    for path, theirs in saved:
        differing = [
            f"{k} {theirs.get(k)!r} -> {settings[k]!r}"
            for k in IDENTITY
            if theirs.get(k) != settings[k]
        ]
        if differing:
            raise UserError(
                f"{path} holds other answers ({'; '.join(differing)}); choose another --out or start the "
                f"task over with --overwrite"
            )
        if args.out and not args.resume:
            raise UserError(
                f"{path} exists; go on with --resume or start the task over with --overwrite"
            )
    return texts | read_answers(out, name)


if __name__ == "__main__":
    cli(main)
