"""The lines of the figures of `tools.explore curves`: a run for each seed, and what it cost.

Cost is counted in tokens of plain training of the student (6 N FLOPs a token, N its parameters). A
run costs what it reads. Where its score needs the reference's losses, it is also charged with the
reference's training and one scoring pass (2 N_ref FLOPs a token) over the whole corpus. A batch
scope over several micro-batches costs another forward pass.
"""

from pathlib import Path

import numpy as np

import methods  # noqa: F401  more scores, by name
import slm
from common.errors import UserError
from common.records import read_json, read_record
from data import Note
from demo.chain import tokens_to_reach
from evaluation.results import read_entries
from hf import checkpoint
from hf.config import config_from_hf
from tools.explore.runs import snapshots
from training import finished

# Of scoring with a model of the student's size; a short context is made in overlapping pieces.
PASSES = {"base_loss": 1, "short_loss": 2}


class Line:
    """A line of the figures: `label`, and a run (a folder) for each seed.

    text: "LABEL=FOLDER[,FOLDER...]", or without the label, which is the folder's name then;
    references: folders of the reference's runs, or None. Raises
    UserError for other text, and for runs that are not finished or have no validation loss.
    """

    def __init__(self, text, references):
        label, _, folders = text.rpartition("=")
        if not folders:
            raise UserError(f"--run: got {text}, wanted FOLDER or LABEL=FOLDER[,FOLDER...]")
        self.label = label or Path(folders.split(",")[0]).name
        self.folders = [Path(folder) for folder in folders.split(",")]
        self.saved = [finished.arguments(folder) for folder in self.folders]
        for folder in self.folders:
            if not finished.is_finished(folder):
                raise UserError(
                    f"--run: {folder} is not finished; the command that began it goes on"
                )
        self.summaries = [finished.summary(folder) for folder in self.folders]
        if any(summary["val_loss"] is None for summary in self.summaries):
            raise UserError(f"--run: {self.label} has no validation loss; train with --val")
        self.logs = [finished.steps(folder) for folder in self.folders]
        self.costs = []  # for each seed: fixed, per token
        for i, (folder, saved) in enumerate(zip(self.folders, self.saved)):
            self.costs.append((fixed_cost(folder, saved, i, references), cost_per_token(saved)))

    def selects(self):
        return selection_of(self.saved[0]).method is not None

    def curve(self, read):
        """(tokens, read(record)) of the log records, each (seeds, points); None if there are none.

        Records for which `read` gives None are left out. All seeds are as long as the shortest.
        """
        points = []
        for log in self.logs:
            values = [(record["tokens_seen"], read(record)) for record in log]
            points.append([point for point in values if point[1] is not None])
        return stacked(points)

    def at_cost(self, tokens):
        """`tokens` (seeds, points) as cost, (seeds, points)."""
        return np.array([fixed + per * row for (fixed, per), row in zip(self.costs, tokens)])


def stacked(points):
    """Lists of (x, y), one for each seed, as x and y (seeds, points); None where one is empty."""
    n = min(map(len, points))
    if n == 0:
        return None
    return np.array([row[:n] for row in points], float).transpose(2, 0, 1)


# --------------------------------------------------------------------------------------------------
# cost


def cost_per_token(saved):
    """Cost of a token that is read; `saved`: the run's args.json."""
    if saved.get("scope") != "batch" or saved["micro_batch_size"] >= saved["batch_size"]:
        return 1.0
    if selection_of(saved).static:  # the student's losses are not needed to choose
        return 1.0
    return 4 / 3


def selection_of(saved):
    """The slm.Selection of a run; one of train_ref.py keeps every token."""
    return slm.Selection(saved.get("k", 1), saved.get("score"), saved.get("scope", "micro"))


def fixed_cost(folder, saved, i, references):
    """Cost of the reference and of scoring for the i-th seed's run, in tokens of the student."""
    needs = set(selection_of(saved).needs)
    cost = 0.0
    for name, passes in PASSES.items():
        if name in needs:
            note = Path(saved[name]).with_suffix(".json")
            cost += passes * read_record(note, Note, "stored losses").count / 3
    if not {"ref_loss", "ref_entropy"}.intersection(needs):
        return cost
    if references:
        reference = references[min(i, len(references) - 1)]
    else:
        reference = find_reference(folder, saved)
    note = Path(saved["ref_loss"]).with_suffix(".json")
    scored = read_record(note, Note, "stored losses").count
    trained = finished.summary(reference, "reference")["tokens_seen"]
    return cost + (trained + scored / 3) * parameters(reference) / parameters(folder)


def parameters(folder):
    path = Path(folder) / "config.json"
    config = config_from_hf(read_json(path, "model"), path)
    return sum(int(np.prod(shape)) for shape in checkpoint.parameter_shapes(config).values())


def find_reference(folder, saved):
    """The run beside the stored losses whose weights they were made with."""
    hashes = [value for name, value in saved["inputs"].items() if name.startswith("ref_")]
    for summary in sorted(Path(saved["ref_loss"]).parent.glob("*/summary.json")):
        run = summary.parent
        whole = (run / "model.safetensors").exists() or any(run.glob("*.index.json"))
        if whole and checkpoint.model_hash(run) in hashes[:1]:
            return run
    raise UserError(
        f"--reference: no run beside {saved['ref_loss']} has the weights that {folder} was "
        f"selected with; name the reference's folder"
    )


# --------------------------------------------------------------------------------------------------
# what is read off a line


def accuracy(folder):
    """[(tokens, share of right answers)] of a run's snapshots and its end, where eval_math.py has
    evaluated them."""
    saved = finished.arguments(folder)
    points = []
    for step, path in snapshots(folder):
        results = path / "eval" / "results.json"
        if step == 0 or not results.exists():
            continue
        result = read_entries(path / "eval").get("test")
        if result:
            tokens = step * saved["batch_size"] * saved["seq_len"]
            points.append((tokens, result["published"] / 100))
    return points


def summarise(line, baseline):
    """What the table says of a line, a value for each seed.

    The three comparisons with the line `baseline` are None for a seed that never gets to its final
    loss, and empty lists where no baseline is named.
    """
    reach, ratio, cost_ratio = [], [], []
    for i, folder in enumerate(line.folders if baseline else []):
        j = min(i, len(baseline.folders) - 1)
        end = baseline.summaries[j]
        tokens = tokens_to_reach(folder, end["val_loss"])
        reach.append(tokens)
        if tokens is None:
            ratio.append(None)
            cost_ratio.append(None)
            continue
        ratio.append(round(end["tokens_seen"] / tokens, 2))
        fixed, per = line.costs[i]
        base_fixed, base_per = baseline.costs[j]
        base_cost = base_fixed + base_per * end["tokens_seen"]
        cost_ratio.append(round(base_cost / (fixed + per * tokens), 2))
    return {
        "runs": [str(folder) for folder in line.folders],
        "val_loss": [s["val_loss"] for s in line.summaries],
        "exact_match": [s["exact_match"] for s in line.summaries],
        "fixed_cost": [round(fixed) for fixed, _ in line.costs],
        "tokens_to_reach": reach,
        "times_fewer_tokens": ratio,
        "times_less_cost": cost_ratio,
    }
