"""results/NAME.json: what was run, with everything that its numbers may depend on.

    {"experiment": "roundings", "command": "bash runs/roundings.sh", "note": "", "runs": [...]}

A run is a `Run` below. It is known by (method, seed, variant): adding it again replaces it, so an
experiment grows run by run and may be done again in part. One run stands in each line, so that a
diff shows what changed.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from common.errors import UserError
from common.owned import temporary_of
from common.records import as_record, at_least, matching, read_record

ROOT = Path(__file__).resolve().parents[2]
OWN = os.environ.get("KIT_RESULTS")  # a folder for runs that only try a script out, and for tests
FOLDER = Path(OWN or ROOT / "results")
FIGURES = FOLDER / "figures" if OWN else ROOT / "figures"
FIRST = "first-"  # before the names of experiments in the demo's first setting

Name = Annotated[str, matching(r"[a-z0-9][a-z0-9-]*", "small letters, digits and hyphens")]


@dataclass
class Run:
    method: str  # base, ref, clm, slm, ...
    seed: Annotated[int, at_least(0)]
    variant: str  # what differs between runs of one method and seed; "" where nothing does
    numbers: dict[str, float | None]  # of summary.json: val_loss, exact_match, tokens_seen, ...
    curve: list[list[float]]  # [tokens seen, validation loss] of each validation
    arguments: dict[str, Any]  # of args.json, without the names of folders
    inputs: dict[str, str]  # hashes of what was read
    made: dict[str, Any]  # commit, date, versions, machine, environment


@dataclass
class Experiment:
    experiment: Name
    command: str  # makes it, or goes on with it
    note: str = ""  # said above each of its tables, as that it is older than the code
    runs: list[Run] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # {variant: why}


def path_of(name):
    return FOLDER / f"{name}.json"


def load(name):
    """The `Experiment`. Raises UserError where its file is missing or not as it should be."""
    path = path_of(name)
    if not path.exists():
        raise UserError(f"results: {path} does not exist; the scripts in runs/ make such files")
    return read_record(path, Experiment, "results", "take the file of the repository")


def load_or_new(name, command):
    """The `Experiment` of the file, or where there is none an empty one that `command` makes."""
    if path_of(name).exists():
        return load(name)
    return as_record({"experiment": name, "command": command}, Experiment, "results")


def save(experiment):
    """Write it, one run a line, in a fixed order."""
    head = asdict(experiment)
    runs = sorted(head.pop("runs"), key=key_of)
    lines = ",\n".join("  " + json.dumps(run, sort_keys=True) for run in runs)
    text = json.dumps(head, indent=1, sort_keys=True)
    replace_text(path_of(experiment.experiment), f'{text[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')


def key_of(run):
    return run["variant"], run["seed"], run["method"]


def add(experiment, run):
    """Put a `Run` in, in place of an earlier one of that method, seed and variant.

    Raises UserError where that one has another number of steps: it would be lost for a trial. And
    where the method and seed were run on other data: the two do not belong in one table.
    """
    key = key_of(asdict(run))
    path = path_of(experiment.experiment)
    for old in experiment.runs:
        steps, now = old.arguments.get("steps"), run.arguments.get("steps")
        if key_of(asdict(old)) == key and steps != now:
            raise UserError(
                f"results: {path} has {run.method} of seed {run.seed} with {steps} steps, this one "
                f"has {now}; set KIT_RESULTS to a folder of your own"
            )
        same = (old.method, old.seed) == (run.method, run.seed)
        if same and old.inputs.get("data") != run.inputs.get("data"):
            raise UserError(
                f"results: {path} has {run.method} of seed {run.seed}, trained on other data than "
                f"this one; move the file away, or set KIT_RESULTS to a folder of your own"
            )
    experiment.runs = [old for old in experiment.runs if key_of(asdict(old)) != key]
    experiment.runs.append(run)


def replace_text(path, text):
    """Write a file of the repository: a kill leaves the old text or the new one."""
    path.parent.mkdir(exist_ok=True)
    temporary = temporary_of(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
