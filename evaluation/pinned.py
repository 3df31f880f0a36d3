"""The public files that the test sets are made of: found, or downloaded once, and checked.

    find("eval/gsm8k.jsonl")               # fetched into ~/.cache/rho-slm (or $RHO_CACHE)
    find("eval/gsm8k.jsonl", "my-copy")    # my-copy/eval/gsm8k.jsonl, no network

Rho-1 evaluates with a public harness. Its test sets and prompts are read at one pinned commit,
TabMWP from its own repository, and every download must have the checksum below.
"""

import contextlib
import hashlib
import http.client
import io
import os
import sys
import tarfile
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomic
from common.json_files import parse_text, regular_size
from common.locks import taking_turns
from common.records import as_record, read_json

GITHUB = "https://raw.githubusercontent.com"
HARNESS = "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
PROMPTPG = "lupantech/PromptPG/7cf61b1bec07222fc24b4f5a1410911f77c2d2c9"
PART = 1 << 16  # bytes read from the network at a time

SHA256 = {  # by the name in the data folder
    "eval/gsm8k.jsonl": "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394",
    "eval/math_oai.jsonl": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    "eval/svamp.jsonl": "d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d",
    "eval/asdiv.jsonl": "5759580385e706f961a30d4c07d6925b35c3f7c86d6c50bc413957169693dad2",
    "eval/mawps.jsonl": "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b",
    "eval/mathqa.jsonl": "136de4608366708d01d4c38890437e722c9209e9a66ef5d119cb01f6f88dfec6",
    "eval/mmlu_stem.jsonl": "fd7c16f96067d285638abb5aaef9cd8a063b11454e14cb64df93141a58691478",
    "eval/sat_math.jsonl": "96720a1dc496ea72f80db55250290cf9c48e95b657ac2183b7deb1dc4627351f",
    "eval/gsm_hard.jsonl": "45db606263a4902580aba3974e8b7fb3f66012877889209af206b1c1b2f208f5",
    "eval/tabmwp_test1k.json": "bf34a84d359c48ba8f401c49f65363858a8a63530921d319b175550e1f352f69",
    "prompts/gsm8k.md": "f7b267f942be471e4ea8013cdba4c4df3cad1f969774c073e9165c568043a7b8",
    "prompts/minerva_math.md": "6637ad6e3ece303c059196bebdc3607ab9f617f4a57f73ac44afeb7f4320c829",
    "prompts/mathqa.md": "ba599b1fda1932b423e368b6a43643a10763cec1753dcdaca51375fdcd33c0cb",
    "prompts/mmlu_stem.md": "c5e61e1f80bbf4b08d60db5abaa55dcdc1a211093ce33e2a591ae9647bf8907a",
}


def address(name):
    """Where a file lies at its source, below GITHUB."""
    if name == "eval/tabmwp_test1k.json":
        return f"{PROMPTPG}/data/tabmwp/problems_test1k.json"
    stem = PurePosixPath(name).stem
    if name.startswith("prompts/"):
        return f"{HARNESS}/prompts/cot/{stem}.md"
    return f"{HARNESS}/data/{stem}/test.jsonl"


def cache_dir():
    return Path(os.environ.get("RHO_CACHE") or Path.home() / ".cache" / "rho-slm")


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def find(name, data_dir=None):
    """Path of a file such as "eval/gsm8k.jsonl": in `data_dir`, else the cache, else downloaded.

    A file of the user's own data_dir that differs from the published one is used, with a warning.
    Raises UserError where data_dir lacks the file, there is no network, or the checksum is wrong.
    """
    if data_dir is not None:
        return find_own(name, data_dir)
    path = cache_dir() / name
    if is_whole(path, name):
        return path
    with taking_turns(path.parent):  # several ranks or runs may want it at once: one downloads it
        if not is_whole(path, name):
            write_atomic(path, downloaded(name))
    return path


def is_whole(path, name):
    return path.is_file() and sha256_of(path.read_bytes()) == SHA256[name]


def downloaded(name):
    """The bytes of a public file, checked. Raises UserError."""
    url = f"{GITHUB}/{address(name)}"
    content = download(url, name)
    got = sha256_of(content)
    if got != SHA256[name]:
        raise UserError(
            f"{url}: got a file with sha256 {got}, wanted {SHA256[name]}; "
            f"it was refused: try again, or give a good copy with --data-dir"
        )
    return content


def find_own(name, data_dir):
    """Path of a file in a folder of the user's."""
    path = Path(data_dir) / name
    if not path.is_file():
        raise UserError(
            f"--data-dir: got {data_dir}, wanted a folder that holds {name}; "
            f"name the folder that has eval/ and prompts/, or leave --data-dir out to download"
        )
    if sha256_of(path.read_bytes()) != SHA256[name]:
        print(
            f"warning: {path} is not the published file (its sha256 differs): "
            f"numbers made with it do not compare with the paper's",
            file=sys.stderr,
        )
    return path


def download(url, name, timeout=30):
    """Bytes behind `url`. Raises UserError when it cannot be had."""
    parts = []
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(
                total=size, unit="B", unit_scale=True, desc=name, leave=False, delay=1
            ) as bar:
                while part := answer.read(PART):
                    parts.append(part)
                    bar.update(len(part))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{name}: got no file from {url} ({error}), wanted the public test set; connect to the "
            f"network, or name a folder that holds eval/ and prompts/ with --data-dir"
        ) from error
    return b"".join(parts)


@contextlib.contextmanager
def whole_archive(content, name):
    """A .tar.gz, open, of its bytes. Raises UserError where it is cut or none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            yield files
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: not a whole .tar.gz ({error}); download it again") from None


def read_rows(path):
    """Rows of a .jsonl file, or the values of a .json object.

    Raises UserError with file and line number.
    """
    path = Path(path)
    regular_size(path, "problems")
    if path.suffix == ".json":
        rows = read_json(path, "problems")
        as_record(rows, dict[str, dict[str, Any]], f"problems: {path}")
        return list(rows.values())
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: got {error}, wanted a readable file") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(row_of(line, f"{path}, line {number}"))
    return rows


def row_of(line, where):
    """The JSON object in a line."""
    try:
        row = parse_text(line)
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}, not an object")
    except ValueError as error:
        raise UserError(
            f"{where}: got broken JSON ({error}), wanted one JSON object a line; "
            f"mend or delete the line"
        ) from error
    return row
