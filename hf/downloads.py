"""Names of models -> local folders: a folder is itself, a hub id is downloaded into a cache.

    resolve("TinyLlama/TinyLlama_v1.1")                        # config, tokenizer files, weights
    resolve("mistralai/Mistral-7B-v0.1", files="tokenizer")    # what prepare.py needs
    dataset_files("openai/gsm8k")                              # (commit, [(path, bytes), ...])

No file is fetched that is not needed, none twice, and the weights last, after everything that could
refuse them. huggingface-hub's environment variables hold: HF_TOKEN, HF_HUB_OFFLINE=1, HF_HUB_CACHE,
HF_ENDPOINT.
"""

import errno
import re
from pathlib import Path

from common.errors import UserError
from common.records import read_json
from hf.tokenizer_files import DECIDING, FILES
from hf.weight_files import WEIGHTS, shard_names

COMMIT = re.compile("[0-9a-f]{40}")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REPEATED = ("vocab.json", "merges.txt")  # they say again what tokenizer.json says
# Failures of this machine, not of the connection.
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
# A broken connection, rather than a server's answer. Names: the HTTP library depends on the client.
BROKEN = (
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "ChunkedEncodingError",
    "ConnectionError",
    "IncompleteRead",
)


# ---- models


def resolve(name, revision=None, files="model"):
    """The folder of a model: `name` itself where it exists, else the cached snapshot of a hub id.

    `revision`: branch, tag or commit of a hub id; default: main. `files`: "model", or "tokenizer"
    to leave out the weights. Raises UserError that says what is missing, gated, unreachable, or not
    supported by the kit.
    """
    if Path(name).exists():
        if revision:
            raise UserError(
                f"--revision {revision}: {name} is a folder here, "
                "and a revision belongs to a hub id"
            )
        return Path(name)
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(
            f"{name}: no such folder, and not a hub id "
            "(OWNER/NAME, such as microsoft/rho-math-1b-v0.1)"
        )
    config = get(name, "config.json", revision)
    if files == "model":
        check_config(name, config)
    # all files of one commit, whatever is pushed meanwhile
    commit = config.parent.name if config else revision
    folder = fetch_tokenizer(name, commit)
    if files == "model":
        get(name, "generation_config.json", commit)
        fetch_weights(name, commit)
    return folder


def check_config(name, config):
    """Refuse a model that the kit does not support, before more of it is downloaded."""
    # It imports torch through model.py, a second that prepare.py need not pay.
    from hf.config import config_from_hf

    if not config:
        raise UserError(
            f"{name}: no config.json {where()}; it is not a model in Hugging Face's format"
        )
    config_from_hf(read_json(config, "model"), f"{name}: config.json")


def fetch_tokenizer(name, commit):
    """The folder that a model's tokenizer files now lie in."""
    deciding = [get(name, file, commit) for file in DECIDING]
    found = [path for path in deciding if path]
    if not found:
        raise UserError(f"{name}: neither tokenizer.json nor tokenizer.model {where()}")
    for file in FILES:
        if file not in DECIDING + REPEATED:
            get(name, file, commit)
    return found[0].parent


def fetch_weights(name, commit):
    """One format of a model's weights: the first of WEIGHTS that the repository has."""
    for whole, index in WEIGHTS:
        if get(name, whole, commit):
            return
        path = get(name, index, commit)
        if not path:
            continue
        for shard in shard_names(path):
            if not get(name, shard, commit):
                raise UserError(f"{name}: {shard}, which {index} names, is not {where()}")
        return
    raise UserError(
        f"{name}: no weights {where()}; "
        "looked for model.safetensors, pytorch_model.bin, their indexes"
    )


def where():
    """Where a file was looked for, as the end of a sentence."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to download it"
    return "on the hub"


# ---- data sets


def dataset_files(name, revision=None):
    """(commit, [(path, bytes)]) of a data set's repository, asked of the hub. Raises UserError."""
    import huggingface_hub as hub

    def request():
        return hub.HfApi().dataset_info(name, revision=revision, files_metadata=True)

    info = ask(name, "its list of files", revision, request, "data set")
    return info.sha, [(file.rfilename, file.size or 0) for file in info.siblings]


# ---- requests


def get(name, file, revision, **place):
    """The cached path of a repository's file, downloaded if need be.

    None where the repository (offline: the cache) has no such file. `place`: repo_type and
    local_dir, for data sets. Raises UserError.
    """
    import huggingface_hub as hub  # slow to import, and needed for hub ids alone

    # a commit cannot change: what is known of it needs no request
    if not place and revision and COMMIT.fullmatch(revision):
        known = hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(known, str):
            return Path(known)
        if known is not None:  # known to be absent
            return None

    def request():
        return hub.hf_hub_download(name, file, revision=revision, **place)

    path = ask(name, file, revision, request, "data set" if place else "model")
    return Path(path) if path else None


def ask(name, file, revision, request, kind):
    """request(), or None where the repository (offline: the cache) has no such file.

    Raises UserError that says what is wrong in the user's terms; `kind`: "model" or "data set".
    """
    from huggingface_hub import constants, errors

    at = ""
    if revision and not COMMIT.fullmatch(revision):
        at = f" at revision {revision}"
    try:
        return persistent(request)
    except errors.GatedRepoError:
        folder = "datasets/" if kind == "data set" else ""
        problem = (
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{folder}{name}, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        missing = "folder, and no such model" if kind == "model" else kind
        problem = f"{name}: no such {missing} on the hub (private ones need HF_TOKEN)"
    except errors.LocalEntryNotFoundError as error:
        causes = chain(error)
        if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
            problem = f"{name}: the hub has no revision {revision} of it"
        elif not constants.HF_HUB_OFFLINE:
            problem = (
                f"{name}: {constants.ENDPOINT} could not be reached for {file} "
                f"({reason(causes[-1])}); run again to go on, "
                "or with HF_HUB_OFFLINE=1 to make do with the cache"
            )
        elif file == "config.json":
            problem = f"{name}{at}: no such folder, and no config.json {where()}"
        else:
            return None
    except errors.RevisionNotFoundError:
        problem = f"{name}: the hub has no revision {revision} of it"
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # of the connection, by whatever HTTP library the client uses
        if isinstance(error, OSError) and error.errno in OURS:
            raise
        problem = (
            f"{name}: the download of {file}{at} failed ({reason(error)}); "
            "files that are whole are kept, run again to go on"
        )
    raise UserError(problem)


def persistent(request, attempts=3):
    """request(); tried again after kinds of broken connection that the client does not resume."""
    while True:
        try:
            return request()
        except Exception as error:
            attempts -= 1
            if attempts == 0 or type(error).__name__ not in BROKEN:
                raise


def chain(error):
    """An exception and its causes, the first cause last."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def reason(error):
    """One line on an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
