"""Is a source's file still the one that a token set was made of?

OUT/sources.jsonl keeps of each file its size, its time of change, and the sha256 of the bytes that
were read of it. The bytes are hashed as they pass. A file up to 64 MiB is always compared in whole;
a larger one where its time of change is another. So a copied or touched file is the same file, and
an edited one is not.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from common import files, locks, owned
from common.checksums import file_hash
from common.errors import UserError
from common.json_files import parse_text, regular_size
from common.records import as_record, at_least
from data import TokenSet

NAME = "sources.jsonl"
SMALL = 1 << 26  # bytes of a file that is always compared in whole; a larger one is noted so often
BLOCK = 1 << 20  # bytes read at a time
MEND = "delete it, then the source files are not compared"
ARRAYS = ("loss_mask.bin", "kind.bin")  # of a set, beside tokens.bin, whose hash is in meta.json


class Content:
    """What was read of one file. `size` and `changed` (ns): as they were before it was read."""

    def __init__(self, path):
        self.path = path
        self.size, self.changed = state(path)
        self.notes = None  # the Notes that keep it, from `begin` on
        self.digest = None
        self.passed = 0  # bytes that `digest` has seen

    def open(self):
        """The file, whose bytes are hashed as they are read."""
        self.digest = hashlib.sha256()
        self.passed = 0
        file = open(self.path, "rb")
        return file if self.size <= SMALL else Hashed(file, self)  # a small one `begin` has hashed

    def begin(self, notes):
        """It will be read now, for the token set that keeps these notes (or None)."""
        self.notes = notes
        if notes:
            first = min(self.size, SMALL)
            self.notes.add(self, first, start_hash(self.path, first))

    def hash(self, block):
        """Count bytes that were read."""
        before = self.passed // SMALL
        self.digest.update(block)
        self.passed += len(block)
        if self.notes and before < self.passed // SMALL:
            self.notes.add(self, self.passed, self.digest.hexdigest())

    def note(self, n_bytes, sha256):
        """That its first `n_bytes` have this hash."""
        return {
            "file": self.path,
            "size": self.size,
            "changed": self.changed,
            "hashed": n_bytes,
            "sha256": sha256,
        }

    def end(self):
        """It was read to its end. Raises UserError where it changed meanwhile."""
        try:
            same = state(self.path) == (self.size, self.changed)
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.path}: was changed while it was read; the same command checks what was "
                f"read of it, and goes on if it is as before"
            )
        if self.notes and self.size > SMALL:
            whole = self.passed == self.size
            sha256 = self.digest.hexdigest() if whole else file_hash(self.path)
            self.notes.add(self, self.size, sha256)


class Hashed:
    """An open file that tells a Content what is read of it."""

    def __init__(self, file, content):
        self.file = file
        self.content = content

    def read(self, size=-1):
        block = self.file.read(size)
        self.content.hash(block)
        return block

    def tell(self):
        return self.file.tell()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@dataclass
class Head:
    """The first line of sources.jsonl."""

    plan: str  # sha256 of the plan
    arrays: dict[str, str] = field(default_factory=dict)  # {name: sha256} of a finished set


@dataclass
class Known:
    """Another line: what is known of a file."""

    file: str
    size: Annotated[int, at_least(0)]
    changed: int  # ns
    hashed: Annotated[int, at_least(0)]  # so many bytes from its start
    sha256: str  # of those


class Notes:
    """The file OUT/sources.jsonl: a line for the plan, then a line for each note of a file.

    The last line of a file counts. While the set is made lines are only appended.
    """

    def __init__(self, out, plan=None):
        """`plan`: notes of another one are not these; without a plan they are as they lie there.

        Raises UserError for a file that the kit did not write, or that is damaged.
        """
        self.path = Path(out) / NAME
        self.header = {"plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest()}
        self.files = {}  # {path: its last note}
        self.begun = False  # are these notes in the file?
        self.growing = None  # the open file
        owned.refuse_foreign([self.path])
        if not self.path.exists():
            return
        header, notes = self.read()
        if plan is None or header["plan"] == self.header["plan"]:
            self.header = header
            self.files = notes
            self.begun = True

    def begin(self):
        """Have the file, for the first time or again."""
        if not self.begun:
            self.save()

    def read(self):
        """(the plan's line, {path: its last note}); a line that a kill cut off does not count."""
        regular_size(self.path, "record of the source files")
        notes = []
        with open(self.path, "rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    notes.append(parse_text(line.decode()))
        header, *notes = notes or [None]
        as_record(header, Head, f"{self.path}: its first line", MEND)
        for note in notes:
            as_record(note, Known, f"{self.path}: a note of a file", MEND)
        return header, {note["file"]: note for note in notes}

    def add(self, content, n_bytes, sha256):
        """Note that the first `n_bytes` of a file have this hash, unless more is known."""
        known = self.files.get(content.path)
        if known and known["changed"] == content.changed and known["hashed"] >= n_bytes:
            return
        self.files[content.path] = content.note(n_bytes, sha256)
        if not self.growing:
            self.growing = files.Growing(self.path, self.path.stat().st_size)
        self.growing.write(("\n" + json.dumps(self.files[content.path])).encode())

    def forget(self):
        """The set is made anew."""
        self.files = {}
        self.header.pop("arrays", None)
        self.begun = False

    @property
    def closed(self):
        return "arrays" in self.header

    def close(self, whole, begun, folder):
        """The set is finished: note its arrays, the files that were read to their end, and others.

        The same for any number of workers and kills: of a file that was not read to its end the
        first SMALL bytes count.
        """
        known = self.files
        self.files = {}
        for content in [*whole, *begun]:
            n_bytes = content.size if content in whole else min(content.size, SMALL)
            note = known.get(content.path)
            if note and note["hashed"] == n_bytes:
                sha256 = note["sha256"]
            else:
                sha256 = start_hash(content.path, n_bytes)
            self.files[content.path] = content.note(n_bytes, sha256)
        arrays = [Path(folder) / name for name in ARRAYS]
        self.header["arrays"] = {path.name: file_hash(path) for path in arrays if path.exists()}
        self.save()

    def other_arrays(self):
        """The set's arrays that are not what they were: [(path, why)]."""
        found = []
        for name, sha256 in self.header.get("arrays", {}).items():
            path = self.path.parent / name
            if not os.path.isfile(path):
                found.append((path, "it is not there"))
            elif file_hash(path) != sha256:
                found.append((path, "its sha256 differs"))
        return found

    def save(self):
        """Write it anew, with one line for each file."""
        if self.growing:
            self.growing.close()
            self.growing = None
        lines = [json.dumps(line) for line in (self.header, *self.files.values())]
        files.write_atomic(self.path, "\n".join(lines) + "\n")
        self.begun = True


def state(path):
    """(size, time of the last change in ns)"""
    now = os.stat(path)
    return now.st_size, now.st_mtime_ns


def start_hash(path, n_bytes):
    """sha256 of a file's first bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while n_bytes > 0 and (block := file.read(min(BLOCK, n_bytes))):
            digest.update(block)
            n_bytes -= len(block)
    return digest.hexdigest()


def differing(notes, thorough=False):
    """The files that are not what they were: [(path, why)].

    Small ones, and those with other times, are hashed; `thorough`: all of them.
    """
    found = []
    for path, note in notes.files.items():
        if not os.path.isfile(path):
            found.append((path, "No such file"))
            continue
        try:
            size, changed = state(path)
            same = (size, changed) == (note["size"], note["changed"])
            whole = note["hashed"] == note["size"]
            if size < note["hashed"] or (whole and size != note["size"]):
                found.append((path, f"had {note['size']:,} bytes, has {size:,}"))
            elif thorough or size <= SMALL or not same:
                sha256 = start_hash(path, note["hashed"])
                if sha256 != note["sha256"]:
                    was, now = note["sha256"][:12], sha256[:12]
                    found.append((path, f"sha256 was {was}, is {now}"))
        except OSError as error:
            found.append((path, error.strerror))
    return found


# --------------------------------------------------------------------------------------------------
# what prepare.py does with them


def notes_of(out, plan, sources, overwrite):
    """The Notes of the set in `out`, for its sources. Raises UserError where a file was edited."""
    notes = Notes(out, plan)
    if overwrite:
        notes.forget()
    for path, why in differing(notes):
        raise UserError(
            f"--source {path}: is not the file that {out} was made of ({why}); make the set again "
            f"with --overwrite, or name another --out"
        )
    for source in sources:
        source.notes = notes
    return notes


def close_notes(notes, tokens, sources, max_tokens=None, mix=None):
    """Note the files and arrays of a set that has just been finished."""
    if not notes.begun or notes.closed:
        return
    given = [entry["tokens"] for entry in tokens.meta["sources"]]
    cut_off = set()  # the entries that were not read to their end
    if max_tokens == tokens.count:
        cut_off = {max(entry for entry, n_tokens in enumerate(given) if n_tokens)}
    if mix:
        cut_off = set(range(len(given)))
    read = [source for source in sources if source.content and given[source.entry]]
    whole = [source.content for source in read if source.entry not in cut_off]
    begun = [source.content for source in read if source.entry in cut_off]
    locks.lock_folder(tokens.folder, "token set")
    notes.close(whole, begun, tokens.folder)
    locks.unlock(tokens.folder)


def verify(out):
    """Check a finished set in full, and the files that it was made of. Raises UserError."""
    if not out:
        raise UserError("--verify: got no --out, wanted the folder of a finished token set")
    tokens = TokenSet(out, verify=True)
    notes = Notes(out)
    for path, why in [*notes.other_arrays(), *differing(notes, thorough=True)]:
        raise UserError(
            f"--verify: {path} is not what it was when {out} was made ({why}); make the set again "
            f"with --overwrite"
        )
    if notes.files:
        sources = f"{len(notes.files):,} source files are as they were"
    else:
        sources = "there is no record of its source files"
    partly = sum(note["hashed"] < note["size"] for note in notes.files.values())
    if partly:
        sources += f" ({partly:,} of them as far as they were read or noted)"
    print(f"{out}: verified, {tokens.count:,} tokens; {sources}")
