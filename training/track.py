"""`--track wandb|tensorboard|trackio[:PROJECT]`: the records of log.jsonl go to a tracker as well.

Training needs none of the three: a package is imported where it is asked for, on the first rank
alone. A run keeps its name in OUT/track.json and goes on under it. What fails in a tracker is said
once, in one line; the run goes on without it.
"""

import argparse
import atexit
import json
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError, reason_of
from common.files import write_atomic
from common.records import read_json

PROJECT = "slm"  # where none is named
HISTOGRAM_EVERY = 10  # steps


def wanted(text):
    """An argument type: a tracker's name, and perhaps that of a project."""
    if text.partition(":")[0] not in TRACKERS:
        names = ", ".join(TRACKERS)
        raise argparse.ArgumentTypeError(f"got {text[:80]}, wanted {names}, perhaps with :PROJECT")
    return text


def refuse_missing(track):
    """Raise UserError where the package of `--track` is not installed; it is not imported."""
    name = track.partition(":")[0]
    if find_spec(name) is None:
        raise UserError(f"--track {track}: {name} is not installed; pip install {name}")


class Tracker:
    """A run's tracker.

    track: the argument. folder: the run's. arguments: its args.json. step: those already made.
    """

    def __init__(self, track, folder, arguments, step):
        self.track = track
        self.tracker = None
        self._try(self._open, folder, arguments, step)

    def _open(self, folder, arguments, step):
        name, _, project = self.track.partition(":")
        first = step + 1 if step else 0  # the validation before the first step is step 0
        self.tracker = TRACKERS[name](
            project, folder, name_of(folder, self.track), arguments, first
        )

    def log(self, record, score=None, histogram=None):
        """A record of log.jsonl, and of the scores (counts, edges of the bins)."""
        if self.tracker is None:
            return
        step = record["step"]
        histograms = {}
        if histogram and step % HISTOGRAM_EVERY == 0:
            histograms[f"scores/{score}"] = histogram
        self._try(self.tracker.log, step, numbers(record), histograms)

    def finish(self, summary):
        if self.tracker is not None:
            self._try(self.tracker.finish, numbers(summary))

    def _try(self, do, *args):
        try:
            do(*args)
        except (Exception, SystemExit) as error:
            self.tracker = None
            said = f"note: --track {self.track}: {reason_of(error)}; the run goes on without it"
            print(said, file=sys.stderr)


def name_of(folder, track):
    """The name that the run in `folder` has in a tracker, for all its life."""
    path = Path(folder) / "track.json"
    names = read_json(path, "--track") if path.exists() else {}
    if track not in names:
        names[track] = f"{Path(folder).resolve().name}-{uuid.uuid4().hex[:8]}"
        write_atomic(path, json.dumps(names, indent=1))
    return names[track]


def numbers(record):
    """{name: number} of a record: {"kept": {"chatter": 0.1}} is kept/chatter."""
    flat = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{kind}": number for kind, number in value.items()}
        else:
            flat[key] = value
    return {
        key: value
        for key, value in flat.items()
        if key != "step" and isinstance(value, (int, float))
    }


# Each is made with (project or "", folder, name, arguments, the first step that it will be told).


class Wandb:
    """Weights & Biases; offline with WANDB_MODE=offline."""

    def __init__(self, project, folder, name, arguments, first):
        import wandb

        self.histogram = wandb.Histogram
        self.run = wandb.init(
            project=project or PROJECT, id=name, name=name, config=arguments, resume="allow"
        )

    def log(self, step, values, histograms):
        if step < self.run.step:  # told before the run was interrupted
            return
        shown = {name: self.histogram(np_histogram=pair) for name, pair in histograms.items()}
        self.run.log(values | shown, step=step)

    def finish(self, summary):
        self.run.summary.update(summary)
        self.run.finish()


class TensorBoard:
    """Event files in OUT/tensorboard, or in PROJECT/NAME."""

    def __init__(self, project, folder, name, arguments, first):
        from torch.utils.tensorboard import SummaryWriter

        place = Path(project) / name if project else Path(folder) / "tensorboard"
        # what an interrupted run wrote of steps that are made again is not shown
        self.writer = SummaryWriter(str(place), purge_step=first, flush_secs=1)
        atexit.register(self.writer.close)
        self.writer.add_text("arguments", f"```\n{json.dumps(arguments, indent=1)}\n```", first)

    def log(self, step, values, histograms):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, (counts, edges) in histograms.items():
            middles = [(low + high) / 2 for low, high in zip(edges, edges[1:])]
            self.writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(n * x for n, x in zip(counts, middles)),
                sum_squares=sum(n * x * x for n, x in zip(counts, middles)),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )

    def finish(self, summary):
        for name, value in summary.items():
            self.writer.add_scalar(f"summary/{name}", value)
        self.writer.close()


class Trackio:
    """Files in Hugging Face's cache, see TRACKIO_DIR."""

    def __init__(self, project, folder, name, arguments, first):
        import trackio

        self.histogram = trackio.Histogram
        self.run = trackio.init(
            project or PROJECT, name=name, config=arguments, resume="allow", embed=False
        )

    def log(self, step, values, histograms):
        shown = {name: self.histogram(np_histogram=pair) for name, pair in histograms.items()}
        self.run.log(values | shown, step=step)

    def finish(self, summary):
        self.run.finish()


TRACKERS = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}
