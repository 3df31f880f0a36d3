"""Stage 4: the maths evaluation of the Rho-1 paper (tables 1 and 2), or of a file of problems.

    python eval_math.py --model out/demo/slm                     # the demo's exact match
    python eval_math.py --model microsoft/rho-math-1b-v0.1 \\
        --tasks gsm8k math --out out/rho-1b                      # one GPU
    python eval_math.py --model out/slm --tasks gsm8k --samples 16 --temperature 0.7
    torchrun --nproc-per-node 8 eval_math.py ...                 # the problems are shared out
    python eval_math.py --regrade outputs.jsonl --tasks math     # grades a file, needs no model

Writes OUT/TASK.jsonl (a line per problem: verdict and text), OUT/results.json and OUT/results.md.
Every finished answer is kept at once: interrupted, the same command goes on.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

from common.device import Env, free_memory  # first: it sets how torch's threads wait

import torch

from common.command_line import SEEDS, Parser, add_compile, add_machine, not_negative, whole
from common.errors import UserError, cli, command
from common.files import write_atomic
from common.locks import taking_turns
from common.numerics import is_compiled
from common.owned import is_ours, own_folder, refuse_overlap
from common.records import as_record, read_json
from evaluation import results as report
from evaluation import tasks, unfinished
from evaluation.answers import end_of_hashes
from evaluation.generate import Decoder, common_prefix, encode_prompt, stop_strings
from evaluation.grading import Grader
from evaluation.reasoning import chain_of_thought, with_tools
from hf import checkpoint, downloads
from hf.config import config_from_hf
from hf.tokenizer import Tokenizer

DEMO = "data/demo/test.jsonl"
NEW_TOKENS = 1024  # per call of the model
NEW_TOKENS_OWN = 48  # in a task of one's own, whose questions and answers are short
CACHE_BYTES = 1e9  # of the KV cache on CPU
CACHE_SHARE = 0.4  # of a GPU's free memory
MAX_SAMPLES = 1 << 16
COLDEST, HOTTEST = 0.01, 100.0  # temperatures
MIN_CACHE, MAX_CACHE = 4096, {"cpu": 65536, "cuda": 1 << 18}  # tokens


def arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("input")
    group.add_argument("--model", help="model to evaluate (folder or hub id)")
    group.add_argument("--revision", help="revision of a hub id")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help=f"{' '.join(tasks.TASKS)}, or a .jsonl file with a question and an answer a line, "
        f"where the answer is the number behind #### (default: {DEMO})",
    )
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder with eval/ and prompts/ (default: download them)"
    )
    group.add_argument(
        "--limit", type=whole(1), metavar="N", help="only so many problems of each task"
    )
    group.add_argument(
        "--regrade", metavar="FILE", help="grade this file of generations, for the one task named"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--mode",
        default="cot",
        choices=list(tasks.STOP),
        help="cot: few-shot chain of thought; tool: zero-shot, the model's Python is run",
    )
    group.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help=f"per call of the model (default: {NEW_TOKENS}; for a file {NEW_TOKENS_OWN})",
    )
    group.add_argument(
        "--samples",
        type=whole(1, MAX_SAMPLES),
        default=1,
        help="answers to each problem; of several also pass@k and maj@k are counted",
    )
    group.add_argument(
        "--temperature", type=not_negative, default=0.0, help="0: greedy; else tokens are drawn"
    )
    group.add_argument(
        "--seed", type=whole(0, SEEDS), help="of the numbers that they are drawn by (default: 0)"
    )
    group.add_argument(
        "--batch-tokens",
        type=whole(1),
        metavar="N",
        help="tokens in the KV cache, rows times their length (default: what 1 GB holds, at most "
        f"{MAX_CACHE['cpu']}; on a GPU what 40%% of the free memory holds, at most "
        f"{MAX_CACHE['cuda']})",
    )
    group.add_argument(
        "--strict-sandbox",
        action="store_true",
        help="tool: refuse where the system cannot enforce every limit",
    )
    group = parser.add_argument_group("machine")
    add_machine(group, "of the weights and the forward pass")
    add_compile(group, "compile the one-token step; auto: on a GPU")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results (default: MODEL/eval; with --regrade: regraded/ beside it)",
    )
    group.add_argument("--overwrite", action="store_true", help="start the named tasks over")
    args = parser.parse_args()
    if args.tasks is None:
        if args.regrade:
            raise UserError(f"--tasks: got none, wanted the one that {args.regrade} answers")
        args.tasks = ["demo"]
    names = []
    for text in args.tasks:
        names += [text] if Path(text).is_file() else filter(None, text.split(","))
    args.tasks = list(dict.fromkeys(DEMO if name == "demo" else name for name in names))
    return args


def main():
    args = arguments()
    check(args)
    out = regrade(args) if args.regrade else evaluate(args)
    if out:
        with taking_turns(out):  # other tasks may be written by other processes
            results = read_json(out / "results.json", "results")
            write_atomic(out / "results.md", report.markdown(results))
        print(report.table(results))


def check(args):
    """Refuse what does not go together, before anything is loaded."""
    if not args.tasks:
        raise UserError(f"--tasks: got none, wanted some of {' '.join(tasks.TASKS)}, or a file")
    labels = [tasks.label(task) for task in args.tasks]
    if len(set(labels)) < len(labels):
        raise UserError(f"--tasks: got {' '.join(args.tasks)}, wanted names that differ")
    warm = COLDEST <= args.temperature <= HOTTEST
    if not warm and args.temperature != 0:
        raise UserError(
            f"--temperature: got {args.temperature}, wanted 0 (greedy), or {COLDEST} to {HOTTEST:g}"
        )
    if args.regrade:
        if len(args.tasks) != 1:
            raise UserError(
                f"--regrade: got --tasks {' '.join(args.tasks)}, "
                f"wanted the one task that the file answers"
            )
        without = {
            "--model": args.model,
            "--revision": args.revision,
            "--data-dir": args.data_dir,
            "--limit": args.limit,
            "--max-new-tokens": args.max_new_tokens,
            "--samples": args.samples > 1,
            "--seed": args.seed is not None,
            "--batch-tokens": args.batch_tokens,
            "--strict-sandbox": args.strict_sandbox,
        }
        for flag, given in without.items():
            if given:
                raise UserError(f"{flag}: does nothing with --regrade, which grades all of a file")
        return
    if args.seed is not None and not warm:
        raise UserError(f"--seed: got {args.seed} without --temperature, at which nothing is drawn")
    if args.samples > 1 and not warm:
        raise UserError(
            f"--samples: got {args.samples} with --temperature 0, which makes them all equal; "
            f"add --temperature 0.7, say"
        )
    if not args.model:
        raise UserError("--model: got none, wanted a model's folder or hub id (or --regrade FILE)")
    if not args.out and not Path(args.model).is_dir():
        raise UserError(f"--out: name a folder for the results of {args.model}")
    if args.tasks == [DEMO] and not Path(DEMO).exists():
        raise UserError(f"--tasks: {DEMO} is not there yet; make it with {command('prepare.py')}")
    own = [task for task in args.tasks if tasks.task_of(task).own]
    if args.mode == "tool" and own:
        raise UserError(f"--mode tool: {own[0]} has chain of thought only; name other --tasks")
    if args.mode == "cot" and args.strict_sandbox:
        raise UserError("--strict-sandbox: does nothing without --mode tool; leave it out")
    if args.data_dir and len(own) == len(args.tasks):
        raise UserError(f"--data-dir: does nothing with --tasks {own[0]}; leave it out")


def regrade(args):
    """Grade a file of generations. Returns the results' folder."""
    out = Path(args.out or Path(args.regrade).parent / "regraded")
    refuse_overlap(out, {"--regrade": args.regrade})
    task = args.tasks[0]
    settings = {"regraded": args.regrade, "mode": args.mode}
    if args.temperature:
        settings["temperature"] = args.temperature
    name = result_name(task, args)
    unfinished.refuse_unfinished(out, name)
    report.regrade(args.regrade, task, out, settings, name, args.overwrite)
    return out


def result_name(task, args):
    """What a task's files are called: gsm8k, gsm8k-tool, gsm8k-tool-t0.7."""
    name = tasks.label(task)
    if args.mode != "cot":
        name += f"-{args.mode}"
    if args.temperature:
        name += f"-t{args.temperature:g}"
    return name


def evaluate(args):
    """Evaluate the model on all tasks. Returns the results' folder; None on all ranks but one."""
    env = Env(args)
    folder = env.main_first(lambda: downloads.resolve(args.model, args.revision))
    out = Path(args.out or folder / "eval")
    refuse_overlap(out, {"--tasks": [task for task in args.tasks if tasks.task_of(task).own]})
    if args.out is None and env.main:
        with taking_turns(folder):
            own_folder(out)  # goes with the run, where it is one
    subject = Subject(folder, args, env)
    names = [result_name(task, args) for task in args.tasks]
    model_hash = subject.hash[:16]
    env.from_main(lambda: unfinished.refuse_another_model(out, names, args.model, model_hash))
    if args.overwrite:  # all of them first: the same command without --overwrite goes on then
        env.from_main(lambda: start_over(args, out))
    for task in args.tasks:
        evaluate_task(task, args, env, subject, out)
    return out if env.main else None


def start_over(args, out):
    for task in args.tasks:
        unfinished.start_over(out, result_name(task, args))


# --------------------------------------------------------------------------------------------------
# the model


class Subject:
    """The model that is evaluated. Its weights are loaded when the first prompt needs them."""

    def __init__(self, folder, args, env):
        self.folder = folder
        self.args = args
        self.env = env
        self.hash = env.from_main(lambda: checkpoint.model_hash(folder))
        self.tokenizer = Tokenizer.load(folder)

    @cached_property
    def config_hash(self):
        """Of what an answer depends on beside the weights: shape, tokenizer, where a text ends."""
        path = self.folder / "config.json"
        shape = vars(config_from_hf(read_json(path, "model"), path))
        tokenizer = [self.tokenizer.hash, *self.tokenizer.ends]
        text = json.dumps([shape, tokenizer, self.extra_eos()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def model(self):
        return checkpoint.load(self.folder, self.env.dtype, self.env.device).eval()

    def decoder(self, max_new_tokens, stop, prefix):
        return Decoder(
            self.model,
            self.tokenizer,
            max_new_tokens,
            stop=stop,
            eos=self.extra_eos(),
            prefix=prefix,
            batch_tokens=self.batch_tokens(),
            compiled=is_compiled(self.args, self.env.device),
            temperature=self.args.temperature,
            seed=self.args.seed or 0,
        )

    def extra_eos(self):
        """Ids that generation_config.json ends a text with."""
        path = self.folder / "generation_config.json"
        if not path.exists():
            return []
        eos = read_json(path, "model").get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        return as_record(eos, list[int | None], f"model: {path}: eos_token_id")

    def batch_tokens(self):
        """How many tokens the KV cache holds: as asked for, or as the memory allows."""
        if self.args.batch_tokens:
            return self.args.batch_tokens
        device = self.env.device
        on_gpu = device.type == "cuda"
        free_memory(device)  # an earlier task's cache
        free = CACHE_SHARE * torch.cuda.mem_get_info(device)[0] if on_gpu else CACHE_BYTES
        config = self.model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        fits = int(free / (numbers * self.env.dtype.itemsize))
        return max(MIN_CACHE, min(fits, MAX_CACHE[device.type]))


# --------------------------------------------------------------------------------------------------
# one task


def evaluate_task(task, args, env, subject, out):
    """Answer what is not answered yet, grade, and write the task's files."""
    examples = tasks.load(task, args.data_dir, shots=args.mode == "cot")
    prompts = [tasks.prompt(example, args.mode) for example in examples]
    settings = settings_of(task, args, env, subject, prompts)
    examples = examples[: args.limit]
    prompts = prompts[: args.limit]
    name = result_name(task, args)
    earlier = env.from_main(lambda: unfinished.earlier_answers(out, name, settings))
    refuse_fewer(earlier, len(examples), args, out, name)
    # An answer's key: the place of its problem, and the number of the sample.
    keys = [(i, sample) for i in range(len(examples)) for sample in range(args.samples)]
    given = {key: earlier[key] for key in keys if key in earlier}
    todo = [key for key in keys if key not in given]
    with Grader(task, examples, env.main) as grader:
        for key, known in given.items():
            grader.add(key, known.text)
        if todo:
            answers, n = answer(task, args, env, subject, prompts, todo, settings)
            path = unfinished.partial_file(out, name, env.rank)
            with unfinished.progress_bar(name, n + len(given), len(given), env.main) as bar:
                given |= unfinished.keep(answers, path, settings, grader, bar)
            env.wait()
        if env.main:
            answered = unfinished.read_answers(out, name)
            for key in keys:
                if key in answered and key not in given:  # by another rank
                    given[key] = answered[key]
                    grader.add(key, given[key].text)
            verdicts = [grader.verdict(key) for key in keys]
            texts = [given[key].text for key in keys]
            reasons = [given[key].finish_reason for key in keys]
            report.write_results(task, texts, verdicts, out, settings, name, args.samples, reasons)
            unfinished.replaced(out, name)
            if tasks.task_of(task).own and not args.limit and args.temperature == 0:
                note_exact_match(subject.folder, task, verdicts)


def refuse_fewer(earlier, n_problems, args, out, name):
    """Raises UserError where more answers are there than are asked for: they would be lost."""
    answered = 1 + max((problem for problem, _ in earlier), default=-1)
    if answered > n_problems:
        raise UserError(
            f"--limit: got {args.limit}, {out} has answers to {name} up to problem {answered}; "
            f"leave it out, ask for as many or more, or choose another --out"
        )
    there = 1 + max((sample for _, sample in earlier), default=0)
    if there > args.samples:
        raise UserError(
            f"--samples: got {args.samples}, {out} has up to {there} of each problem of {name}; "
            f"ask for as many or more, or choose another --out"
        )


def settings_of(task, args, env, subject, prompts):
    """What a task's answers depend on, and what their speed does."""
    drawn = {}
    if args.temperature:
        drawn = {"temperature": args.temperature, "seed": args.seed or 0}
    revision = {"revision": args.revision} if args.revision else {}
    default = NEW_TOKENS_OWN if tasks.task_of(task).own else NEW_TOKENS
    together = "\0".join(prompts)  # of all, whatever the --limit
    return {
        "model": args.model,
        **revision,
        "model_hash": subject.hash[:16],
        "config_hash": subject.config_hash[:16],
        "mode": args.mode,
        "prompt_hash": hashlib.sha256(together.encode()).hexdigest()[:16],
        "dtype": str(env.dtype).removeprefix("torch."),
        "device": env.device.type,
        "max_new_tokens": args.max_new_tokens or default,
        "batch_tokens": args.batch_tokens or "auto",
        **drawn,
    }


def answer(task, args, env, subject, prompts, todo, settings):
    """(a generator of (key, Reply), their number): this rank's part of `todo`."""

    def encode(text):
        return encode_prompt(subject.tokenizer, text)

    ids = [encode(prompt) for prompt in prompts]
    prefix = ids[0][: common_prefix(ids)]
    mine = sorted(todo, key=lambda key: (-len(ids[key[0]]), key))[env.rank :: env.world]
    own = tasks.task_of(task).own
    stop = end_of_hashes if own else stop_strings(tasks.STOP[args.mode])
    decoder = subject.decoder(settings["max_new_tokens"], stop, prefix)
    if args.mode == "cot":
        answers = chain_of_thought(decoder, {key: ids[key[0]] for key in mine})
    else:
        asked = {key: prompts[key[0]] for key in mine}
        answers = with_tools(decoder, asked, encode, args.strict_sandbox)
    return answers, len(mine)


def note_exact_match(folder, task, verdicts):
    """Put the share of right answers (0..1) into a run's summary.

    Where the model is a run of the kit, and the problems lie beside the text that it was trained
    on: they are its own test.
    """
    path = folder / "summary.json"
    if not (path.exists() and (folder / "args.json").exists() and is_ours(path)):
        return
    data = read_json(folder / "args.json", "run").get("data")
    if isinstance(data, str) and Path(data).resolve().parent == Path(task).resolve().parent:
        share = sum(verdict["strict"] for verdict in verdicts) / max(len(verdicts), 1)
        with taking_turns(folder):
            summary = {**read_json(path, "run"), "exact_match": share}
            write_atomic(path, json.dumps(summary, indent=1))


if __name__ == "__main__":
    cli(main)
