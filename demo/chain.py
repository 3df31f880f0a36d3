"""The demo's chain: runs the stages that are missing, each as the command that a person would type, and compares.

A stage called without `--data` works on the demo: `ensure` fills in its arguments and first runs, in order, whatever
of prepare -> base -> reference -> scores -> plain baseline is not there yet. `report` evaluates the student beside the
baseline, its base and the reference.
"""

import json
import subprocess
import sys
from pathlib import Path

from common.files import read_json
from data import TokenSet
from hf import checkpoint

KIT = Path(__file__).resolve().parents[1]  # a fork's folder may have other files of these names

# The recipe; what is not named here is the trainers' default.
BASE = "--init scratch --steps 900 --lr 3e-3 --schedule constant --eval-every 0"
REFERENCE = "--steps 400 --lr 2e-3 --eval-every 0"
STUDENT = "--steps 1200"
K = 0.6


def roots(seed):
    """Folders of the demo's data and results; each seed has its own."""
    suffix = f"-seed{seed}" if seed else ""
    return Path("data/demo" + suffix), Path("out/demo" + suffix)


def commands(seed):
    """The stages before a student: [(the file that says that it is finished, its command)]."""
    data, out = roots(seed)
    tail = f" --seed {seed}" if seed else ""
    val = f"--val {data}/val"
    return [
        (data / "val/meta.json", f"prepare.py --source demo --out {data}{tail}"),
        (
            out / "base/summary.json",
            f"train_ref.py --data {data}/base {val} {BASE} --out {out}/base{tail}",
        ),
        (
            out / "ref/summary.json",
            f"train_ref.py --data {data}/curated {val} --init {out}/base {REFERENCE} --out {out}/ref{tail}",
        ),
        (
            out / "ref_loss.json",
            f"score.py --model {out}/ref --data {data}/corpus --out {out}/ref_loss.bin",
        ),
        (
            out / "clm/summary.json",
            f"train_slm.py --k 1.0 --data {data}/corpus {val} --init {out}/base {STUDENT} --out {out}/clm{tail}",
        ),
    ]


def flags_of(text):
    """{"--flag": "value"} of a command line in which every flag has one value."""
    return dict(zip(*[iter(text.split())] * 2))


def finished(path, command):
    """Is this stage done, with this command's arguments, on the inputs that are there now? Where anything differs the
    stage is called, and says what."""
    if not path.exists():
        return False
    flags = flags_of(command.split(maxsplit=1)[1])
    if command.startswith("prepare.py"):
        return True
    saved = read_json(path if path.name == "ref_loss.json" else path.parent / "args.json", "demo")
    got = {**saved, **saved.get("inputs", {})}
    model = flags.get("--model") or flags["--init"]
    start = (
        f"scratch-{flags.get('--seed', 0)}" if model == "scratch" else checkpoint.model_hash(model)
    )
    wanted = {
        "data": TokenSet(flags["--data"]).hash,
        "reference" if "--model" in flags else "init": start,
    }
    if "n_scored" in saved:
        wanted["n_scored"] = -(-(saved["count"] - 1) // saved["seq_len"])
    options = {
        flag[2:].replace("-", "_"): value
        for flag, value in flags.items()
        if flag not in ("--data", "--val", "--init", "--model", "--out")
    }
    return all(got.get(k) == v for k, v in wanted.items()) and all(
        got[k] == type(got[k])(v) for k, v in options.items() if k in got
    )


def run(command):
    """Run a stage as its own process, showing the command; its failure ends this one with the same exit code."""
    print(f"\n$ python {command}", flush=True)
    script, *arguments = command.split()
    code = subprocess.run([sys.executable, str(KIT / script), *arguments]).returncode
    if code:
        sys.exit(code)


def ensure(args, stage):
    """For a stage called without --data: fill in the demo's arguments and run what has to come before it.

    `stage`: "ref", "score" or "slm". Does nothing where --data is given.
    """
    args.chain = args.data is None
    if not args.chain:
        return
    seed = getattr(args, "seed", 0)
    data, out = roots(seed)
    before = {"ref": 2, "score": 3, "slm": 5}[stage]
    if stage == "score":
        args.model, args.out = args.model or f"{out}/ref", args.out or f"{out}/ref_loss.bin"
    if stage == "ref":
        args.init, args.out = args.init or f"{out}/base", args.out or f"{out}/ref"
        flags = flags_of(REFERENCE)
        args.steps, args.lr = args.steps or int(flags["--steps"]), args.lr or float(flags["--lr"])
    if stage == "slm":
        args.init, args.out = args.init or f"{out}/base", args.out or str(out / run_name(args))
        args.steps = args.steps or (None if args.epochs else int(flags_of(STUDENT)["--steps"]))
        if args.k < 1:
            args.ref_loss = args.ref_loss or f"{out}/ref_loss.bin"
        before = 2 if args.k == 1 else 5
    args.data = f"{data}/{'curated' if stage == 'ref' else 'corpus'}"
    if stage != "score":
        args.val = args.val or f"{data}/val"
    for path, command in commands(seed)[:before]:
        if not finished(path, command):
            run(command)


def run_name(args):
    """The folder of a student: clm, slm, random, slm-k0.7, ref_loss-k0.5-batch ..."""
    if args.k == 1:
        return "clm"
    name = "slm" if args.score == "excess" else args.score
    backward = getattr(args, "backward", "exact")
    return (
        name
        + (f"-k{args.k:g}" if args.k != K else "")
        + (f"-{args.scope}" if args.scope != "micro" else "")
        + (f"-{backward}" if backward != "exact" else "")
    )


# ---------------------------------------------------------------------------------------------------------------------
# the comparison


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def tokens_to_reach(folder, target, loss=lambda record: record.get("val_loss")):
    """Tokens that a run has read when its validation loss first falls to `target`, interpolated between two
    evaluations; None where it never does. `loss` picks the loss of a log record (None: not measured there)."""
    before = None
    for record in records(folder):
        if loss(record) is None:
            continue
        now = (record["tokens_seen"], loss(record))
        if now[1] <= target:
            if before is None or before[1] <= now[1]:
                return now[0]
            share = (before[1] - target) / (before[1] - now[1])
            return round(before[0] + share * (now[0] - before[0]))
        before = now
    return None


def evaluated(folder, data):
    """A run's summary with its exact match, evaluated now where that is missing."""
    summary = read_json(folder / "summary.json", "run")
    if summary.get("exact_match") is None:
        run(f"eval_math.py --model {folder} --tasks {data}/test.jsonl")
        summary = read_json(folder / "summary.json", "run")
    return summary


def report(args, env):
    """After a demo student's training: it and the baseline side by side, and what to look at."""
    if not (args.chain and env.main):
        return
    data, out = roots(args.seed)
    student, baseline = Path(args.out), out / "clm"
    rows = [
        ("base (where both start)", out / "base"),
        ("reference", out / "ref"),
        ("CLM, every token", baseline),
        (f"{student.name}, k = {args.k:g}", student),
    ]
    rows = [(label, folder) for label, folder in rows if (folder / "summary.json").exists()]
    if student == baseline:
        rows = rows[:-1]
    summaries = {folder: evaluated(folder, data) for _, folder in rows}
    print(
        f"\n{'':26}{'validation loss':>16}{'exact match':>13}{'tokens read':>13}{'learnt from':>13}"
    )
    for label, folder in rows:
        s = summaries[folder]
        print(
            f"{label:26}{s['val_loss']:16.4f}{s['exact_match']:13.3f}{s['tokens_seen']:13,}{s['tokens_selected']:13,}"
        )
    if student == baseline:
        return
    last = [r["kept"] for r in records(student) if r.get("kept")][-100:]
    print("\nshare kept of each kind of text, last 100 steps:")
    kinds = {
        kind: [r[kind] for r in last if kind in r]
        for kind in dict.fromkeys(k for r in last for k in r)
    }
    for kind, shares in sorted(kinds.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        share = sum(shares) / len(shares)
        print(f"  {kind:14}{share:6.0%}  {'#' * round(30 * share)}")
    target = summaries[baseline]["val_loss"]
    reached = tokens_to_reach(student, target)
    if reached:
        ratio = summaries[baseline]["tokens_seen"] / reached
        print(
            f"\n{student.name} reaches CLM's final validation loss ({target:.4f}) after {reached:,} tokens, "
            f"{ratio:.1f} times fewer."
        )
    else:
        print(f"\n{student.name} does not reach CLM's final validation loss ({target:.4f}).")
    print(
        f"Look at {student}/log.jsonl (each step), {student}/eval (each answer), and then at slm.py: that is all it "
        f"took."
    )
