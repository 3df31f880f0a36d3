"""A hub on this machine, for recipes and tests.

It has the data sets and models that the recipes name, in the files, folders and fields of the real
ones, with text made here: a few hundred records each.

    python -m tools.local_hub FOLDER    # fills FOLDER if need be; its address: FOLDER/address
    HF_ENDPOINT=$(cat FOLDER/address) python prepare.py --source hf:openai/gsm8k:main:train ...
"""

import functools
import hashlib
import http.server
import json
import random
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from common.command_line import Parser
from common.errors import cli
from common.files import renamed_when_whole, write_atomic

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIGS = ("main", "socratic")  # of openai/gsm8k
SPLITS = ("test", "train")
LLAMAS = {  # name: what differs from the others; they share a vocabulary, as those of MISTRALS do
    "TinyLlama/TinyLlama_v1.1": {},
    "meta-llama/Llama-2-7b-hf": {"hidden_size": 64},
    "microsoft/rho-math-1b-v0.1": {},
}
MISTRALS = {
    "mistralai/Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 4096},
    "microsoft/rho-math-7b-v0.1": {"model_type": "mistral", "sliding_window": 4096},
}
SMOLLMS = {"HuggingFaceTB/SmolLM2-135M": {}}

# --------------------------------------------------------------------------------------------------
# its text


def page(i):
    from demo import corpus

    return "".join(text for text, _ in corpus.page("corpus", 0, i))


def problem(i):
    """(question, the two numbers in it)."""
    a, b = random.Random(i).choices(range(2, 60), k=2)
    question = (
        f"Tom has {a} red apples and then buys {b} green ones at the market. "
        f"How many apples has he now?"
    )
    return question, a, b


def solution(a, b):
    return f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"


def trajectory(i):
    """(question, an answer that runs a program)."""
    question, a, b = problem(i)
    program = f"```python\nprint({a} + {b})\n```\n```output\n{a + b}\n```\n"
    return question, f"Add the two numbers.\n{program}He has $\\boxed{{{a + b}}}$ apples."


# --------------------------------------------------------------------------------------------------
# its files


def parquet(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with renamed_when_whole(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, row_group_size=max(1, len(rows) // 3))


def text_file(path, text):
    content = text.encode()
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    write_atomic(path, content)


def make(root, n=400):
    """FOLDER/datasets/OWNER/NAME/... and FOLDER/models/OWNER/NAME/..."""
    sets = Path(root) / "datasets"
    make_corpora(sets, n)
    make_problem_sets(sets, n)
    make_conversations(sets, n)
    for family in (LLAMAS, MISTRALS, SMOLLMS):
        make_family(Path(root) / "models", family)


def make_corpora(sets, n):
    """Web pages, a mixture, code."""
    for shard in range(3):
        numbers = range(shard * n, shard * n + n)
        pages = [
            {"url": f"http://x/{i}", "text": page(i), "date": "2023-01-01", "metadata": "{}"}
            for i in numbers
        ]
        name = f"open-web-math/open-web-math/data/train-{shard:05}-of-00003.parquet"
        parquet(sets / name, pages)
        meta = {"redpajama_set_name": "RedPajamaCommonCrawl"}
        lines = [json.dumps({"text": page(5000 + i), "meta": meta}) + "\n" for i in numbers]
        name = f"cerebras/SlimPajama-627B/train/chunk1/example_train_{shard}.jsonl.zst"
        text_file(sets / name, "".join(lines))
    name = "cerebras/SlimPajama-627B/validation/chunk1/example_holdout_0.jsonl.zst"
    text_file(sets / name, '{"text": "x", "meta": {}}\n')
    code = [
        {
            "max_stars_repo_path": "a.py",
            "id": str(i),
            "content": f"def add_{i}(a, b):\n    return a + b + {i}\n" * 5,
        }
        for i in range(n)
    ]
    for language in ("java", "python"):
        parquet(sets / f"bigcode/starcoderdata/{language}/train-00000-of-00001.parquet", code)


def make_problem_sets(sets, n):
    """Questions with answers, each set in its own fields."""
    meta_math, math_instruct = [], []
    gsm8k = {f"{config}/{split}": [] for config in CONFIGS for split in SPLITS}
    for i in range(n):
        question, a, b = problem(i)
        answer = solution(a, b)
        meta_math.append(
            {
                "type": "GSM_AnsAug",
                "query": question,
                "original_question": question,
                "response": f"{answer}\nThe answer is: {a + b}",
            }
        )
        math_instruct.append(
            {"source": "data/CoT/gsm_train.json", "output": answer, "instruction": question}
        )
        for config in CONFIGS:
            for split in SPLITS:
                row = {"question": f"{split} {config}: {question}", "answer": answer}
                gsm8k[f"{config}/{split}"].append(row)
    text_file(
        sets / "meta-math/MetaMathQA/MetaMathQA-395K.json",
        json.dumps(meta_math, indent=4),
    )
    text_file(sets / "TIGER-Lab/MathInstruct/MathInstruct.json", json.dumps(math_instruct))
    for name, rows in gsm8k.items():
        parquet(sets / f"openai/gsm8k/{name}-00000-of-00001.parquet", rows)


def make_conversations(sets, n):
    """Messages, each set in its own fields."""
    numina, tulu, hermes = [], [], []
    for i in range(n):
        question, answer = trajectory(i)
        numina.append(
            {
                "problem": question,
                "solution": answer,
                "messages": [
                    {"content": question, "role": "user"},
                    {"content": answer, "role": "assistant"},
                ],
            }
        )
        question, a, b = problem(i)
        answer = solution(a, b)
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        tulu.append({"dataset": "flan", "id": str(i), "messages": turn * 2})
        hermes.append(
            {
                "system_prompt": None,
                "source": "x",
                "conversations": [
                    {"from": "human", "value": question, "weight": None},
                    {"from": "gpt", "value": answer, "weight": None},
                ],
            }
        )
    parquet(sets / "AI-MO/NuminaMath-TIR/data/train-00000-of-00001.parquet", numina)
    parquet(sets / "allenai/tulu-v2-sft-mixture/data/train-00000-of-00001.parquet", tulu)
    text_file(
        sets / "teknium/OpenHermes-2.5/openhermes2_5.json",
        json.dumps(hermes, indent=2, ensure_ascii=False),
    )


def make_family(root, family):
    """Tiny models that share a vocabulary; `family`: {name: changes of the configuration}."""
    from hf import tokenizer
    from hf.checkpoint import save
    from model import Config, Transformer, initialise

    words = tokenizer.train_bpe([page(i) for i in range(100)], 500 + len(family))
    same = {
        "vocab_size": words.n_vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "eos_token_id": words.eos_id,
    }
    for seed, (name, changes) in enumerate(family.items()):
        config = Config(**{**same, **changes})
        save(initialise(Transformer(config), seed), root / name)
        words.save(root / name)


# --------------------------------------------------------------------------------------------------
# the server


class Handler(http.server.BaseHTTPRequestHandler):
    """What huggingface-hub asks for: a data set's listing, and files of data sets and models.

    `log`: paths sent.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, root, log, *args):
        self.root = Path(root)
        self.log = log
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            self.send_listing("/".join(parts[2:4]))
        elif parts[0] == "datasets":
            self.send_file("datasets", parts[1:])
        else:
            self.send_file("models", parts)

    do_HEAD = do_GET

    def send_listing(self, name):
        folder = self.root / "datasets" / name
        if not folder.is_dir():
            self.answer(401, X_Error_Code="RepoNotFound")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listing = {
            "id": name,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
                for path in files
            ],
        }
        self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    def send_file(self, kind, parts):
        """parts: OWNER, NAME, "resolve", revision, path... A range goes on to the file's end."""
        folder = self.root / kind / "/".join(parts[:2])
        name = "/".join(parts[4:])
        if not folder.is_dir():
            self.answer(401, X_Error_Code="RepoNotFound")
            return
        if parts[2:3] != ["resolve"] or not (folder / name).is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        body = (folder / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.command == "GET":
            self.log.append(name)
        status = 200
        asked = self.headers.get("Range")
        if asked:
            status = 206
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        self.answer(status, body, **headers)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def serve(root):
    """(server, address, log); it runs on a thread of its own until server.shutdown()."""
    log = []
    handler = functools.partial(Handler, root, log)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}", log


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="filled if need be, and served")
    folder = parser.parse_args().folder
    if not (folder / "made").exists():
        make(folder)
        write_atomic(folder / "made", "")
    _, address, _ = serve(folder)
    write_atomic(folder / "address", address)
    threading.Event().wait()


if __name__ == "__main__":
    cli(main)
