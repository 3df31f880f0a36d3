"""Answers on disk while a task is unfinished, so that the same command goes on where it stopped.

OUT/NAME.partial-RANK.jsonl, one file per rank: a line with the settings, then a line per answer in
the order in which they ended. An answer's key is (place of its problem, number of the sample).
OUT/NAME.jsonl takes their place when the task is finished.
"""

import glob
import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from tqdm import tqdm

from common import files, locks, owned
from common.errors import UserError
from common.json_files import parse_text, regular_size, shown
from common.records import as_record, at_least
from evaluation.pinned import read_rows
from evaluation.results import read_entries

# The settings that decide the answers; the others (device, batch) only decide their speed.
IDENTITY = (
    "model_hash",
    "config_hash",
    "prompt_hash",
    "mode",
    "dtype",
    "max_new_tokens",
    "temperature",
    "seed",
)
LATER = ("config_hash",)  # what older files do not have

MEND = "start the task over with --overwrite"


@dataclass
class Begun:
    """The first line of an unfinished file."""

    settings: dict[str, Any]


@dataclass
class Answer:
    """Another line, and a line of a finished file."""

    idx: Annotated[int, at_least(0)]
    text: str
    sample: Annotated[int, at_least(0)] = 0
    finish_reason: str | None = None  # None: it was written before this was noted


class Given(NamedTuple):
    """An answer."""

    text: str
    finish_reason: str | None


def partial_file(out, name, rank):
    return out / f"{name}.partial-{rank}.jsonl"


def partial_files(out, name):
    return sorted(out.glob(f"{glob.escape(name)}.partial-*.jsonl"))


def keep(answers, path, settings, grader, bar):
    """Write each answer down as it comes, and show how far and how good it is.

    answers: yields (key, reasoning.Reply). Returns {key: Given}.
    """
    locks.lock(path)
    size = whole_lines(path)
    file = files.Growing(path, size)
    if size == 0:
        file.write(line_of({"settings": settings}))
    given = {}
    n_tokens = 0
    started = time.perf_counter()
    for key, reply in answers:
        given[key] = Given(reply.text, reply.finish_reason)
        file.write(line_of({"idx": key[0], "sample": key[1], **given[key]._asdict()}))
        grader.add(key, reply.text)
        n_tokens += reply.tokens
        speed = n_tokens / (time.perf_counter() - started)
        bar.set_postfix_str(f"{grader.accuracy()} right, {speed:.0f} tok/s", refresh=False)
        bar.update()
    file.close()
    return given


def line_of(record):
    return (json.dumps(record) + "\n").encode()


def progress_bar(name, n, n_before, shown):
    """n answers in all, n_before of them given earlier."""
    return tqdm(total=n, initial=n_before, desc=name, unit="answer", disable=not shown)


def whole_lines(path):
    """Bytes of a file's whole lines: a kill may have cut the last one."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_answers(out, name):
    """{key: Given} of all ranks' unfinished files, without a last line that a kill cut short."""
    given = {}
    for path in partial_files(out, name):
        for row in list(records_of(path))[1:]:
            given[key_of(row)] = given_by(row)
    return given


def given_by(row):
    return Given(row["text"], row.get("finish_reason"))


def key_of(row):
    """An answer's (place of its problem, number of the sample)."""
    return row["idx"], row.get("sample", 0)


def saved_settings(path):
    """The settings in an unfinished file's first line; None where a kill cut it. UserError."""
    first = next(records_of(path), None)
    return first["settings"] if first else None


def records_of(path):
    """The records in an unfinished file's whole lines. Raises UserError where one is broken."""
    regular_size(path, "unfinished answers")
    for number, line in enumerate(path.read_bytes()[: whole_lines(path)].splitlines(), 1):
        where = f"{path}: line {number} is broken"
        try:
            record = parse_text(line.decode())
        except ValueError as error:
            raise UserError(f"{where} ({error}); {MEND}") from None
        as_record(record, Begun if number == 1 else Answer, where, MEND)
        yield record


def lock_task(out, name):
    """Keep other processes from a task until `replaced`. Raises UserError where one is at it.

    Or where one of the task's files is somebody else's.
    """
    written = [f"{name}.jsonl", "results.json", "results.md"]
    owned.refuse_foreign(out / file for file in written)
    owned.refuse_foreign([set_aside(out, name), *partial_files(out, name)])
    locks.lock(partial_file(out, name, 0))


def start_over(out, name):
    """--overwrite: answers that are unfinished go, finished ones stay aside until `replaced`."""
    lock_task(out, name)
    for path in partial_files(out, name):
        files.Growing(path, 0).close()  # its lock must stay
    finished = out / f"{name}.jsonl"
    if finished.exists():
        files.rename(finished, set_aside(out, name))


def earlier_answers(out, name, settings):
    """{key: Given} of what was answered before with these settings; the task is locked.

    Raises UserError where it was made with other ones, and as `lock_task` does.
    """
    lock_task(out, name)
    try:
        return answers_on_disk(out, name, settings)
    except UserError:
        if partial_file(out, name, 0).stat().st_size == 0:
            files.remove(partial_file(out, name, 0))
        raise


def answers_on_disk(out, name, settings):
    """`earlier_answers`, when the task is locked."""
    finished = out / f"{name}.jsonl"
    for path in partial_files(out, name):
        check_same(path, saved_settings(path) or settings, settings)
    given = {}
    if finished.exists():
        entries = read_entries(out)
        if name not in entries:  # it is written first
            raise UserError(
                f"{finished} has answers, and results.json beside it does not say how they were "
                f"made; bring it back, choose another --out or {MEND}"
            )
        check_same(finished, entries[name].get("settings", {}), settings)
        given = finished_answers(finished)
    return given | read_answers(out, name)


def refuse_another_model(out, names, model, model_hash):
    """Raises UserError where tasks but `names` were answered by another model of this name.

    They would stand in one row of the table.
    """
    for other, entry in read_entries(out).items():
        theirs = entry["settings"]
        if other in names or theirs.get("model") != model:
            continue
        if theirs.get("model_hash") not in (None, model_hash):
            raise UserError(
                f"--out {out}: {other} was answered by another {model} (its weights were "
                f"{theirs['model_hash']}, are {model_hash}); choose another --out"
            )


def refuse_unfinished(out, name):
    """Raises UserError where a model's answers to a task are unfinished: it would not go on."""
    if read_answers(out, name):
        raise UserError(
            f"--out {out}: holds a model's unfinished answers to {name}; let that command end "
            f"first, or choose another --out"
        )


def finished_answers(path):
    """{key: Given} of a finished file. Raises UserError where a line is broken."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        as_record(row, Answer, f"{path}: answer {number}", MEND)
    return {key_of(row): given_by(row) for row in rows}


def set_aside(out, name):
    """Where the answers are that --overwrite replaces."""
    return out / f"{name}.before.jsonl"


def replaced(out, name):
    """The task's file is there: what was unfinished, or stood before it, goes."""
    for path in [*partial_files(out, name), partial_file(out, name, 0), set_aside(out, name)]:
        files.remove(path)
    locks.unlock(partial_file(out, name, 0))


def check_same(path, theirs, ours):
    """UserError where a file's answers were made with other settings, naming each."""
    differing = [
        f"{key} {shown(theirs.get(key))} -> {shown(ours.get(key))}"
        for key in IDENTITY
        if theirs.get(key) != ours.get(key) and not (key in LATER and key not in theirs)
    ]
    if differing:
        raise UserError(
            f"{path} holds other answers ({'; '.join(differing)}); "
            f"choose another --out or start the task over with --overwrite"
        )
