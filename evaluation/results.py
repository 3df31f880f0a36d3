"""What becomes of verdicts: files, standard errors, tables beside the paper's rows.

results = regrade("outputs.jsonl", "math", "out/again")   # also the Rho-1 authors' outputs
print(table(results))
print(markdown(results))
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.errors import UserError
from common.files import remove, write_atomic
from common.locks import taking_turns
from common.owned import refuse_foreign
from common.records import as_record, at_least, between, read_json
from evaluation import sampling
from evaluation.answers import normalize
from evaluation.grading import grade_many, judge, spread
from evaluation.pinned import read_rows
from evaluation.tasks import label

Percent = Annotated[float, between(0, 100)]

# --------------------------------------------------------------------------------------------------
# files


@dataclass
class Entry:
    """What results.json says of a task; shares and their standard errors in percent."""

    task: str
    n: Annotated[int, at_least(0)]
    published: Percent
    published_se: Percent
    strict: Percent
    strict_se: Percent
    failed: Annotated[int, at_least(0)]
    settings: dict[str, Any]


def summarize(results, samples=1):
    """{n, published, published_se, strict, strict_se, failed} of n problems.

    Shares and their standard errors in percent; failed: answers with no verdict. results: problem
    by problem, `samples` of each; of several also pass@k and maj@k, see sampling.summarize.
    """
    problems = [results[at : at + samples] for at in range(0, len(results), samples)]
    summary = {"n": len(problems)}
    for name in ("published", "strict"):
        shares = [sum(result[name] for result in each) / samples for each in problems]
        summary |= sampling.percent(name, shares)
    if samples > 1 and problems:
        summary |= sampling.summarize(problems)
    summary["failed"] = sum(r["reason"] not in ("", "no answer found") for r in results)
    return summary


def read_entries(out_dir):
    """results.json of a folder, {} where there is none."""
    file = Path(out_dir) / "results.json"
    if not file.exists():
        return {}
    mend = "bring back a copy of it, or choose another --out"
    entries = read_json(file, "earlier results", mend)
    as_record(entries, dict[str, Entry], f"earlier results: {file}", mend)
    return entries


def write_results(
    task,
    texts,
    results,
    out_dir,
    settings,
    name=None,
    samples=1,
    reasons=None,
    numbers=None,
    **more,
):
    """Write out_dir/NAME.jsonl, a line per answer, and enter NAME in out_dir/results.json.

    A line holds idx, pred, gt, published, strict, reason and the text itself, so that it can be
    graded again; also the truth as it was written, where gt is less, the number of the sample,
    where there are several `samples` of each problem, and why the text ended, where that is known
    (`reasons`, in the order of the texts). name: by default the task's. numbers: each text's idx,
    where that is not its place.
    Returns all of results.json: {name: summary, more, task and settings}.
    """
    out_dir = Path(out_dir)
    name = name or label(task)
    entry = {"task": label(task), **summarize(results, samples), **more, "settings": settings}
    lines = []
    for place, (text, result) in enumerate(zip(texts, results)):
        idx = numbers[place] if numbers else place // samples
        number = {"sample": place % samples} if samples > 1 else {}
        ended = {"finish_reason": reasons[place]} if reasons and reasons[place] else {}
        lines.append({"idx": idx, **number, **result, **ended, "text": text})
    with taking_turns(out_dir):  # other tasks may be written by other processes
        entries = read_entries(out_dir) | {name: entry}
        write_atomic(out_dir / "results.json", json.dumps(entries, indent=1) + "\n")
    # Last: a task is finished when its answers are there, and its entry is their settings.
    write_atomic(out_dir / f"{name}.jsonl", json_lines(lines))
    return entries


def json_lines(objects):
    return "".join(json.dumps(line) + "\n" for line in objects)


# --------------------------------------------------------------------------------------------------
# grading a file again


def regrade(file, task, out_dir, settings=None, name=None, overwrite=False):
    """Grade a JSONL of generations again, with no model: ours, or as the Rho-1 authors released.

    A line needs `gt` and the raw generation in `text` or, as released, in `code[0]`. Where lines
    hold the authors' pred and score, the entry in results.json also says on how many samples our
    answer and our verdict are theirs (agree_pred, agree_score, in percent), and
    out_dir/NAME.differences.jsonl lists the others with the reason.
    Returns all of results.json. Raises UserError with file and line for a line that is unusable,
    and where another file's verdicts are there, unless `overwrite`.
    """
    name = name or label(task)
    settings = settings or {"regraded": str(file)}
    refuse_foreign([Path(out_dir) / f"{name}.jsonl"])
    earlier = read_entries(out_dir).get(name)
    if earlier and "regraded" not in earlier["settings"]:
        raise UserError(
            f"--out {out_dir}: holds a model's own answers to {name}, which would be lost; choose "
            f"another --out"
        )
    theirs = earlier["settings"]["regraded"] if earlier else None
    if earlier and theirs != settings.get("regraded") and not overwrite:
        raise UserError(
            f"--out {out_dir}: holds the verdicts on {theirs} as {name}; choose another --out, or "
            f"replace them with --overwrite"
        )
    rows = read_rows(file)
    if not rows:
        raise UserError(f"--regrade: {file} has no line, wanted a generation a line")
    texts = [text_of(row, f"{file}, sample {line}") for line, row in enumerate(rows, 1)]
    samples = [(text, row["gt"], row.get("truth")) for text, row in zip(texts, rows)]
    results = grade_many(task, samples)
    more = {}
    differing = Path(out_dir) / f"{name}.differences.jsonl"
    if earlier and differing.exists():
        remove(differing)
    if all(has_verdict(row) for row in rows):
        more, differences = compare(rows, results)
        write_atomic(differing, json_lines(differences))
    reasons = [row.get("finish_reason") for row in rows]  # in a file of ours
    return write_results(
        task,
        texts,
        results,
        out_dir,
        settings,
        name,
        samples_in(rows),
        reasons,
        idx_of(rows),
        **more,
    )


def samples_in(rows):
    """How many samples of each problem a file holds, problem by problem; 1 where it says none."""
    numbers = [row.get("sample", 0) for row in rows]
    if not rows or not all(type(number) is int for number in numbers):
        return 1
    samples = 1 + max(numbers)
    regular = numbers == [place % samples for place in range(len(rows))]
    return samples if regular and len(rows) % samples == 0 else 1


def idx_of(rows):
    """The number of each line's problem, as the file says it; by place where it does not."""
    numbers = [row.get("idx") for row in rows]
    if all(type(number) is int and number >= 0 for number in numbers):
        return numbers
    samples = samples_in(rows)
    return [place // samples for place in range(len(rows))]


def text_of(row, where):
    """The generation in a line."""
    text = row.get("text", row.get("code"))
    if isinstance(text, list) and len(text) > 1:
        raise UserError(
            f"{where}: got {len(text)} generations in a line, wanted one; write a line for each, "
            f"with its number as sample"
        )
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str) or "gt" not in row:
        raise UserError(
            f"{where}: got fields {' '.join(row)}, wanted gt and text (or code); "
            f"name a file of generations"
        )
    return text


def has_verdict(row):
    """Does a line hold the authors' own answer and verdict?"""
    lists = row.get("score"), row.get("pred")
    return all(isinstance(values, list) and values for values in lists)


def compare(rows, results):
    """Our verdicts beside the authors': ({agree_pred, agree_score} in percent, differences)."""

    def same_answer(worker, pair):
        return pair[0] == pair[1] or judge(worker, *pair)[0]

    preds = [(ours["pred"], normalize(row["pred"][0])) for row, ours in zip(rows, results)]
    same = spread(same_answer, preds, "comparing")
    differences = []
    n_agree = 0
    for idx, row, ours, alike in zip(idx_of(rows), rows, results, same):
        agree = ours["published"] == row["score"][0]
        n_agree += agree
        if alike and agree:
            continue
        if not alike:
            reason = "extracted or normalised to another answer"
        elif ours["reason"]:
            reason = ours["reason"]
        else:
            verb = "equals" if ours["published"] else "is not"
            reason = f"same answer; it {verb} the truth here"
        differences.append(
            {
                "idx": idx,
                "gt": row["gt"],
                "pred": ours["pred"],
                "published": ours["published"],
                "their_pred": row["pred"][0],
                "their_score": row["score"][0],
                "reason": reason,
            }
        )
    shares = {
        "agree_pred": round(100 * sum(same) / len(rows), 2),
        "agree_score": round(100 * n_agree / len(rows), 2),
    }
    return shares, differences


# --------------------------------------------------------------------------------------------------
# tables

COLUMNS = "gsm8k math svamp asdiv mawps tabmwp mathqa mmlu_stem sat".split()
PAPER = {  # Rho-1, tables 1 and 2, in percent; tool-integrated rows have GSM8K and MATH only
    "cot": {
        "TinyLlama-1.1B": (2.9, 3.2, 11.0, 18.1, 20.4, 12.5, 14.6, 16.1, 21.9),
        "TinyLlama-CT (CLM, 15B tokens)": (6.4, 2.4, 21.7, 36.7, 47.7, 17.9, 13.9, 23.0, 25.0),
        "Rho-1-Math-1B (15B tokens)": (29.8, 14.0, 49.2, 61.4, 79.8, 25.8, 30.4, 24.7, 28.1),
        "Rho-1-Math-1B (30B selected)": (36.2, 15.6, 52.1, 67.0, 83.9, 29.0, 32.5, 23.3, 28.1),
        "Mistral-7B": (41.2, 11.6, 64.7, 68.5, 87.5, 52.9, 33.0, 49.5, 59.4),
        "Mistral-CT (CLM, 15B tokens)": (42.9, 22.2, 68.6, 71.0, 86.1, 45.1, 47.7, 52.6, 65.6),
        "Rho-1-Math-7B (15B tokens)": (66.9, 31.0, 77.8, 79.0, 93.9, 49.9, 58.7, 54.6, 84.4),
        "DeepSeekMath-7B": (64.1, 34.2),
    },
    "tool": {
        "TinyLlama-CT (CLM, 15B tokens)": (51.4, 38.4),
        "Rho-1-Math-1B-Interpreter": (59.4, 40.6),
        "Mistral-CT (CLM, 15B tokens)": (77.5, 48.4),
        "Rho-1-Math-7B-Interpreter": (81.3, 51.8),
        "DeepSeekMath-7B": (79.8, 52.0),
    },
}


def table(results):
    """results.json for the screen: a line per task, percent ± one standard error, and the mean."""
    lines = [f"{'task':<16} {'n':>5}  {'published':>13}  {'strict':>13}  {'no verdict':>10}"]
    for name, entry in results.items():
        published, strict = (
            f"{entry[key]:6.1f} ± {entry[key + '_se']:4.1f}" for key in ("published", "strict")
        )
        lines.append(f"{name:<16} {entry['n']:>5}  {published}  {strict}  {entry['failed']:>10}")
        lines += sampled_lines(entry)
    # A mean of several models, or of other ways to decode, would be nobody's.
    of_paper = [entry for entry in results.values() if entry["task"] in COLUMNS]
    if len(of_paper) > 1 and len({made_by(entry) for entry in results.values()}) == 1:
        published, strict = (mean(of_paper, key) for key in ("published", "strict"))
        named = "mean" if len(of_paper) == len(results) else f"mean of {len(of_paper)}"
        lines.append(f"{named:<16} {'':>5}  {published:6.1f}{'':7}  {strict:6.1f}")
    return "\n".join(lines)


def mean(entries, key):
    return sum(entry[key] for entry in entries) / len(entries)


def made_by(entry):
    """(whose answers they are, how they were decoded)."""
    settings = entry["settings"]
    return whose(entry), settings.get("mode"), settings.get("temperature")


def whose(entry):
    """The model, or the file of generations, that a task's answers are from."""
    settings = entry["settings"]
    return str(settings.get("model") or settings.get("regraded") or "this run")


def sampled_lines(entry):
    """Lines for the screen of an entry with several samples: pass@k and maj@k, k above 1."""
    lines = []
    for what in ("pass", "maj"):
        for k, shares in entry.get(what, {}).items():
            if k == "1":  # the mean over all samples, which stands above
                continue
            published, strict = (
                f"{shares[key]:6.1f} ± {shares[key + '_se']:4.1f}"
                for key in ("published", "strict")
            )
            name = f"  {what}@{k}"
            lines.append(f"{name:<16} {'':>5}  {published}  {strict}")
    return lines


def markdown(results):
    """results.json as Markdown: our two accuracies above the paper's rows, then the settings.

    Answers of several models have rows of their own.
    """
    text = []
    for mode, paper in PAPER.items():
        ours = {
            name: entry
            for name, entry in results.items()
            if entry["settings"].get("mode", "cot") == mode
        }
        if ours:
            text += mode_table(ours, paper) + settings_list(ours, mode)
    return "\n".join(text)


def mode_table(ours, paper):
    """Lines of Markdown: our accuracies in percent, then the paper's.

    With all nine tasks also the paper's average over them.
    """
    average = set(COLUMNS) <= {entry["task"] for entry in ours.values()}
    columns = [*ours, "average of the nine"] if average else [*ours]
    lines = [line_of(["model", *columns]), "|---|" + "---:|" * len(columns)]
    for model in dict.fromkeys(map(whose, ours.values())):
        own = [entry for entry in ours.values() if whose(entry) == model]
        nine = [entry for entry in own if entry["task"] in COLUMNS]
        for key in ("published", "strict"):
            cells = [
                f"**{entry[key]:.1f}** ± {entry[key + '_se']:.1f}" if whose(entry) == model else ""
                for entry in ours.values()
            ]
            if average:
                cells.append(f"**{mean(nine, key):.1f}**" if len(nine) == len(COLUMNS) else "")
            lines.append(line_of([f"{model}, {key}", *cells]))
    for model, row in paper.items():
        known = dict(zip(COLUMNS, row))
        cells = [str(known.get(entry["task"], "")) for entry in ours.values()]
        if not any(cells):
            continue
        if average:
            whole = len(row) == len(COLUMNS)
            cells.append(f"{sum(row) / len(row):.1f}" if whole else "")
        lines.append(line_of([f"{model}, as published", *cells]))
    return lines


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def settings_list(ours, mode):
    """Lines of Markdown: the settings behind each number."""
    lines = ["", f"Percent ± one standard error; mode {mode}. Settings:", ""]
    for name, entry in ours.items():
        settings = ", ".join(f"{key} {value}" for key, value in entry["settings"].items())
        lines.append(
            f"- {name}: {entry['n']} problems, {entry['failed']} without a verdict; "
            f"{settings or 'none'}"
        )
    return [*lines, ""]
