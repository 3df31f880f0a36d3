"""Hub ids -> folders, against a stand-in hub on this machine and a cache without network."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from conftest import HANGS, ROOT, finish, launch, write_model, write_set
from hf import checkpoint, downloads

CLIENT = """
import json, sys
from hf import downloads
from common.errors import UserError
for line in sys.stdin:
    try:
        print(json.dumps({"folder": str(downloads.resolve(**json.loads(line)))}), flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


class Server(http.server.ThreadingHTTPServer):
    """repositories: {name: {revision: {file: bytes}}}; gated: names; cut: {file: bytes sent before
    the connection is dropped, once}; log: [(method, name, revision, file, Range)].
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated, self.cut, self.log = {}, set(), {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fetched(self, name):
        return [
            file
            for method, repository, _, file, _ in self.log
            if repository == name and method == "GET"
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def refuse(self, status, code, files=None):
        self.send_response(status)
        if files:
            self.send_header("X-Repo-Commit", commit(files))
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/", 4)
        if len(parts) < 5 or parts[2] != "resolve":
            return self.refuse(404, "RepoNotFound")
        name, revision, file = "/".join(parts[:2]), parts[3], parts[4]
        self.server.log.append((self.command, name, revision, file, self.headers.get("Range")))
        revisions = self.server.repositories.get(name)
        if revisions is None:
            return self.refuse(
                401, "RepoNotFound"
            )  # what the hub answers to those who are not logged in
        if name in self.server.gated:
            return self.refuse(401, "GatedRepo")
        files = revisions.get(revision) or next(
            (f for f in revisions.values() if commit(f) == revision), None
        )
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if file not in files:
            return self.refuse(404, "EntryNotFound", files)
        body, start = files[file], 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit(files))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut.pop(file, None)
            self.wfile.write(body[start:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

    do_HEAD = do_GET


def commit(files):
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


def files_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Client:
    """resolve(...) -> {"folder": ...} or {"error": ...}, in a process of its own: huggingface-hub
    reads its environment when it is imported.
    """

    def __init__(self, endpoint, cache, offline=False):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment(endpoint, cache, offline),
        )

    def resolve(self, name, **options):
        self.process.stdin.write(json.dumps({"name": str(name), **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=HANGS)


def environment(endpoint, cache, offline=False):
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory, vocabulary):
    server, made = Server(), tmp_path_factory.mktemp("made")
    big = {"hidden_size": 512, "intermediate_size": 1600}
    big |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    write_model(made / "single", vocabulary, **big)  # 24 MB: the client resumes in units of 10
    (made / "single/vocab.json").write_text("{}")
    (made / "single/README.md").write_text("# not needed")
    (made / "single/pytorch_model.bin").write_bytes(b"not needed")
    model = write_model(made / "sharded", vocabulary, seed=1)
    (made / "sharded/model.safetensors").unlink()
    checkpoint.save(model, made / "sharded", shard_bytes=20_000)
    write_model(made / "tagged", vocabulary, seed=2)
    old = write_model(made / "pickled", vocabulary, seed=3)
    (made / "pickled/model.safetensors").unlink()
    torch.save(
        {k: v for k, v in old.state_dict().items() if k != "lm_head.weight"},
        made / "pickled/pytorch_model.bin",
    )
    repositories = {
        f"tiny/{name}": {"main": files_in(made / name)} for name in ("single", "sharded", "pickled")
    }
    repositories["tiny/sharded"]["v1"] = files_in(made / "tagged")
    for name, file, change in (
        ("gpt2", "config.json", {"model_type": "gpt2"}),
        ("climber", "model.safetensors.index.json", {"weight_map": {"a": "../../etc/passwd"}}),
    ):
        files = dict(repositories["tiny/sharded"]["main"])
        files[file] = json.dumps({**json.loads(files[file]), **change}).encode()
        repositories[f"tiny/{name}"] = {"main": files}
    for name, without in (
        ("no-tokenizer", "tokenizer.json"),
        ("no-config", "config.json"),
        ("no-weights", "model"),
    ):
        repositories[f"tiny/{name}"] = {
            "main": {
                k: v
                for k, v in repositories["tiny/sharded"]["main"].items()
                if not k.startswith(without)
            }
        }
    repositories["tiny/gated"] = repositories["tiny/sharded"]
    server.repositories, server.gated, server.made = repositories, {"tiny/gated"}, made
    server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(server, cache):
    client = Client(server.endpoint, cache)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(server, cache):
    client = Client(server.endpoint, cache, offline=True)
    yield client
    client.close()


def same_weights(folder, made):
    a, b = (checkpoint.load(f).state_dict() for f in (folder, made))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_one_file_over_a_connection_that_breaks(server, online):
    """Resumed where it broke, whole in the end, and no file that is not needed."""
    server.cut["model.safetensors"] = 15_000_000
    folder = online.resolve("tiny/single")["folder"]
    assert same_weights(folder, server.made / "single")
    ranges = [
        entry[4] for entry in server.log if entry[0] == "GET" and entry[3] == "model.safetensors"
    ]
    assert (
        ranges[0] is None and 0 < int(ranges[1].removeprefix("bytes=").split("-")[0]) <= 15_000_000
    )
    assert not {"README.md", "vocab.json", "pytorch_model.bin"} & set(server.fetched("tiny/single"))
    assert (
        server.fetched("tiny/single")[-1] == "model.safetensors"
    )  # after all that could refuse it


@pytest.mark.slow
def test_shards_of_one_commit_and_nothing_twice(server, online):
    shard = sorted(file for file in server.repositories["tiny/sharded"]["main"] if "-of-" in file)[
        1
    ]
    server.cut[shard] = 1000
    folder = online.resolve("tiny/sharded")["folder"]
    assert (
        same_weights(folder, server.made / "sharded")
        and len(list(Path(folder).glob("model-*"))) > 2
    )
    assert {entry[2] for entry in server.log if entry[1] == "tiny/sharded"} == {
        "main",
        commit(server.repositories["tiny/sharded"]["main"]),
    }
    before = len(server.log)
    assert online.resolve("tiny/sharded")["folder"] == folder
    assert [entry[0] for entry in server.log[before:]] == [
        "HEAD"
    ]  # only: is main still this commit?


def test_pickled_weights_of_an_old_repository(server, online):
    assert same_weights(online.resolve("tiny/pickled")["folder"], server.made / "pickled")


def test_a_revision_by_tag_and_by_commit(server, online):
    wanted = commit(server.repositories["tiny/sharded"]["v1"])
    for revision in ("v1", wanted):
        folder = online.resolve("tiny/sharded", revision=revision)["folder"]
        assert Path(folder).name == wanted and same_weights(folder, server.made / "tagged")


def test_the_tokenizer_alone(server, tmp_path_factory):
    client = Client(server.endpoint, tmp_path_factory.mktemp("other"))
    before = len(server.log)
    folder = Path(client.resolve("tiny/gpt2", files="tokenizer")["folder"])  # whatever the model is
    client.close()
    assert (folder / "tokenizer.json").read_bytes() == (
        server.made / "sharded/tokenizer.json"
    ).read_bytes()
    assert not any(
        "model" in entry[3] and "tokenizer" not in entry[3] for entry in server.log[before:]
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tiny/gated", {}, "is gated: ask for access at http"),
        ("tiny/wrong", {}, "no such model on the hub"),
        ("tiny/sharded", {"revision": "v9"}, "no revision v9"),
        ("no folder", {}, "no such folder, and not a hub id"),
        ("../etc", {}, "no such folder, and not a hub id"),
        ("out/a/b", {}, "no such folder, and not a hub id"),
        ("tiny/gpt2", {}, "model_type is 'gpt2'"),
        ("tiny/climber", {}, "names '../../etc/passwd'"),
        ("tiny/no-tokenizer", {}, "neither tokenizer.json nor tokenizer.model on the hub"),
        ("tiny/no-config", {}, "no config.json on the hub"),
        ("tiny/no-weights", {}, "no weights on the hub"),
    ],
)
def test_refused_in_one_line_before_any_weights(name, options, message, server, online):
    error = online.resolve(name, **options)["error"]
    assert (
        message in error
        and "\n" not in error
        and (name in error or name.replace("/", "--") in error)
    )
    fetched = server.fetched(name) if not options else []
    assert not any(file.endswith((".safetensors", ".bin")) for file in fetched)


@pytest.mark.slow  # the client tries again for half a minute
def test_a_hub_out_of_reach(cache):
    client = Client("http://127.0.0.1:9", cache)
    error = client.resolve("tiny/never-seen")["error"]
    client.close()
    assert "http://127.0.0.1:9 could not be reached" in error and "\n" not in error


def test_offline_reads_the_cache_alone(server, online, offline):
    name = (
        online.resolve("tiny/sharded", revision="v1")["folder"],
        online.resolve("tiny/sharded")["folder"],
    )
    before = len(server.log)
    assert (
        offline.resolve("tiny/sharded", revision="v1")["folder"],
        offline.resolve("tiny/sharded")["folder"],
    ) == name
    for missing in ("tiny/never-seen", "tiny/gated"):
        error = offline.resolve(missing)["error"]
        assert "no config.json in the cache" in error and "HF_HUB_OFFLINE=1 forbids" in error
    shard = sorted(Path(name[1]).glob("model-*.safetensors"))[1]
    target = shard.resolve()
    shard.unlink()
    assert (
        f"{shard.name}, which model.safetensors.index.json names, is not in the cache"
        in offline.resolve("tiny/sharded")["error"]
    )
    shard.symlink_to(target)
    assert len(server.log) == before


def test_needs_no_torch():
    """prepare.py starts without torch's second, and reads and downloads tokenizers so."""
    code = "import sys; from hf import downloads, tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_folders_are_themselves(tmp_path):
    assert (
        downloads.resolve(tmp_path)
        == tmp_path
        == downloads.resolve(str(tmp_path), files="tokenizer")
    )
    with pytest.raises(UserError, match="is a folder here"):
        downloads.resolve(tmp_path, revision="main")


@pytest.mark.slow
def test_stages_take_hub_ids_on_several_ranks_too(server, vocabulary, tmp_path):
    """train_ref.py on two ranks downloads once; score.py scores the hub model; another vocabulary
    is refused before the weights.
    """
    write_set(tmp_path / "d", vocabulary, 2000)
    env = environment(server.endpoint, tmp_path / "cache")
    before = len(server.log)
    finish(
        launch(
            "train_ref.py --data d --init tiny/sharded --revision v1 --out o --seq-len 16 "
            "--batch-size 4 --steps 2 --device cpu",
            tmp_path,
            ranks=2,
            env=env,
        )
    )
    log = server.log[before:]
    assert [entry[3] for entry in log if entry[0] == "GET"].count("model.safetensors") == 1
    assert "base_model: tiny/sharded" in (tmp_path / "o/README.md").read_text()
    finish(
        launch(
            "score.py --model tiny/sharded --revision v1 --data d --out l.bin --seq-len 16 "
            "--device cpu",
            tmp_path,
            env=env,
        )
    )
    shutil.rmtree(tmp_path / "cache")
    from hf import tokenizer

    other = tokenizer.train_bpe(["another text altogether"] * 5, 270)
    write_set(tmp_path / "e", other, 2000)
    before = len(server.log)
    process = launch(
        "score.py --model tiny/sharded --data e --out m.bin --seq-len 16 --device cpu",
        tmp_path,
        env=env,
    )
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 2 and "error: vocabulary:" in out and "Traceback" not in out
    assert not any(entry[3].endswith(".safetensors") for entry in server.log[before:])
