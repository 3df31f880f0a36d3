"""Answers on disk while a task is unfinished, so that the same command goes on where it stopped.

OUT/NAME.partial-RANK.jsonl, one file per rank: a line with the settings, then a line per answer in
the order in which they ended. OUT/NAME.jsonl takes their place when the task is finished.
"""

import json
import time

from tqdm import tqdm

from common import files
from common.errors import UserError
from evaluation.pinned import read_rows
from evaluation.results import read_entries

# The settings that decide the answers; the others (device, batch) only decide their speed.
IDENTITY = ("model_hash", "prompt_hash", "mode", "dtype", "max_new_tokens")


def partial_files(out, name):
    return sorted(out.glob(f"{name}.partial-*.jsonl"))


def keep(answers, path, settings, grader, bar):
    """Write each answer down as it comes, and show how far and how good it is.

    answers: yields (i, text, number of tokens). Returns {i: text}.
    """
    size = whole_lines(path)
    file = files.Growing(path, size)
    files.lock(path)
    if size == 0:
        file.write(line_of({"settings": settings}))
    texts = {}
    n_tokens = 0
    started = time.perf_counter()
    for i, text, tokens in answers:
        file.write(line_of({"idx": i, "text": text}))
        grader.add(i, text)
        texts[i] = text
        n_tokens += tokens
        speed = n_tokens / (time.perf_counter() - started)
        bar.set_postfix_str(f"{grader.accuracy()} right, {speed:.0f} tok/s", refresh=False)
        bar.update()
    file.close()
    return texts


def line_of(record):
    return (json.dumps(record) + "\n").encode()


def progress_bar(name, n, n_before, shown):
    """n problems in all, n_before of them answered earlier."""
    return tqdm(total=n, initial=n_before, desc=name, unit="problem", disable=not shown)


def whole_lines(path):
    """Bytes of a file's whole lines: a kill may have cut the last one."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_answers(out, name):
    """{i: text} of all ranks' unfinished files; a last line that a kill cut short is left out."""
    texts = {}
    for path in partial_files(out, name):
        for line in path.read_text().split("\n")[1:-1]:
            row = json.loads(line)
            texts[row["idx"]] = row["text"]
    return texts


def saved_settings(path):
    """The settings in an unfinished file's first line; None where a kill cut it."""
    first = path.read_text().split("\n")[0]
    return json.loads(first)["settings"] if first.endswith("}") else None


def earlier_answers(out, name, settings, overwrite):
    """{i: text} of what was answered before with these settings.

    overwrite: start over instead; what was finished stays aside until `replaced`. Raises UserError
    where it was made with other settings, or where the task's file is not one of ours.
    """
    finished = out / f"{name}.jsonl"
    files.refuse_foreign([out / "results.json", finished, *partial_files(out, name)])
    if overwrite:
        for path in partial_files(out, name):
            files.remove(path)
        if finished.exists():
            files.rename(finished, set_aside(out, name))
        return {}
    for path in partial_files(out, name):
        check_same(path, saved_settings(path) or settings, settings)
    texts = {}
    entries = read_entries(out)
    # Answers whose results a kill kept from being written still stand in the unfinished files.
    if finished.exists() and name in entries:
        check_same(finished, entries[name].get("settings", {}), settings)
        texts = {row["idx"]: row["text"] for row in read_rows(finished)}
    return texts | read_answers(out, name)


def set_aside(out, name):
    """Where the answers are that --overwrite replaces."""
    return out / f"{name}.before.jsonl"


def replaced(out, name):
    """The task's file is there: what was unfinished, or stood before it, goes."""
    for path in [*partial_files(out, name), set_aside(out, name)]:
        files.remove(path)


def check_same(path, theirs, ours):
    """UserError where a file's answers were made with other settings, naming each."""
    differing = [
        f"{key} {theirs.get(key)!r} -> {ours[key]!r}"
        for key in IDENTITY
        if theirs.get(key) != ours[key]
    ]
    if differing:
        raise UserError(
            f"{path} holds other answers ({'; '.join(differing)}); "
            f"choose another --out or start the task over with --overwrite"
        )
