"""Names of models -> local folders: a folder is itself, a hub id is downloaded into huggingface-hub's cache.

    resolve("TinyLlama/TinyLlama_v1.1")                        # config, tokenizer files, weights
    resolve("mistralai/Mistral-7B-v0.1", files="tokenizer")    # what prepare.py needs
    dataset_files("openai/gsm8k")                              # (commit, [(path, bytes), ...])

No file is fetched that is not needed, none twice, and the weights last, after everything that could refuse them.
huggingface-hub's environment variables hold: HF_TOKEN, HF_HUB_OFFLINE=1, HF_HUB_CACHE, HF_ENDPOINT.
"""

import errno
import re
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from hf.tokenizer import FILES

COMMIT = re.compile("[0-9a-f]{40}")
WEIGHTS = (
    (
        "model.safetensors",
        "model.safetensors.index.json",
    ),  # (whole, index of shards), the preferred first
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def resolve(name, revision=None, files="model"):
    """The folder of a model: `name` itself where it exists, else the cached snapshot of the hub id OWNER/NAME.

    `revision`: branch, tag or commit of a hub id; default: main. `files`: "model", or "tokenizer" to leave out the
    weights. Raises UserError that says what is missing, gated, unreachable, or not supported by the kit.
    """
    if Path(name).exists():
        if revision:
            raise UserError(
                f"--revision {revision}: {name} is a folder here, and a revision belongs to a hub id"
            )
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(
            f"{name}: no such folder, and not a hub id (OWNER/NAME, such as microsoft/rho-math-1b-v0.1)"
        )
    from hf.config import config_from_hf  # needs torch, a second to import

    config = get(name, "config.json", revision)
    if files == "model" and not config:
        raise UserError(
            f"{name}: no config.json {where()}; it is not a model in Hugging Face's format"
        )
    if files == "model":
        config_from_hf(
            read_json(config, "model"), f"{name}: config.json"
        )  # what is not supported is not downloaded
    commit = (
        config.parent.name if config else revision
    )  # all files of one commit, whatever is pushed meanwhile
    found = [
        path
        for path in (get(name, file, commit) for file in ("tokenizer.json", "tokenizer.model"))
        if path
    ]
    if not found:
        raise UserError(f"{name}: neither tokenizer.json nor tokenizer.model {where()}")
    for file in (*FILES, *(["generation_config.json"] if files == "model" else [])):
        if file not in (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
        ):  # the last two say it again
            get(name, file, commit)
    folder = found[0].parent
    if files == "tokenizer":
        return folder
    for whole, index in WEIGHTS:
        if get(name, whole, commit):
            return folder
        if path := get(name, index, commit):
            for shard in shard_names(path):
                if not get(name, shard, commit):
                    raise UserError(f"{name}: {shard}, which {index} names, is not {where()}")
            return folder
    raise UserError(
        f"{name}: no weights {where()}; looked for model.safetensors, pytorch_model.bin, their indexes"
    )


def where():
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to download it"
    return "on the hub"


def dataset_files(name, revision=None):
    """(commit, [(path, bytes)]) of a data set's repository, asked of the hub. Raises UserError."""
    import huggingface_hub as hub

    info = ask(
        name,
        "its list of files",
        revision,
        lambda: hub.HfApi().dataset_info(name, revision=revision, files_metadata=True),
        "data set",
    )
    return info.sha, [(file.rfilename, file.size or 0) for file in info.siblings]


def get(name, file, revision, **place):
    """The cached path of a repository's file, downloaded if need be; None where the repository (offline: the cache) has
    no such file. `place`: repo_type and local_dir, for data sets. Raises UserError."""
    import huggingface_hub as hub  # a second to import, and needed for hub ids alone

    if (
        not place and revision and COMMIT.fullmatch(revision)
    ):  # a commit cannot change: what is known needs no request
        known = hub.try_to_load_from_cache(name, file, revision=revision)
        if known is not None:
            return Path(known) if isinstance(known, str) else None
    found = ask(
        name,
        file,
        revision,
        lambda: hub.hf_hub_download(name, file, revision=revision, **place),
        "data set" if place else "model",
    )
    return found and Path(found)


def ask(name, file, revision, request, kind):
    """request(), or None where the repository (offline: the cache) has no such file. The client resumes broken
    connections; what it does not is tried again. Raises UserError that says what is wrong in the user's terms."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision}" if revision and not COMMIT.fullmatch(revision) else ""
    try:
        for attempts_left in (2, 1, 0):
            try:
                return request()
            except Exception as error:  # the client itself goes on after some kinds of broken connection, not after all
                if attempts_left == 0 or not transient(error):
                    raise
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'data set')}{name}"
        raise UserError(
            f"{name} is gated: ask for access at {page}, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such {'folder, and no such ' * (kind == 'model')}{kind} on the hub (private ones "
            f"need HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        causes = chain(error)
        if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
            raise UserError(f"{name}: the hub has no revision {revision} of it") from None
        if not constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: {constants.ENDPOINT} could not be reached for {file} ({reason(causes[-1])}); "
                f"run again to go on, or with HF_HUB_OFFLINE=1 to make do with the cache"
            ) from None
        if file == "config.json":
            raise UserError(f"{name}{at}: no such folder, and no config.json {where()}") from None
        return None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision} of it") from None
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # of the connection, by whatever HTTP library the client uses
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
        ):
            raise
        raise UserError(
            f"{name}: the download of {file}{at} failed ({reason(error)}); files that are whole are "
            f"kept, run again to go on"
        ) from None


def chain(error):
    """An exception and its causes, the first cause last."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def transient(error):
    """Did the connection break, rather than the server answer? By name: the HTTP library depends on the client."""
    return type(error).__name__ in (
        "ReadError",
        "ReadTimeout",
        "RemoteProtocolError",
        "ChunkedEncodingError",
        "ConnectionError",
        "IncompleteRead",
    )


def reason(error):
    """One line on an exception."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def shard_names(index):
    """The files that an index of shards (PATH) names, sorted. Raises UserError unless they lie in the same folder."""
    raw = read_json(index, "weights' index")
    named = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: no weight_map in it")
    for name in named.values():
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name)):
            raise UserError(
                f"{index} names {str(name)[:80]!r}: shards are .safetensors or .bin files beside it"
            )
    return sorted(set(named.values()))
