"""What --source names, as sources: files here, shards of a data set on the hub, token sets.

Whatever can be seen to be wrong without reading everything is refused here. Whoever has documents
that are in no file hands over a source of kind "generated", with a function that makes them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.errors import UserError
from data import TokenSet
from text import formats, hub_datasets, reading
from text.contents import Content, Notes

KINDS = {  # by a file's ending
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".json": "json",  # an array of objects, or lines after all
    ".json.gz": "json",
    ".json.zst": "json",
}
# What is taken of a data set on the hub.
SHARDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SHOWN = 400  # characters of the first document
LONGEST = 64 << 20  # bytes of a document, unless --max-document-bytes says another number

open_set = cache(TokenSet)


@dataclass
class Source:
    """One thing that documents come from. A data set on the hub is many: one for each shard."""

    kind: str  # "txt", "jsonl", "json", "parquet", "set" (a token set), or "generated"
    path: str  # its name in messages; of what lies here its path, too
    size: int  # how much of `unit` it holds
    unit: str = "B"
    entry: int = 0  # the --source that it belongs to, by number
    form: str | None = None  # how a record is read, with `fields`: see formats.py
    fields: list | None = None
    longest: int = LONGEST  # bytes of a record
    content: Content | None = None  # of a file on this machine: what is read of it
    notes: Notes | None = None  # where that is kept
    shard: hub_datasets.Shard | None = None  # where it lies on the hub
    labels: list | None = None  # "generated": names of the kinds of its tokens
    document: Callable | None = None  # "generated": (number, tokenizer) -> pieces.Document

    def __getstate__(self):
        """For a worker, which does not read the file."""
        return {**self.__dict__, "content": None, "notes": None}

    @property
    def file(self):
        """Where its bytes lie on this machine."""
        return self.shard.file if self.shard else self.path

    def fetch(self):
        """Have the file on this machine: a shard of the hub is downloaded. Raises UserError."""
        if self.shard:
            self.shard.fetch()

    def open(self):
        """The file, for reading its bytes from the start."""
        return self.content.open() if self.content else open(self.file, "rb")

    def begin(self):
        """It will be read now."""
        if self.notes:
            self.notes.begin()
        if self.content:
            self.content.begin(self.notes)

    def end(self):
        """It was read to its end. Raises UserError where the file changed meanwhile."""
        if self.content:
            self.content.end()


def sources_of(names, form, fields, skip_bad, out, overwrite=False, longest=LONGEST):
    """The sources that --source names. Raises UserError.

    `form` and `fields`: as the flags say, or None: by the names of the first record's fields.
    `out`: the folder that keeps the hub's listing, and the one shard that is on the disk.
    `overwrite`: ask the hub again. `longest`: bytes of a record.
    """
    listed_in = hub_datasets.listing_of(out, overwrite)
    sources = []
    for entry, name in enumerate(names):
        if name.startswith("hf:"):
            parts, noted = hub_sources(name, out, listed_in)
        else:
            parts, noted = [known_source(name, skip_bad)], None
        for source in parts:
            source.longest = longest
        if parts[0].kind != "set":
            given = (form, fields) if form else noted
            known = given or known_format(name, parts[0], listed_in, skip_bad)
            form_here, fields_here = known
            check_columns(name, parts[0], fields_here)
            for source in parts:
                source.form, source.fields = form_here, fields_here
        for source in parts:
            source.entry = entry
        sources += parts
    return sources


def known_source(name, skip_bad):
    """`local_source`; what the system says against a name is a UserError, too."""
    try:
        return local_source(name, skip_bad)
    except OSError as error:
        raise UserError(f"--source {name}: {error.strerror or error}") from None


def local_source(name, skip_bad):
    """The source of a file or a token set on this machine. Raises UserError."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"--source {name}: does not exist")
    if path.is_dir():
        if not (path / "meta.json").exists():
            raise UserError(
                f"--source {name}: is a folder without meta.json, so not a finished token set; "
                f"name files or token sets"
            )
        return Source("set", name, open_set(name).count, unit="token")
    ending = ending_of(name)
    if ending is None:
        raise UserError(
            f"--source {name}: got the ending {path.suffix!r}, wanted one of {', '.join(KINDS)}"
        )
    if not path.is_file():
        raise UserError(
            f"--source {name}: is a pipe or a device, wanted a file; write what comes from it to "
            f"one first"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"--source {name}: may not be read by this user (see its permissions)")
    content = Content(name)
    if content.size == 0 and not skip_bad:
        raise UserError(f"--source {name}: the file is empty")
    return Source(KINDS[ending], name, content.size, content=content)


def ending_of(name):
    """The longest of the known endings that a file's name has, or None."""
    return max((ending for ending in KINDS if name.endswith(ending)), key=len, default=None)


def hub_sources(name, out, listed_in):
    """A source for each shard, and the (form, fields) that an earlier run saw, or None."""
    repo = hub_datasets.parse(name)["repo"]
    listing = hub_datasets.listing(name, listed_in, SHARDS, ".json")
    sources = []
    for path, size in listing["files"]:
        shard = hub_datasets.Shard(repo, listing["commit"], path, str(out))
        source = Source(KINDS[ending_of(path)], shard.name, max(1, size), shard=shard)
        sources.append(source)
    return sources, listing.get("format")


def check_columns(name, source, fields):
    """Raises UserError where a parquet file lacks a field; the hub's are looked at when fetched."""
    if source.kind != "parquet" or source.shard:
        return
    from text import parquet

    columns = parquet.open_file(source).schema_arrow.names
    for field in fields:
        if field not in columns:
            raise UserError(f"--source {name}: has no field {field!r}, {formats.listed(columns)}")


def known_format(name, source, listed_in, skip_bad):
    """(form, fields) by the names of the first record's fields; nothing known: field text.

    What was found is shown with the first document, and of a data set on the hub noted.
    """
    source.fetch()
    record = first_record(source, skip_bad)
    form, fields = (record and formats.guess(record)) or ("text", ["text"])
    if record and (source.shard or fields != ["text"]):
        show_format(name, record, form, fields)
    if record and source.shard:
        hub_datasets.note(name, listed_in, format=[form, fields])
    return form, fields


def first_record(source, skip_bad):
    """The first record as a dict; None where there is none or it is broken.

    Reading comes to it again, and says better what is wrong. skip_bad: the first that is whole.
    """
    if source.kind == "txt":
        return None
    try:
        if source.kind == "parquet":
            from text import parquet

            return parquet.first_record(source)
        for job in reading.read(source, 0):
            for line in job.records:
                record = parsed(line)
                if record is not BLANK and (record or not skip_bad):
                    return record
    except UserError:
        pass
    return None


BLANK = object()


def parsed(line):
    """A line's object as a dict, None where it is broken, BLANK where there is nothing."""
    if line is None:  # too long
        return None
    if not line.strip():
        return BLANK
    try:
        record = json.loads(line.removeprefix(reading.BOM))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def show_format(name, record, form, fields):
    """Print how the records of a --source are read, and what the first one gives."""
    try:
        text = "".join(formats.document(form, fields, [record[field] for field in fields]))
    except (KeyError, ValueError):
        text = "(not readable so)"
    shown = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    shown = shown.replace("\n", "\n    ")
    print(
        f"{name}: fields {', '.join(map(repr, record))}; taken as {form} from "
        f"{', '.join(map(repr, fields))}, the first document:\n    {shown}"
    )
