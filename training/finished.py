"""What others read of a run's folder: its arguments, its log, its summary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from common.errors import UserError
from common.records import FINITE, as_record, at_least, between, read_json, read_lines

AGAIN = "train again with --overwrite"

NotNegative = Annotated[float, at_least(0), FINITE]
Count = Annotated[int, at_least(0)]
Size = Annotated[int, at_least(1)]


@dataclass
class Arguments:
    """args.json. Those of train_ref.py have no k: it keeps every token."""

    inputs: dict[str, str]  # hashes of what was read
    init: str
    data: str
    steps: Size
    seq_len: Size
    batch_size: Size
    micro_batch_size: Size
    lr: Annotated[float, FINITE]
    seed: Count
    k: Annotated[float, between(0, 1), FINITE] = 1.0
    score: str | None = None
    scope: str | None = None
    ref_loss: str | None = None
    document_mask: bool = False
    min_lr: Annotated[float, FINITE] | None = None
    epochs: NotNegative | None = None
    execution: dict[str, Any] = field(default_factory=dict)  # flags that change no number


@dataclass
class Step:
    """A line of log.jsonl."""

    tokens_seen: Count
    tokens_selected: Count = 0
    loss: float | None = None
    loss_selected: float | None = None
    threshold: float | None = None
    val_loss: float | None = None
    val_loss_by_kind: dict[str, float] = field(default_factory=dict)
    val_loss_by_set: dict[str, float] = field(default_factory=dict)  # of several --val
    seconds: NotNegative = 0.0  # of the run so far
    reference_lead: float | None = None  # see training/lead.py
    kept: dict[str, NotNegative] = field(default_factory=dict)


@dataclass
class Summary:
    """summary.json: it is there when the run is finished."""

    val_loss: float | None
    exact_match: NotNegative | None
    tokens_seen: Count
    tokens_selected: Count
    seconds: NotNegative = 0.0
    tok_per_s: NotNegative | None = None
    val_loss_by_set: dict[str, float] = field(default_factory=dict)
    reference_lead: float | None = None


def arguments(folder):
    """args.json of a run, a dict. Raises UserError where `folder` is none."""
    path = Path(folder) / "args.json"
    if not path.exists():
        raise UserError(
            f"--run: {folder} is not a run (no args.json); "
            f"name a folder of train_slm.py or train_ref.py"
        )
    return _checked(path, Arguments, "run")


def is_finished(folder):
    """Has the run in `folder` come to its end?"""
    return (Path(folder) / "summary.json").exists()


def summary(folder, what="run"):
    """summary.json of a run, a dict. Raises UserError."""
    return _checked(Path(folder) / "summary.json", Summary, what)


def steps(folder):
    """A run's log.jsonl, a dict a step. Raises UserError where there is none."""
    path = Path(folder) / "log.jsonl"
    found = read_lines(path, Step, "run", AGAIN)
    if not found:
        raise UserError(f"run: {path} has no step; the command that began the run goes on")
    return found


def reached(curve, target):
    """Tokens from which on a curve of (tokens, loss) stays at `target` or below, or None.

    Interpolated between two validations. What holds before the first step does not count.
    """
    before, found = None, None  # the last point above, and the first one after it
    for point in curve:
        tokens, loss = point
        if not loss <= target:  # nor is what is not a number
            before, found = point, None
        elif found is None and tokens > 0:
            found = point
    if found is None:
        return None
    if before is None:
        return found[0]
    share = (before[1] - target) / (before[1] - found[1])
    return before[0] + share * (found[0] - before[0])


def _checked(path, kind, what):
    raw = read_json(path, what, AGAIN)
    as_record(raw, kind, f"{what}: {path}", AGAIN)
    return raw
