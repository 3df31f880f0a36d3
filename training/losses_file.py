"""What lies at score.py's --out: the stored losses, their entropies and the note beside them.

The note counts the windows that were scored. Entropies are made with the losses, or later, in a
pass of their own; then the note counts those windows apart.
"""

import json
from pathlib import Path

from common import aside, files, locks, owned
from common.errors import UserError
from common.json_files import START_OVER, read_json
from common.numerics import SAID, notice
from common.records import as_record
from data import Note, entropy_path

NO_MATTER = ("model", "revision", "entropy")  # in the note: its losses are the same with another


def files_of(args):
    """The files of values: losses, and with --entropy entropies."""
    return list(paths_of(args).values()) if args.entropy else [Path(args.out)]


def paths_of(args):
    return {"loss": Path(args.out), "entropy": entropy_path(args.out)}


def progress_of(args, note):
    """{"loss": windows that are stored, "entropy": the same}, of what is there or asked for."""
    progress = {"loss": note["n_scored"]}
    if note["entropy"]:
        progress["entropy"] = note["n_scored"]
    elif args.entropy:
        progress["entropy"] = note["entropies"]["n_scored"]
    return progress


def passes(args, data, note):
    """What is still to be stored, a list of names for each pass over the token set.

    Losses that were there get their entropies in a pass of its own, and are not touched.
    """
    total = data.n_windows(args.seq_len)
    left = [name for name, stored in progress_of(args, note).items() if stored < total]
    if left and note["entropy"]:
        return [left]
    return [[name] for name in left]


def size_of(windows, data, seq_len):
    """Bytes of a file that holds so many windows: float16 values, the first token's is NaN."""
    return 2 * min(data.count, windows * seq_len + 1) if windows else 0


def claim(args, header, data):
    """Settle what lies at --out. Returns the note: what is known of the file, and how far it is."""
    out = Path(args.out)
    note = out.with_suffix(".json")
    owned.refuse_taken([note, *files_of(args), out.parent / place_of(out)])
    if not args.overwrite or not is_broken(note):
        refuse_other(out, note)
    locks.lock(out)
    settle_aside(args)
    if not note.exists():
        begun = {**header, "n_scored": 0, "checksums": {}, "validation": []}
        files.write_atomic(note, json.dumps(begun, indent=1))
        return begun
    saved = read_json(note, "stored losses", START_OVER)
    as_record(saved, Note, f"stored losses: {note}", "start over with --overwrite")
    differing = [
        f"{key} {saved.get(key)!r} -> {value!r}"
        for key, value in header.items()
        if saved.get(key) != value and key not in (*SAID, *NO_MATTER)
    ]
    if differing:
        raise UserError(
            f"{out} holds other losses ({'; '.join(differing)}); choose another --out or "
            f"start over with --overwrite"
        )
    if saved["n_scored"] < data.n_windows(args.seq_len) and (said := notice(out, saved, header)):
        print(said)
    settle_entropies(args, saved, header)
    for name, n_scored in progress_of(args, saved).items():
        path = paths_of(args)[name]
        size = path.stat().st_size if path.exists() else 0
        wanted = size_of(n_scored, data, args.seq_len)
        if size < wanted:
            raise UserError(
                f"{path} has {size} bytes, {note.name} says that {wanted} were written; it was "
                f"cut: start over with --overwrite"
            )
    if saved["n_scored"]:  # a kill came before the first losses could do so
        aside.discard(out.parent, place_of(out))
    return saved


def settle_entropies(args, note, header):
    """Bring the note in line with `--entropy` and with what is there."""
    note.setdefault("entropy", False)
    path = entropy_path(args.out)
    if note["n_scored"] == 0:
        note["entropy"] = args.entropy
    elif note["entropy"] and not path.exists():
        note["entropy"] = False
        note["checksums"].pop(path.name, None)
        note.pop("entropies", None)
    if args.entropy and not note["entropy"]:
        how = {name: header[name] for name in SAID}
        note.setdefault("entropies", {"n_scored": 0, **how})


def is_broken(note):
    """Is there a note that cannot be read? --overwrite is then the way out."""
    if not note.exists():
        return False
    try:
        read_json(note, "note")
    except UserError:
        return True
    return False


def refuse_other(out, note):
    """Raises UserError where the kit wrote something at `out` that are no losses."""
    began_over = (out.parent / place_of(out)).exists()
    if not out.exists() or out.stat().st_size == 0 or began_over:
        return
    if not note.exists() or "n_scored" not in read_json(note, "stored losses", START_OVER):
        raise UserError(
            f"--out {out}: is there, and {note.name} is no note of losses beside it; "
            f"name another file"
        )


def settle_aside(args):
    """--overwrite: what is there stays aside until there are new losses."""
    out = Path(args.out)
    if args.overwrite:
        names = {path.name for path in (out, entropy_path(out), out.with_suffix(".json"))}
        aside.set_aside(out.parent, names=names, place=place_of(out))
    else:
        aside.put_back(out.parent, place_of(out))
    if not entropy_path(out).exists():
        files.remove(entropy_path(out))  # the list must not name what is not there
    locks.unlock(out)  # the lock went along
    locks.lock(out)


def save_note(args, note):
    files.write_atomic(Path(args.out).with_suffix(".json"), json.dumps(note, indent=1))


def place_of(out):
    """The name of the folder for what --overwrite sets aside."""
    return f".before-{Path(out).name}"
