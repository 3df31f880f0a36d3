"""The demo's chain: runs the stages that are missing, each as a person would type it, and compares.

A stage called without `--data` works on the demo: `ensure` fills in its arguments and first runs,
in order, whatever of prepare -> base -> reference -> scores -> plain baseline is not there yet.
`report` evaluates the student beside the baseline, its base and the reference.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from common.device import n_ranks

import slm
from common.command_line import SEED, Parser
from common.errors import UserError
from common.errors import command as shell_line
from common.records import read_record
from data import Note, TokenSet
from demo import sets
from demo.folders import roots
from hf import checkpoint
from training import identity
from training.arguments import add_arguments, settle
from training.finished import arguments, is_finished, reached, steps, summary
from training.identity import hash_of_validation
from training.method_flags import K, add_method, selection_of, settle_method

KIT = Path(__file__).resolve().parents[1]  # a fork's folder may have other files of these names

# The recipe; what is not named here is the trainers' default.
BASE = "--init scratch --rope-theta 100 --qk-norm --steps 600 --lr 6e-3 --eval-every 0"
REFERENCE = "--steps 250 --lr 2e-3 --eval-every 0"
STUDENT = "--steps 1200 --lr 2e-3"
CONTEXT = 32  # tokens of the short context, a quarter of the demo's window
# What torchrun tells a rank: a stage that one of them starts is alone.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def commands(seed):
    """The stages before a student, in order.

    {name: (the file that says that it is finished, its command)}.
    """
    data, out = roots(seed)
    tail = "" if seed == SEED else f" --seed {seed}"
    val = f"--val {data}/val"
    curated = f"--data {data}/curated {val} --init {out}/base"
    corpus = f"--data {data}/corpus"
    clm = f"--k 1.0 {corpus} {val} --init {out}/base {STUDENT}"
    return {
        "sets": (data / "val/meta.json", f"prepare.py --source demo --out {data}{tail}"),
        "base": (
            out / "base/summary.json",
            f"train_ref.py --data {data}/base {val} {BASE} --out {out}/base{tail}",
        ),
        "ref": (
            out / "ref/summary.json",
            f"train_ref.py {curated} {REFERENCE} --out {out}/ref{tail}",
        ),
        "ref_loss": (
            out / "ref_loss.json",
            f"score.py --model {out}/ref {corpus} {val} --out {out}/ref_loss.bin",
        ),
        "clm": (out / "clm/summary.json", f"train_slm.py {clm} --out {out}/clm{tail}"),
    }


def more_losses(seed):
    """What other methods need: {field of slm.Tokens: (its note, the command that makes it)}."""
    data, out = roots(seed)
    score = f"score.py --model {out}/base --data {data}/corpus --out {out}"
    note, of_reference = commands(seed)["ref_loss"]
    return {
        "ref_entropy": (note, f"{of_reference} --entropy"),
        "base_loss": (out / "base_loss.json", f"{score}/base_loss.bin"),
        "short_loss": (out / "short_loss.json", f"{score}/short_loss.bin --context {CONTEXT}"),
    }


def flags_of(text):
    """{"--flag": "value"} of a command line; a flag without a value is left out."""
    words = text.split()
    pairs = zip(words, words[1:])
    return {flag: value for flag, value in pairs if is_flag(flag) and not is_flag(value)}


def is_flag(word):
    return word.startswith("--")


def finished(path, command):
    """Is this stage done, with this command's arguments, on the inputs that are there now?

    Where anything differs the stage is called, and says what.
    """
    if not path.exists():
        return False
    flags = flags_of(command.split(maxsplit=1)[1])
    if command.startswith("prepare.py"):
        return sets.are_of_this_text(path.parent.parent, int(flags.get("--seed", SEED)))
    if command.startswith("score.py"):
        again = shell_line(*command.split(), "--overwrite")
        saved = vars(read_record(path, Note, "stored losses", again))
        if command.endswith("--entropy") and not saved["entropy"]:
            return False
        if differs(flags, saved):
            return False
    else:
        saved = arguments(path.parent)
        if identity.changed_arguments(saved, recipe(command)):
            return False
    got = {**saved, **saved.get("inputs", {})}
    wanted = {"data": TokenSet(flags["--data"]).hash}
    if "--model" in flags:
        if "--val" in flags and not knows_validation(saved, flags["--val"]):
            return False
        wanted["reference"] = checkpoint.model_hash(flags["--model"])
        wanted["n_scored"] = -(-(saved["count"] - 1) // saved["seq_len"])
    elif flags["--init"] == "scratch":
        wanted["init"] = f"scratch-{flags.get('--seed', SEED)}"
    else:
        wanted["init"] = checkpoint.model_hash(flags["--init"])
    if "--val" in flags and "--model" not in flags:
        wanted["validation"] = hash_of_validation([TokenSet(flags["--val"])])
    return all(got.get(key) == value for key, value in wanted.items())


def differs(flags, note):
    """Does a score.py command say another thing than the note of its losses? Not by names."""
    for flag, value in flags.items():
        key = flag[2:].replace("-", "_")
        if flag in ("--data", "--val", "--model", "--out") or key not in note:
            continue
        if not agrees(note[key], value):
            return True
    return False


def recipe(command):
    """{argument: value} of a trainer's command, with what follows from it and every default."""
    script, *words = shlex.split(command)
    parser = Parser("")
    if script == "train_slm.py":
        add_method(parser)
    add_arguments(parser)
    args = parser.parse_args(words)
    if script == "train_slm.py":
        settle_method(args)
    settle(args, run=False, world=1)  # as `run` starts it
    left_out = {*identity.NOT_NOTED, *identity.EXECUTION, "earlier"}
    return {name: value for name, value in vars(args).items() if name not in left_out}


def knows_validation(note, val):
    """Does a note of losses hold the reference's loss on the token set in `val`?"""
    wanted = hash_of_validation([TokenSet(val)])
    return any(known.data == wanted for known in note["validation"])


def agrees(saved, text):
    """Is what a flag of a command says what was saved?"""
    try:
        return float(saved) == float(text)
    except (TypeError, ValueError):
        return str(saved) == text


def run(command):
    """Run a stage as its own process, showing the command; its failure is this one's, too."""
    print(f"\n$ python {command}", flush=True)
    script, *words = shlex.split(command)
    alone = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    code = subprocess.run([sys.executable, str(KIT / script), *words], env=alone).returncode
    if code:
        sys.exit(code)


def ensure(args, stage):
    """For a stage called without --data: fill in the demo's arguments, run what has to come first.

    `stage`: "ref", "score" or "slm". Does nothing where --data is given. Raises UserError where one
    of several ranks would have to run something first.
    """
    args.chain = args.data is None
    if not args.chain:
        return
    seed = getattr(args, "seed", SEED)
    data, out = roots(seed)
    last = {"ref": _reference, "score": _scores, "slm": _student}[stage](args, data, out)
    stages = commands(seed)
    names = [*stages]
    todo = [stages[name] for name in names[: names.index(last) + 1]]
    if stage == "slm":
        more = more_losses(seed)
        todo += [more[name] for name in selection_of(args).needs if name in more]
    for path, command in todo:
        if finished(path, command):
            continue
        if n_ranks() > 1:
            raise UserError(
                f"{path}: is not there or another one, and the demo's earlier stages run in one "
                f"process; name --data, or first {shell_line(*command.split())}"
            )
        run(command)


# Each fills in what a stage's command line leaves open, and names the last stage before it.


def _reference(args, data, out):
    args.data = f"{data}/curated"
    args.val = args.val or f"{data}/val"
    args.init = args.init or f"{out}/base"
    args.out = args.out or f"{out}/ref"
    _steps_and_rate(args, REFERENCE)
    return "base"


def _scores(args, data, out):
    args.data = f"{data}/corpus"
    args.model = args.model or f"{out}/ref"
    args.val = args.val or f"{data}/val"
    args.out = args.out or f"{out}/ref_loss.bin"
    return "ref"


def _student(args, data, out):
    args.data = f"{data}/corpus"
    args.val = args.val or f"{data}/val"
    args.init = args.init or f"{out}/base"
    args.out = args.out or str(out / run_name(args))
    _steps_and_rate(args, STUDENT)
    selection = selection_of(args)
    if selection.method is None:  # the baseline itself: no reference, no scores
        return "base"
    args.ref_loss = args.ref_loss or f"{out}/ref_loss.bin"
    if "base_loss" in selection.needs:
        args.base_loss = args.base_loss or f"{out}/base_loss.bin"
    if "short_loss" in selection.needs:
        args.short_loss = args.short_loss or f"{out}/short_loss.bin"
    return "clm"


def _steps_and_rate(args, recipe):
    flags = flags_of(recipe)
    if args.steps is None and args.epochs is None:
        args.steps = int(flags["--steps"])
    if args.lr is None:
        args.lr = float(flags["--lr"])


def run_name(args):
    """The folder of a student: clm, slm, random, slm-k0.7, ref_loss-k0.5-batch ..."""
    method = selection_of(args).method
    if method is None:
        return "clm"
    parts = ["slm" if args.score == "excess" else args.score]
    parts += [setting.replace("=", "") for setting in args.set or ()]
    if args.k_schedule:
        parts.append("k" + args.k_schedule.replace(":", "-").replace("@", "at"))
    elif args.k != K and not weighs(args):
        parts.append(f"k{args.k:g}")
    if args.scope != method.scope:
        parts.append(args.scope)
    if args.rank_windows:
        parts.append(f"rank{args.rank_windows}")
    if args.backward != "exact":
        parts.append(args.backward)
    return "-".join(parts)


# --------------------------------------------------------------------------------------------------
# the comparison


def tokens_to_reach(folder, target, loss=lambda record: record.get("val_loss")):
    """Tokens from which on a run's validation loss stays at `target` or below, or None.

    `loss` picks the loss of a log record (None: not measured there).
    """
    measured = [(r["tokens_seen"], loss(r)) for r in steps(folder) if loss(r) is not None]
    tokens = reached(measured, target)
    return tokens if tokens is None else round(tokens)


def evaluated(folder, data):
    """A run's summary with its exact match, evaluated now where that is missing."""
    if summary(folder)["exact_match"] is None:
        run(shlex.join(["eval_math.py", "--model", str(folder), "--tasks", f"{data}/test.jsonl"]))
    return summary(folder)


def report(args, env):
    """After a demo student's training: it and the baseline side by side, and what to look at."""
    if not (args.chain and env.main):
        return
    data, out = roots(args.seed)
    student = Path(args.out)
    baseline = out / "clm"
    rows = [("base (where both start)", out / "base"), ("reference", out / "ref")]
    rows += [("CLM, every token", baseline)]
    if student != baseline:
        rows += [(student.name + _k_of(args), student)]
    rows = [(label, folder) for label, folder in rows if is_finished(folder)]
    set_of = {folder: arguments(folder)["inputs"].get("validation") for _, folder in rows}
    if others := [label for label, folder in rows if set_of[folder] != set_of[student]]:
        print(f"\nNot compared, for their losses are on another --val: {', '.join(others)}.")
        rows = [row for row in rows if row[0] not in others]
    summaries = {folder: evaluated(folder, data) for _, folder in rows}
    print(f"\n{'':26} validation loss  exact match  tokens read   trained on")
    for label, folder in rows:
        s = summaries[folder]
        quality = f"{s['val_loss']:16.4f}{s['exact_match']:13.3f}"
        print(f"{label:26}{quality}{s['tokens_seen']:13,}{s['tokens_selected']:13,}")
    if student == baseline or baseline not in summaries:
        return
    _show_kept(student, "mean weight, or share kept," if weighs(args) else "share kept")
    target = summaries[baseline]["val_loss"]
    tokens = tokens_to_reach(student, target)
    if tokens:
        ratio = summaries[baseline]["tokens_seen"] / tokens
        print(
            f"\n{student.name} has CLM's final validation loss ({target:.4f}) or less from "
            f"{tokens:,} tokens on, {ratio:.1f} times fewer."
        )
    else:
        print(f"\n{student.name} ends above CLM's final validation loss ({target:.4f}).")
    print(
        f"Look at {student}/log.jsonl (each step), {student}/eval (each answer), and then at "
        f"slm.py: that is all it took."
    )


def weighs(args):
    return isinstance(selection_of(args).method, slm.Weight)


def _k_of(args):
    """What a student's row says of k. A weight has none."""
    return "" if weighs(args) else f", k = {args.k_schedule or format(args.k, 'g')}"


def _show_kept(student, what, n=100):
    print(f"\n{what} of each kind of text, last {n} steps:")
    shares = {}
    for record in [r["kept"] for r in steps(student) if r.get("kept")][-n:]:
        for kind, share in record.items():
            shares.setdefault(kind, []).append(share)
    means = {kind: sum(values) / len(values) for kind, values in shares.items()}
    for kind, share in sorted(means.items(), key=lambda item: -item[1]):
        print(f"  {kind:14}{share:6.0%}  {'#' * round(30 * share)}")
