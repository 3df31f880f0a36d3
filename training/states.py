"""The training states of a run: one file on one rank, a folder on several. Two are kept.

Either can be read on any number of ranks. training/checkpoints.py, the folder's form, takes half a
second to import: that is done where it is needed.
"""

import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from common import aside, files
from common.errors import UserError, reason_of
from common.json_files import regular_size
from common.records import Bound, as_record, at_least
from training import parallel

STATE = "train_state.pt"
BEFORE = "train_state.before.pt"  # the one before that
FOLDERS = "state-[0-9]*"
NEW = "state.new"  # a folder that is not whole yet
KEYS = {"step", "seconds", "tokens", "val_loss"}
KEYS_OF_FILE = KEYS | {"model", "optimizer"}
TWO = Bound(lambda values: len(values) == 2, "two numbers")


@dataclass
class Record:
    """What a state holds beside tensors."""

    step: Annotated[int, at_least(0)]
    seconds: Annotated[float, at_least(0)]
    tokens: Annotated[list[Annotated[int, at_least(0)]], TWO]  # seen, selected
    val_loss: float | None


class States:
    """Finds a run's newest state, and writes new ones.

    On several ranks a save goes on in a thread (`wait`): until it has ended nobody else may make
    files in the run's folder.
    """

    def __init__(self, folder, env, minutes):
        self.folder = folder
        self.env = env
        self.minutes = minutes
        self.newest = None  # its path
        self.saved_at = time.perf_counter()
        self.saving = None  # what is being written
        self.group = None

    # ----------------------------------------------------------------------------------------------
    # in

    def resume(self):
        """The newest state that can be read, or None. Raises UserError: there is none that can."""
        self.newest = self.env.from_main(self._clean_and_find)
        return self.newest and read(self.newest)

    def _clean_and_find(self):
        files.remove_folder(self.folder / NEW)  # what a kill left
        newest = newest_of(self.folder)
        if newest:  # a kill came before its save could do so
            aside.discard(self.folder)
        return newest

    # ----------------------------------------------------------------------------------------------
    # out

    def save(self, student, optimizer, record, extra):
        """Write a state. On several ranks it is not on the disk before `wait`.

        record: KEYS and what else it holds. extra: {name: tensor}, the same on all ranks. All ranks
        must call it.
        """
        self.wait()
        if self.env.world == 1:
            self._save_file(student, optimizer, record, extra)
        else:
            self._save_folder(student, optimizer, record, extra)
        self.saved_at = time.perf_counter()

    def _save_file(self, student, optimizer, record, extra):
        model_state, optimizer_state = parallel.full_state(student, optimizer)
        path = self.folder / STATE
        if self.newest == path:
            self.newest = self.folder / BEFORE
            files.rename(path, self.newest)
        with files.renamed_when_whole(path) as temporary:
            state = {**record, **extra, "model": model_state, "optimizer": optimizer_state}
            torch.save(state, temporary)
        self._is_whole(path)

    def _save_folder(self, student, optimizer, record, extra):
        from training import checkpoints

        if self.group is None:
            self.group = self.env.new_patient_group()
        path = self.folder / f"state-{record['step']:06d}"
        self.saving = checkpoints.start_saving(
            self.folder / NEW,
            path,
            {**parallel.tensors(student, optimizer), **extra},
            record,
            self.env,
            self.group,
            when_whole=lambda: self._is_whole(path),
        )

    def _is_whole(self, path):
        """A new state is on the disk: it and the one before are kept. On the first rank alone."""
        for other in present(self.folder):
            if other not in (path, self.newest):
                remove(other)
        self.newest = path
        aside.discard(self.folder)

    def is_late(self):
        """Has no state been saved for `--save-minutes`? Asked of the first rank: clocks differ."""
        if not self.minutes or not self.env.main:
            return False
        return time.perf_counter() - self.saved_at >= 60 * self.minutes

    def has_failed(self):
        """Has the save ended that goes on, and badly? `wait` will raise why."""
        saving = self.saving
        return saving is not None and saving.done() and saving.exception() is not None

    def wait(self):
        """Until the last save is on the disk. Raises OSError where it could not be written."""
        if self.saving:
            from training import checkpoints

            saving, self.saving = self.saving, None
            checkpoints.finish_saving(saving)

    def keep_newest(self):
        """Of a finished run. On the first rank alone."""
        for path in present(self.folder):
            if path != self.newest:
                remove(path)


# --------------------------------------------------------------------------------------------------
# what lies in a folder


def present(folder):
    """The paths of a run's states, whole or not."""
    single = [folder / name for name in (STATE, BEFORE)]
    return [path for path in [*single, *folder.glob(FOLDERS)] if path.exists()]


def newest_of(folder):
    """The path of the newest state that can be read, or None. Raises UserError: none can be.

    Each that is damaged and newer is named in one line on stderr.
    """
    steps, broken = {}, {}
    for path in present(folder):
        try:
            steps[path] = read(path)["step"]
        except UserError as error:
            broken[path] = error
    newest = None
    for path in sorted(steps, key=steps.get, reverse=True):
        try:
            check(path)
        except UserError as error:
            broken[path] = error
        else:
            newest = path
            break
    if newest is None and broken:
        *_, last = broken.values()
        raise UserError(f"{last}; no older one is left: start over with --overwrite")
    for path, error in broken.items():
        older = path.is_dir() and path.name <= f"state-{steps[newest]:06d}"
        if not older:
            print(f"{error}; going on from {newest.name}", file=sys.stderr)
    return newest


def remove(path):
    if path.is_dir():
        files.remove_folder(path)
    else:
        files.remove(path)


def read(path):
    """A state. A file's tensors are mapped from it; a folder's are left there, its "parts".

    Raises UserError where it is damaged.
    """
    if Path(path).is_dir():
        from training import checkpoints

        state = {**checkpoints.read(path), "parts": path}
        missing = KEYS - set(state)
    else:
        state = read_file(path)
        missing = KEYS_OF_FILE - set(state) if isinstance(state, dict) else KEYS_OF_FILE
    if missing:
        raise UserError(f"{path}: is no training state, it lacks {', '.join(sorted(missing))}")
    as_record(state, Record, f"{path}: is no training state")
    return state


def read_file(path):
    regular_size(path, "training state")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no one class for a file that is cut, empty or no state
        message = f"{path}: is damaged or no training state ({reason_of(error)})"
        raise UserError(message) from None


def check(path):
    """Raises UserError where a file's bytes are not those that were saved: torch does not look.

    Reads all of it once.
    """
    if path.is_dir():
        from training import checkpoints

        checkpoints.check(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile has no one class for what is no archive
        raise UserError(f"{path}: is damaged ({reason_of(error)})") from None
    if damaged:
        raise UserError(f"{path}: is damaged (the checksum of {damaged} differs)")


def keep_one(folder, steps):
    """Of a run that is finished after so many `steps`, where a kill came before `keep_newest`."""
    newest = folder / f"state-{steps:06d}"
    if not newest.exists():
        newest = folder / STATE
    for path in present(folder):
        if newest.exists() and path != newest:
            remove(path)


def restore(student, optimizer, state, extra):
    """Load a state into the wrapped model, its optimiser and `extra`, on any number of ranks."""
    if "parts" in state:
        from training import checkpoints

        checkpoints.load(state["parts"], {**parallel.tensors(student, optimizer), **extra})
        return
    parallel.restore(student, optimizer, state)
    for name, tensor in extra.items():
        tensor.copy_(state[name])


def weights(state):
    """{name: tensor} of a state's model, whole, on the CPU."""
    if "parts" not in state:
        return state["model"]
    from training import checkpoints

    return checkpoints.weights(state["parts"])
