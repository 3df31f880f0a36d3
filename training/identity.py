"""Which run a folder holds: none yet, this one, or another one, which is refused.

args.json has what tells a run from others: its arguments, the hashes of what it reads, the code of
its score, and what its rounding hangs on.
"""

import argparse
import contextlib
import json
from typing import Any

import slm
from common import aside, locks, owned, provenance
from common.checksums import short
from common.errors import UserError
from common.files import write_atomic
from common.json_files import START_OVER, read_json
from common.numerics import REFUSED, differences, notice, numerics
from common.records import as_record
from training import finished, states
from training.method_flags import set_to, share_or_schedule
from training.source import VERSION

FORMAT = 1  # of args.json and what it belongs to
# What may change when a run goes on: it changes rounding at most, or only what is reported. Noted
# for `--from`:
EXECUTION = {
    "save_every",
    "save_minutes",
    "eval_every",
    "snapshots",
    "compile",
    "head",
    "parallel",
    "shard_size",
    "reshard_after_forward",
    "checkpointing",
}
NOT_NOTED = {"out", "overwrite", "threads", "verify", "device", "chain", "track"}
# Compared in ways of their own, or not at all.
SEPARATE = {"inputs", "numerics", "source", "made", "execution"}
# Recorded, and compared by what follows from it: hashes of what it names, numerics, steps.
FOLLOWED = {
    "data",
    "val",
    "init",
    "revision",
    "ref_loss",
    "base_loss",
    "short_loss",
    "stored",
    "dtype",
    "micro_batch_size",
    "rank_windows",
    "epochs",
}
# Of the choice, which does nothing where every token is kept.
CHOICE = {"score", "scope", "set"}
LATER = ("validation", "loss_mask")  # inputs that older records do not have: such runs go on
LENGTH = {"steps"}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one of them
RECORDS = ("args.json", "log.jsonl", "summary.json", states.STATE, states.BEFORE)
MODEL = ("README.md", "config.json", "generation_config.json", *WEIGHTS)


def hashes_of(data, val):
    """What a run's inputs are known by: the tokens, which of them are targets, the same of val."""
    return {"data": data.hash, "loss_mask": data.mask_hash, "validation": hash_of_validation(val)}


def hash_of_validation(val):
    """The same of the token sets of `--val`, in one text."""
    return ", ".join(f"{part.hash} {part.mask_hash}".strip() for part in val)


def identity(args, inputs, env, source=None):
    """What args.json says of a run. `inputs`: {name: hash}; `source`: hash of its score's code."""
    record = {"format": FORMAT}
    flags = {key: v for key, v in sorted(vars(args).items()) if key not in NOT_NOTED}
    record |= {key: v for key, v in flags.items() if key not in EXECUTION}
    record["execution"] = {key: v for key, v in flags.items() if key in EXECUTION}
    record["inputs"] = inputs
    record["numerics"] = numerics(args, env, args.micro_batch_size)
    record["source"] = source
    record["made"] = provenance.made_by(record["numerics"]["device"], env.world)
    return json.loads(json.dumps(record, default=str))


def claim(folder, record, overwrite):
    """Lock a folder for the run of this `identity`. Returns a finished run's summary, else None.

    Raises UserError where the folder holds another run, or what no run wrote.
    """
    path = folder / "args.json"
    if folder.exists():
        refuse_foreign(folder)
    locks.lock_folder(folder, "run")
    if overwrite:
        aside.set_aside(folder)
    else:
        aside.put_back(folder)
    if not finished.is_finished(folder):
        owned.refuse_foreign(folder / name for name in MODEL)
    if not path.exists():
        if states.present(folder):
            raise UserError(
                f"{folder} holds the state of a run, but not its args.json; start over with "
                f"--overwrite, or name another --out"
            )
        write_atomic(path, json.dumps(record, indent=1))
        return None
    saved = read_json(path, "run", START_OVER)
    for name in ("numerics", "inputs"):
        as_record(saved.get(name, {}), dict[str, Any], f"run: {path}: {name}", START_OVER)
    if not begun(folder):  # it stopped before anything was saved, for lack of memory perhaps
        if saved != record:
            write_atomic(path, json.dumps(record, indent=1))
        return None
    refuse_another(folder, saved, record)
    if finished.is_finished(folder):
        return summary_of_finished(folder, saved["steps"])
    if made := provenance.differences(saved.get("made", {}), record["made"]):
        print(f"note: {path} was begun by another kit or machine ({made})")
    if said := notice(path, saved.get("numerics", {}), record["numerics"]):
        print(said)
    return None


def refuse_foreign(folder):
    """Raises UserError where the folder holds something, and nothing that a run wrote."""
    if not folder.is_dir():
        raise UserError(f"--out {folder}: is a file, wanted a folder; name another one")
    owned.refuse_foreign(folder / name for name in RECORDS)
    there = {path.name for path in folder.iterdir()} - {owned.LIST}
    if there and not owned.written(folder):
        raise UserError(f"{folder} exists and is not a run of this kit; choose another --out")


def refuse_another(folder, saved, record):
    """Raises UserError where the folder's run, which has begun, is not that of `record`."""
    arguments, others = changed_arguments(saved, record), other_changes(saved, record)
    if not arguments and not others:
        return
    way_out = "choose another --out or start it over with --overwrite"
    is_longer = not others and arguments.keys() <= LENGTH
    if is_longer and finished.is_finished(folder):
        way_out = (
            f"it is finished: to train its model further, name it as the start of another run, "
            f"--init {folder} --out ANOTHER, whose schedule begins anew"
        )
    changes = [f"{name} {old!r} -> {new!r}" for name, (old, new) in arguments.items()]
    raise UserError(
        f"{folder} holds a run with other arguments ({'; '.join([*changes, *others])}); {way_out}"
    )


def changed_arguments(saved, record):
    """{name: (before, now)} of a run's arguments, but for those that are known by what follows."""
    compared = record.keys() - SEPARATE - FOLLOWED
    if "validation" not in saved.get("inputs", {}):  # older runs knew --val by its name
        compared = {*compared, "val"}
    if not (selects(saved) or selects(record)):
        compared -= CHOICE
    saved = saved | as_meant(saved)
    return {
        name: (saved.get(name), record.get(name))
        for name in sorted(compared)
        if saved.get(name) != record.get(name)
    }


def as_meant(saved):
    """The numbers of a method in an older record, which has them as they were typed."""
    meant = {}
    if saved.get("k_schedule"):
        with contextlib.suppress(argparse.ArgumentTypeError):  # one that is refused by now
            meant["k_schedule"] = share_or_schedule(saved["k_schedule"])
    if saved.get("set") and saved.get("score") in slm.SCORES:
        typed = [text.partition("=") for text in saved["set"]]
        values = {name: float(value) for name, _, value in typed}
        meant["set"] = set_to(slm.SCORES[saved["score"]], values)
    return meant


def other_changes(saved, record):
    """A phrase for each: changed inputs, windows ranked together, a score's code, rounding."""
    changes = changed_inputs(saved.get("inputs", {}), record["inputs"])
    was, now = ranked_together(saved), ranked_together(record)
    if was != now:
        changes.append(f"windows ranked together {was} -> {now}")
    source = saved.get("source", record["source"])
    if source != record["source"] and is_comparable(source):
        changes.append("the code of its score")
    rounding = differences(saved.get("numerics", {}), record["numerics"], REFUSED)
    return changes + [f"{key} {old} -> {new}" for key, old, new in rounding]


def is_comparable(source):
    """Is it a hash of a score's code as hashes are made now, or none? Runs of older ones go on."""
    return source is None or str(source).startswith(VERSION)


def ranked_together(record):
    """The windows of a forward pass, where they are ranked among each other; None elsewhere.

    Elsewhere `--micro-batch-size` is a matter of speed and of rounding (common/numerics.py).
    """
    method = slm.SCORES.get(record.get("score"))
    if record.get("scope") != "micro" or not selects(record) or getattr(method, "alone", False):
        return None
    return record.get("rank_windows") or record.get("micro_batch_size")


def selects(record):
    """Does a run choose or weigh tokens?"""
    weighs = isinstance(slm.SCORES.get(record.get("score")), slm.Weight)
    return weighs or record.get("k", 1.0) != 1 or bool(record.get("k_schedule"))


def changed_inputs(before, now):
    """Which of a run's inputs have another hash than before: a phrase for each."""
    before = {**{name: now[name] for name in LATER if name in now}, **before}
    names = sorted({*before, *now})
    hashes = [(name, before.get(name), now.get(name)) for name in names]
    return [
        f"hash of {name} {short(str(old))} -> {short(str(new))}"
        for name, old, new in hashes
        if old != new
    ]


def begun(folder):
    """Is there anything that a run would go on from? A log alone is not: it starts over."""
    if any(folder.glob("step-[0-9]*")):
        return True
    return finished.is_finished(folder) or bool(states.present(folder))


def summary_of_finished(folder, steps):
    """The summary of a run that ended after `steps`. Raises UserError: its weights are gone."""
    if not any((folder / name).exists() for name in WEIGHTS):
        raise UserError(
            f"{folder} holds a finished run, but {WEIGHTS[0]} is gone; bring it back, or train "
            f"again with --overwrite"
        )
    aside.discard(folder)
    states.keep_one(folder, steps)
    locks.unlock(folder)
    return finished.summary(folder)
