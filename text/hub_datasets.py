"""Data sets on the hub, one shard at a time: hf:REPO[:CONFIG][:SPLIT][@REVISION] for prepare.py.

    hf:open-web-math/open-web-math                  every shard of the split train
    hf:openai/gsm8k:main:train                      files of the folder (or with the prefix) main
    hf:cerebras/SlimPajama-627B@2d0accd             at a commit

The listing is settled once and kept beside the token set (OUT/hub.json): a restart reads the same
commit although the branch has moved on. A shard is downloaded when its turn comes and deleted when
the next one is, so the disk holds one. Shards take turns in the order of a hash of their names, so
that a part of a data set (--max-tokens) comes from all of its folders: StarCoderData has one for
each language, Ada first.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common import files as disk
from common import locks, owned
from common.errors import UserError
from common.records import Bound, as_record, matching, read_json
from hf import downloads

FOLDER = ".hub-shard"  # in OUT: where the one shard is; nothing else is ever in it
NAME = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(?::(?P<config>[^:@]*))?(?::(?P<split>[^:@]*))?(?:@(?P<revision>\S+))?"
)
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
DESCRIPTIONS = ("dataset_infos.json", "dataset_dict.json")  # of a data set, and no records
SHARD_NAME = re.compile(
    rf"(?:^|/)(?P<split>(?:{'|'.join(SPLITS)})(?:[_.-][^/]*)?)-\d{{5}}-of-\d{{5}}"
)
FOLDERS_NAMED = 12  # of a repository in which nothing fits


def is_shard(pair):
    """[path, bytes], the path inside the folder that it is put into."""
    if len(pair) != 2 or type(pair[1]) is not int or not isinstance(pair[0], str):
        return False
    path = Path(pair[0])
    return pair[1] >= 0 and not path.is_absolute() and ".." not in path.parts


@dataclass
class Listing:
    """What OUT/hub.json says of a --source."""

    commit: Annotated[str, matching("[0-9a-f]{40}", "a commit")]
    files: list[Annotated[list[Any], Bound(is_shard, "[path, bytes]")]]


@dataclass
class Shard:
    """A file of a data set on the hub. `out`: the token set's folder, where it is put."""

    repo: str
    commit: str
    path: str
    out: str

    @property
    def name(self):
        return f"hf:{self.repo}@{self.commit[:12]}/{self.path}"

    @property
    def folder(self):
        """Its own: most data sets call a file data/train-00000-of-00001.parquet."""
        return Path(self.out) / FOLDER / self.repo / self.commit

    @property
    def file(self):
        return str(self.folder / self.path)

    def fetch(self):
        """Download it unless it is there; every other shard is deleted. Raises UserError."""
        if Path(self.file).exists():
            return
        locks.lock_folder(self.out, "token set")
        delete_shard(self.out)
        owned.claim(Path(self.out) / FOLDER)
        place = {"repo_type": "dataset", "local_dir": str(self.folder)}
        if downloads.get(self.repo, self.path, self.commit, **place) is None:
            raise UserError(f"{self.name}: is not on the hub any more, although the listing has it")


def delete_shard(out):
    """Delete the one shard that is on the disk."""
    disk.remove_tree(Path(out) / FOLDER)


def parse(name):
    """{"repo", "config", "split", "revision"}. Raises UserError."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"--source {name}: wanted hf:OWNER/NAME[:CONFIG][:SPLIT][@REVISION]")
    return {key: value or None for key, value in found.groupdict().items()}


def choose(files, config, split, endings, otherwise=None):
    """The shards [(path, bytes)] of a config and split, in the order of a hash of their paths.

    `files`: those of the repository. No `config`: all of them. A shard's name says which split it
    is (train_sft-00000-of-00003), else a word of its path (between / - _ .); where no path has one,
    all are taken. No `split`: train. Files that end `otherwise` count where no other does: a .json
    may hold records, or describe the others.
    """
    chosen = [file for file in files if file[0].endswith(tuple(endings))]
    if not chosen and otherwise:
        chosen = [file for file in files if file[0].endswith(otherwise)]
        chosen = [file for file in chosen if file[0] not in DESCRIPTIONS]
    if config:
        chosen = [file for file in chosen if is_of_config(file[0], config)]
    has_splits = any(words_of(path) & set(SPLITS) for path, _ in chosen)
    if split or has_splits:
        chosen = [file for file in chosen if is_of_split(file[0], split or "train")]
    return sorted(chosen, key=lambda file: hashlib.sha256(file[0].encode()).digest())


def words_of(path):
    return set(re.split(r"[/\-_.]", path))


def split_of(path):
    """The split that a shard is named after, "train_sft" of train_sft-00000-of-00003, or None."""
    found = SHARD_NAME.search(path)
    return found["split"] if found else None


def is_of_split(path, split):
    named = split_of(path)
    return split == named if named else split in words_of(path) | set(path.split("/"))


def is_of_config(path, config):
    """Does a file lie in the config's folder, or begin with its name?"""
    in_folder = config in path.split("/")[:-1]
    return in_folder or re.match(re.escape(config) + r"[-_./]", path) is not None


def listing(name, path, endings, otherwise=None):
    """What is known of a --source: {"commit", "files": [[path, bytes], ...]}, and perhaps "format".

    From `path`, OUT/hub.json; the first time from the hub, and noted there. Raises UserError.
    """
    entry = noted(path).get(name)
    if entry is None:
        asked = parse(name)
        commit, files = downloads.dataset_files(asked["repo"], asked["revision"])
        chosen = choose(files, asked["config"], asked["split"], endings, otherwise)
        if not chosen:
            raise nothing_fits(name, asked["repo"], files, endings)
        entry = note(name, path, commit=commit, files=chosen)
    files = entry["files"]
    gigabytes = sum(size for _, size in files) / 1e9
    print(
        f"{name}: {len(files):,} shards, {gigabytes:.2f} GB, at commit {entry['commit'][:12]}, "
        f"first {files[0][0]}"
    )
    return entry


def nothing_fits(name, repo, files, endings):
    folders = sorted({path.rsplit("/", 1)[0] for path, _ in files})
    shown = ", ".join(folders[:FOLDERS_NAMED])
    if len(folders) > FOLDERS_NAMED:
        shown += " ..."
    if splits := sorted({split for path, _ in files if (split := split_of(path))}):
        shown += f", and the splits {', '.join(splits)}, as in hf:{repo}::{splits[0]}"
    return UserError(
        f"--source {name}: {repo} has no file that fits, of {len(files)}; wanted one of "
        f"{' '.join(endings)}; it has {shown}"
    )


def noted(path):
    """What OUT/hub.json says: {--source: what is known of it}. Raises UserError."""
    if not Path(path).exists():
        return {}
    what = "listing of the hub's files"
    mend = "delete it, and the same command asks the hub again"
    known = read_json(path, what, mend)
    as_record(known, dict[str, Listing], f"{what}: {path}", mend)
    return known


def note(name, path, **more):
    """Add to what OUT/hub.json says of a --source; returns all of that."""
    known = noted(path)
    known[name] = {**known.get(name, {}), **more}
    locks.lock_folder(Path(path).parent, "token set")
    disk.write_atomic(path, json.dumps(known))
    return known[name]


def listing_of(out, overwrite):
    """The file in a token set's folder that keeps what the hub said.

    With --overwrite that is another one at first: the old set stands until the new one begins.
    """
    return Path(out) / ("hub.new.json" if overwrite else "hub.json")


def take_over_listing(out, overwrite):
    """What the hub said is now what the set in `out` is made of; what is left of another one goes.

    Called when nothing else of an older set is in the way.
    """
    new = listing_of(out, overwrite=True)
    if overwrite and new.exists():
        disk.rename(new, listing_of(out, overwrite=False))
    disk.remove(new)
