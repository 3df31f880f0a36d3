"""Data sets on the hub, one shard at a time: hf:REPO[:CONFIG][:SPLIT][@REVISION] for prepare.py.

    hf:open-web-math/open-web-math                  every shard of the split train
    hf:openai/gsm8k:main:train                      files of the folder (or with the prefix) main, split train
    hf:cerebras/SlimPajama-627B@2d0accd             at a commit

The listing is settled once and kept beside the token set (OUT/hub.json): a restart reads the same commit although the
branch has moved on. A shard is downloaded when its turn comes and deleted when the next one is, so the disk holds one.
Shards take turns in the order of a hash of their names, so that a part of a data set (--max-tokens) comes from all of its
folders: StarCoderData has one for each language, Ada first.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from common.errors import UserError
from common.files import read_json, write_atomic
from hf import downloads

FOLDER = ".hub-shard"  # in OUT: where the one shard is; nothing else is ever in it
NAME = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[^:@]*))?(?::(?P<split>[^:@]*))?(?:@(?P<revision>\S+))?"
)
SPLITS = ("train", "test", "validation", "valid", "val", "dev")


def parse(name):
    """{"repo", "config", "split", "revision"}. Raises UserError."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"--source {name}: wanted hf:OWNER/NAME[:CONFIG][:SPLIT][@REVISION]")
    return {key: value or None for key, value in found.groupdict().items()}


def choose(files, config, split, endings, otherwise=None):
    """The shards [(path, bytes)] of a config and split among a repository's files, by a hash of their paths. A word of a path (between
    / - _ . ) says which split it is; where no path has one, all are taken. No config: all of them. Files that end
    `otherwise` count where no other does (a .json may hold records, or describe the others)."""
    every, files = files, [(path, size) for path, size in files if path.endswith(tuple(endings))]
    if not files and otherwise:
        files = [
            (path, size)
            for path, size in every
            if path.endswith(otherwise) and path not in ("dataset_infos.json", "dataset_dict.json")
        ]

    def words(path):
        return re.split(r"[/\-_.]", path)

    if config:
        files = [
            f
            for f in files
            if config in f[0].split("/")[:-1] or re.match(re.escape(config) + r"[-_./]", f[0])
        ]
    split_words = {word for path, _ in files for word in words(path) if word in SPLITS}
    if split or split_words:
        files = [f for f in files if (split or "train") in words(f[0])]
    return sorted(files, key=lambda f: hashlib.sha256(f[0].encode()).digest())


def listing(name, out, endings, otherwise=None):
    """{"commit", "files": [[path, bytes], ...]} of a --source, from OUT/hub.json or from the hub, noted there."""
    path = Path(out) / "hub.json"
    known = read_json(path, "listing of the hub's files") if path.exists() else {}
    if name not in known:
        asked = parse(name)
        commit, files = downloads.dataset_files(asked["repo"], asked["revision"])
        chosen = choose(files, asked["config"], asked["split"], endings, otherwise)
        if not chosen:
            folders = sorted({path.rsplit("/", 1)[0] if "/" in path else path for path, _ in files})
            raise UserError(
                f"--source {name}: {asked['repo']} has no file that fits, of {len(files)}; wanted one of "
                f"{' '.join(endings)}; it has {', '.join(folders[:12])}{' ...' * (len(folders) > 12)}"
            )
        known[name] = note(name, out, commit=commit, files=chosen)
    entry = known[name]
    print(
        f"{name}: {len(entry['files']):,} shards, {sum(size for _, size in entry['files']) / 1e9:.2f} GB, at commit "
        f"{entry['commit'][:12]}, first {entry['files'][0][0]}"
    )
    return entry


def note(name, out, **more):
    """Add to what OUT/hub.json says of a --source; returns all of that."""
    path = Path(out) / "hub.json"
    known = read_json(path, "listing of the hub's files") if path.exists() else {}
    known[name] = {**known.get(name, {}), **more}
    write_atomic(path, json.dumps(known))
    return known[name]


def fetch(source):
    """The shard of a source as a local file; every other shard is deleted. Raises UserError."""
    folder = Path(source["folder"])
    wanted = folder / source["file"]
    if not wanted.exists():
        shutil.rmtree(folder, ignore_errors=True)
        path = downloads.get(
            source["repo"],
            source["file"],
            source["commit"],
            repo_type="dataset",
            local_dir=str(folder),
        )
        if path is None:
            raise UserError(
                f"{source['path']}: is not on the hub any more, although the listing has it"
            )
    return str(wanted)
