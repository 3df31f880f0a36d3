"""What becomes of verdicts: files, standard errors, tables beside the paper's rows, and grading a file again.

results = regrade("outputs.jsonl", "math", "out/again")     # also the Rho-1 authors' released format
print(table(results)); print(markdown(results))
"""

import json
import math
from pathlib import Path

from common.errors import UserError
from common.files import write_atomic
from evaluation.answers import normalize
from evaluation.grading import grade_many, judge, spread
from evaluation.tasks import read_rows

# ---------------------------------------------------------------------------------------------------------------------
# files


def summarize(results):
    """{n, published, published_se, strict, strict_se, failed}: percent, standard errors; samples with no verdict."""
    summary, n = {"n": len(results)}, max(len(results), 1)
    for name in ("published", "strict"):
        share = sum(result[name] for result in results) / n
        summary[name], summary[name + "_se"] = (
            round(100 * share, 2),
            round(100 * math.sqrt(share * (1 - share) / n), 2),
        )
    return summary | {
        "failed": sum(result["reason"] not in ("", "no answer found") for result in results)
    }


def write_results(task, texts, results, out_dir, settings, name=None, **more):
    """Write out_dir/NAME.jsonl, a line per sample, and enter NAME (by default the task) in out_dir/results.json.

    A line holds idx, pred, gt, published, strict, reason and the text itself, so that it can be graded again.
    Returns all of results.json: {name: summary, more, task and settings}.
    """
    out_dir, name, entries = Path(out_dir), name or task, {}
    file = out_dir / "results.json"
    if file.exists():
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{file}: got broken JSON ({error}), wanted earlier results; "
                f"delete it or choose another --out"
            ) from error
    entries[name] = {"task": task, **summarize(results), **more, "settings": settings}
    lines = [
        {"idx": idx, **result, "text": text}
        for idx, (text, result) in enumerate(zip(texts, results))
    ]
    write_atomic(out_dir / f"{name}.jsonl", json_lines(lines))
    write_atomic(file, json.dumps(entries, indent=1) + "\n")
    return entries


def json_lines(objects):
    return "".join(json.dumps(line) + "\n" for line in objects)


def regrade(file, task, out_dir, settings=None, name=None, workers=None):
    """Grade a JSONL of generations again, with no model: our own files, or outputs as the Rho-1 authors released them.

    A line needs `gt` and the raw generation in `text` or, as released, in `code[0]`. Where lines hold the authors'
    pred and score, the entry in results.json also says on how many samples our answer and our verdict are theirs
    (agree_pred, agree_score, in percent), and out_dir/NAME.differences.jsonl lists the others with the reason.
    Returns all of results.json. Raises UserError with file and line number for a line that cannot be read.
    """
    rows, texts, more = read_rows(file), [], {}
    for line, row in enumerate(rows, 1):
        text = row.get("text", row.get("code"))
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or "gt" not in row:
            raise UserError(
                f"{file}, sample {line}: got fields {' '.join(row)}, wanted gt and text (or code); "
                f"name a file of generations"
            )
        texts.append(text)
    results = grade_many(task, [(text, row["gt"]) for text, row in zip(texts, rows)], workers)
    if rows and all(
        isinstance(row.get("score"), list) and isinstance(row.get("pred"), list) for row in rows
    ):
        preds = [(ours["pred"], normalize(row["pred"][0])) for row, ours in zip(rows, results)]
        same = spread(
            lambda slot, pair: pair[0] == pair[1] or judge(slot, *pair)[0],
            preds,
            workers,
            "comparing",
        )
        differences = []
        for idx, (row, ours, alike) in enumerate(zip(rows, results, same)):
            if alike and ours["published"] == row["score"][0]:
                continue
            reason = (
                ours["reason"]
                or f"same answer; it {'equals' if ours['published'] else 'is not'} the truth here"
            )
            differences.append(
                {
                    "idx": idx,
                    "gt": row["gt"],
                    "pred": ours["pred"],
                    "published": ours["published"],
                    "their_pred": row["pred"][0],
                    "their_score": row["score"][0],
                    "reason": reason if alike else "extracted or normalised to another answer",
                }
            )
        agree = sum(row["score"][0] == ours["published"] for row, ours in zip(rows, results))
        more = {
            "agree_pred": round(100 * sum(same) / len(rows), 2),
            "agree_score": round(100 * agree / len(rows), 2),
        }
        write_atomic(Path(out_dir) / f"{name or task}.differences.jsonl", json_lines(differences))
    return write_results(
        task, texts, results, out_dir, settings or {"regraded": str(file)}, name, **more
    )


# ---------------------------------------------------------------------------------------------------------------------
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
    """results.json as text for the screen: a line per task, percent with one standard error, and the mean."""
    lines = [f"{'task':<16} {'n':>5}  {'published':>13}  {'strict':>13}  {'no verdict':>10}"]
    for name, entry in results.items():
        cells = [
            f"{entry[key]:6.1f} ± {entry[key + '_se']:4.1f}" for key in ("published", "strict")
        ]
        lines.append(f"{name:<16} {entry['n']:>5}  {cells[0]}  {cells[1]}  {entry['failed']:>10}")
    if len(results) > 1:
        means = [
            sum(entry[key] for entry in results.values()) / len(results)
            for key in ("published", "strict")
        ]
        lines.append(f"{'mean':<16} {'':>5}  {means[0]:6.1f}{'':7}  {means[1]:6.1f}")
    return "\n".join(lines)


def markdown(results, label="this run"):
    """results.json as Markdown: our published and strict accuracy above the paper's rows, then the settings used."""
    text = []
    for mode in ("cot", "tool"):
        ours = {
            name: entry
            for name, entry in results.items()
            if entry["settings"].get("mode", "cot") == mode
        }
        if not ours:
            continue
        text += ["| model | " + " | ".join(ours) + " |", "|---|" + "---:|" * len(ours)]
        for key in ("published", "strict"):
            cells = [f"**{entry[key]:.1f}** ± {entry[key + '_se']:.1f}" for entry in ours.values()]
            text.append(f"| {label}, {key} | " + " | ".join(cells) + " |")
        for model, row in PAPER[mode].items():
            known = dict(zip(COLUMNS, row))
            cells = [str(known.get(entry["task"], "")) for entry in ours.values()]
            text.append(f"| {model}, as published | " + " | ".join(cells) + " |")
        text += ["", f"Percent ± one standard error; mode {mode}. Settings:", ""]
        for name, entry in ours.items():
            settings = ", ".join(f"{key} {value}" for key, value in entry["settings"].items())
            text.append(
                f"- {name}: {entry['n']} problems, {entry['failed']} without a verdict; {settings or 'none'}"
            )
        text.append("")
    return "\n".join(text)
