"""One token set, made from sources: it goes on where it stopped, and ends in identical files.

The folder says how far it is: progress.json while it is unfinished, meta.json when it is done
(text/writing.py). Both name the plan, which identifies the work; a set of another plan is
refused.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from common import aside, files, locks, owned
from common.errors import UserError
from common.records import as_record, at_least
from data import Source, TokenSet
from hf.tokenizer import FILES, Tokenizer
from text import hub_datasets, reading
from text.decontaminate import Decontaminator
from text.held_out import FOLDER as HELD_OUT
from text.held_out import Side
from text.pieces import Preparation
from text.workers import in_order
from text.writing import AGAIN, TokenSetWriter, marked

MARK_SECONDS = 5  # a kill costs at most this much work
TURN = 60.0  # seconds that another process is waited for, where the set is finished
ARRAYS = tuple(TokenSetWriter.NAMES.values())
SET_FILES = ("progress.json", "meta.json", *FILES, *ARRAYS, *(name + ".partial" for name in ARRAYS))
LATER = ("ends", "labels")  # of a plan: what older ones do not have
SHOWN = 200  # characters of each side of a difference
Count = Annotated[int, at_least(0)]


@dataclass
class Settings:
    """How a token set is made of its sources, as prepare.py's flags say it."""

    workers: int = 1
    overwrite: bool = False
    mask_prompt: bool = False
    skip_bad: bool = False
    max_tokens: int | None = None
    mix: list | None = None  # a weight for each --source
    seed: int | None = None  # of the demo's text
    decontaminator: Decontaminator | None = None
    side: Side | None = None  # with --val-share: of which documents it is made


@dataclass
class Progress:
    """Where a restart goes on, and what has been counted up to there. Stored in progress.json."""

    sources: list[Source]  # of each --source
    source: Count = 0  # the number of the one that is read
    record: Count = 0  # of that source
    bad: Count = 0
    contaminated: Count = 0
    text_bytes: Count = 0

    def add(self, piece, entry):
        """Count a piece that was appended, of --source number `entry`."""
        self.source = piece.job.source
        self.record = piece.job.next
        self.text_bytes += piece.text_bytes
        self.bad += piece.bad
        self.contaminated += piece.contaminated
        self.sources[entry].documents += piece.documents
        self.sources[entry].tokens += len(piece.arrays["tokens"])  # last, see `agrees_with`

    def agrees_with(self, writer):
        """Is everything that was appended counted? Not where a signal came between the two."""
        return sum(entry.tokens for entry in self.sources) == writer.count


def build(out, sources, plan, tokenizer, settings, names=None):
    """Make the token set `out`, or go on with it, or open it where it is finished.

    `plan` (JSON): what identifies the work. `tokenizer`: a Tokenizer, or a function that trains
    one; that is called at the very start only, a restart takes the one that was saved. `names`: of
    each --source, default: of each source. Returns the TokenSet. Raises UserError for a set of
    another plan, and whatever reading the sources raises.
    """
    out = Path(out)
    began = time.time()
    plan = json.loads(json.dumps(plan))  # as it will be read again
    names = names or [source.path for source in sources]
    goals = shares(sources, settings)
    owned.refuse_foreign(out / name for name in SET_FILES)
    is_there = (out / "meta.json").exists() and not settings.overwrite
    # A finished set is looked at, perhaps by each of several machines: in turns.
    locks.lock_folder(out, "token set", wait=TURN if is_there else 0.0)
    if not settings.overwrite:
        aside.put_back(out)
    if (out / "meta.json").exists() and not settings.overwrite:
        return use_again(out, plan, settings)
    goes_on = can_go_on(out, plan, settings)
    # What may still fail comes before the folder is taken over: nothing is deleted for nothing.
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(out) if goes_on else tokenizer()
    preparation = Preparation.of(out, sources, tokenizer, settings)
    if not goes_on:
        take_over(out, tokenizer, settings.overwrite)

    writer = TokenSetWriter(out, tokenizer.n_vocab, preparation.arrays, plan)
    progress = begin(writer, names, len(sources))
    refuse_bad(out, progress.bad, settings)
    writer.mark(asdict(progress))
    # Each goal is met before the next one begins. A restart steps over those that were met.
    full = False
    for stop, limit in goals:
        if progress.source < stop:
            full = fill(writer, progress, preparation, settings.workers, stop, limit)
            if settings.mix and not full and not is_held_out(settings):
                raise UserError(
                    f"--mix: {names[sources[stop - 1].entry]} ends {limit - writer.count:,} tokens "
                    f"short of its share; lower --max-tokens or its weight"
                )
            if stop < len(sources):
                progress.source = stop
                progress.record = 0
                writer.mark(asdict(progress))
    hub_datasets.delete_shard(out)
    refuse_empty(writer, progress, full, settings)
    done = finish(writer, progress, preparation, settings)
    aside.discard(out)
    locks.unlock(out)
    print(f"{out}: {summary(done.meta)}, {time.time() - began:.1f} s")
    return done


# --------------------------------------------------------------------------------------------------
# what lies in the folder already


def use_again(out, plan, settings):
    """The finished set. Raises UserError where it is another plan's."""
    done = TokenSet(out)
    if differs := difference(done.meta.get("plan", {}), plan):
        raise UserError(
            f"--out {out}: is a finished token set of something else ({differs}); name another "
            f"folder, or replace it with --overwrite"
        )
    refuse_bad(out, done.meta["bad_records"], settings)
    files.remove(out / "progress.json")  # killed just before it did so itself
    aside.discard(out)
    locks.unlock(out)
    print(f"{out}: used again, {summary(done.meta)}")
    return done


def can_go_on(out, plan, settings):
    """Does an unfinished set of this plan lie here? Raises UserError for what must not be lost."""
    if settings.overwrite or (saved := marked(out)) is None:
        return False
    if saved.plan is None:
        return False
    differs = difference(saved.plan, plan)
    if differs is None:
        print(f"{out}: goes on where it stopped")
        return True
    if saved.count:
        raise UserError(
            f"--out {out}: is an unfinished token set of something else ({differs}); name another "
            f"folder, or start over with --overwrite"
        )
    print(f"{out}: an unfinished token set of something else is started over ({differs})")
    return False


def take_over(out, tokenizer, overwrite):
    """Take away what is left of another set here, and save the tokenizer."""
    if overwrite:
        aside.set_aside(out, keep=(hub_datasets.FOLDER, "hub.new.json"))
        if (out / HELD_OUT / "meta.json").exists():  # it is of another division now
            locks.lock_folder(out / HELD_OUT, "token set")
            aside.set_aside(out / HELD_OUT)
    for name in SET_FILES:
        files.remove(out / name)
    hub_datasets.take_over_listing(out, overwrite)
    tokenizer.save(out)


def begin(writer, names, n_sources):
    """The progress that was stored, or that of a new set. Raises UserError where it cannot be."""
    if not writer.state:
        return Progress([Source(name, documents=0, tokens=0) for name in names])
    where = f"{writer.folder}/progress.json: state"
    progress = as_record(writer.state, Progress, where, AGAIN)
    fits = len(progress.sources) == len(names) and progress.source < n_sources
    if not (fits and progress.agrees_with(writer)):
        raise UserError(f"{where}: does not fit the sources and the tokens that are there; {AGAIN}")
    return progress


def difference(old, new):
    """What differs between two plans, in words; None where nothing does."""
    for key, now in new.items():
        was = old.get(key)
        if was == now or (key in LATER and key not in old):
            continue
        if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            was, now = next((a, b) for a, b in zip(was, now) if a != b)
        return f"{key} was {shortened(was)}, is now {shortened(now)}"
    return None


def shortened(value):
    text = json.dumps(value)
    return text if len(text) < SHOWN else text[:SHOWN] + "..."


# --------------------------------------------------------------------------------------------------
# what is written


def shares(sources, settings):
    """[(the source to stop before, tokens written by then)]: one; with --mix one per --source."""
    whole = settings.max_tokens or sys.maxsize
    if not settings.mix:
        return [(len(sources), whole)]
    limits = limits_of(settings.mix, whole)
    stops = [sum(source.entry <= entry for source in sources) for entry in range(len(limits))]
    return list(zip(stops, limits))


def limits_of(mix, tokens):
    """How many of so many tokens are written when each --source has given its part of --mix.

    Counted from the start, so that rounding errors do not add up. Raises UserError where a part is
    less than a token.
    """
    behind = np.cumsum(mix) / np.sum(mix)
    limits = [round(tokens * part) for part in behind.tolist()]
    if 0 in np.diff([0, *limits]):
        raise UserError(
            f"--mix: a source's part of {tokens} tokens is less than a token; raise --max-tokens"
        )
    return limits


def fill(writer, progress, preparation, workers, stop, limit):
    """Append what the sources before number `stop` give, up to `limit` tokens in all.

    `progress` is kept up to date and marked. Returns whether it got there.
    """
    if writer.count >= limit:  # stopped just before it said so
        return True
    sources = preparation.sources
    jobs = reading.jobs(
        sources, progress.source, progress.record, stop, skip_bad=preparation.skip_bad
    )
    pieces = in_order(jobs, workers, preparation)
    sizes = np.cumsum([0] + [source.size for source in sources]).tolist()  # behind each source
    marked = time.time()
    with progress_bar(writer.folder, sources[0].unit, sizes, progress.source) as bar:
        try:
            for piece in pieces:
                # Between these three lines a signal may come; `agrees_with` looks whether one did.
                full = piece.cut(limit - writer.count, preparation.tokenizer.eos_id)
                writer.append(**piece.arrays)
                progress.add(piece, sources[piece.job.source].entry)
                show(bar, sizes[piece.job.source], piece.job, writer.count)
                if full:
                    return True
                if time.time() - marked > MARK_SECONDS:
                    writer.mark(asdict(progress))
                    marked = time.time()
        except (UserError, KeyboardInterrupt):  # the same command goes on from here
            if progress.agrees_with(writer):
                writer.mark(asdict(progress))
            raise
        finally:
            pieces.close()
    return False


def progress_bar(folder, unit, sizes, number):
    """Of the sources' sizes, from source `number` on."""
    return tqdm(
        total=sizes[-1],
        desc=str(folder),
        unit=unit,
        unit_scale=True,
        mininterval=0.5,
        disable=None,
        initial=sizes[number],
    )


def show(bar, size_before, job, count):
    if job.damage:
        tqdm.write(f"left out from there on: {job.damage}")
    bar.update(size_before + job.read - bar.n)
    bar.set_postfix_str(f"{count / 1e6:.1f}M tokens", refresh=False)


# --------------------------------------------------------------------------------------------------
# its end


def refuse_bad(out, bad, settings):
    if bad and not settings.skip_bad:
        raise UserError(
            f"--out {out}: {bad:,} broken records were left out of it; accept that with "
            f"--skip-bad, or mend the sources"
        )


def is_held_out(settings):
    return settings.side is not None and settings.side.held_out


def refuse_empty(writer, progress, full, settings):
    """Raises UserError where a --source gave nothing, unless there was no room or it is broken."""
    if settings.side and writer.count == 0:
        raise UserError(
            f"--out {writer.folder}: no document is {settings.side.name}; wanted more documents, "
            f"or another share with --overwrite"
        )
    for entry in progress.sources:
        missed = not (entry.tokens or full or settings.skip_bad or settings.side)
        if missed or writer.count == 0:
            left_out = f" ({progress.bad:,} broken ones were left out)" if progress.bad else ""
            raise UserError(
                f"{entry.name}: has no documents, wanted at least one that is not blank{left_out}"
            )


def finish(writer, progress, preparation, settings):
    """Close the set with its header. Returns the TokenSet."""
    labels = {"kinds": preparation.kinds} if preparation.kinds else {}
    if settings.seed is not None:
        labels["seed"] = settings.seed
    return writer.finish(
        tokenizer=preparation.tokenizer.hash,
        sources=[asdict(entry) for entry in progress.sources],
        bad_records=progress.bad,
        text_bytes=progress.text_bytes,
        contaminated=progress.contaminated,
        **labels,
        plan=writer.plan,
    )


def summary(meta):
    """A finished set in one line."""
    documents = sum(entry["documents"] for entry in meta["sources"])
    parts = [
        f"{documents:,} documents",
        f"{meta['count']:,} tokens",
        f"vocabulary {meta['vocab_size']:,}",
        f"{meta['count'] / max(1, meta['text_bytes']):.3f} tokens per byte",
    ]
    if meta["bad_records"]:
        parts.append(f"{meta['bad_records']:,} broken records left out")
    if meta.get("contaminated"):
        parts.append(f"{meta['contaminated']:,} contaminated ones")
    return ", ".join(parts)
