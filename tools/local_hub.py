"""A hub on this machine: the data sets and models that the recipes name, in the files, folders and fields of the real
ones, with text made here; a few hundred records each.

    python -m tools.local_hub FOLDER            # makes FOLDER if need be, serves it, writes its address to FOLDER/address
    HF_ENDPOINT=$(cat FOLDER/address) python prepare.py --source hf:openai/gsm8k:main:train ...
"""

import functools
import hashlib
import http.server
import json
import random
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---------------------------------------------------------------------------------------------------------------------
# what is served


def page(i):
    from demo import corpus

    return "".join(text for text, _ in corpus.page("corpus", 0, i))


def problem(i):
    a, b = random.Random(i).choices(range(2, 60), k=2)
    return (
        f"Tom has {a} red apples and then buys {b} green ones at the market. How many apples has he now?",
        a,
        b,
    )


def trajectory(i):
    question, a, b = problem(i)
    program = f"```python\nprint({a} + {b})\n```\n```output\n{a + b}\n```\n"
    return question, f"Add the two numbers.\n{program}He has $\\boxed{{{a + b}}}$ apples."


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // 3)
    )


def text_file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())


def make(root, n=400):
    """FOLDER/datasets/OWNER/NAME/... and FOLDER/models/OWNER/NAME/..."""
    sets = Path(root) / "datasets"
    for shard in range(3):
        numbers = range(shard * n, shard * n + n)
        parquet(
            sets / f"open-web-math/open-web-math/data/train-{shard:05}-of-00003.parquet",
            [
                {"url": f"http://x/{i}", "text": page(i), "date": "2023-01-01", "metadata": "{}"}
                for i in numbers
            ],
        )
        text_file(
            sets / f"cerebras/SlimPajama-627B/train/chunk1/example_train_{shard}.jsonl.zst",
            "".join(
                json.dumps(
                    {"text": page(5000 + i), "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}}
                )
                + "\n"
                for i in numbers
            ),
        )
    text_file(
        sets / "cerebras/SlimPajama-627B/validation/chunk1/example_holdout_0.jsonl.zst",
        '{"text": "x", "meta": {}}\n',
    )
    for language in ("java", "python"):
        parquet(
            sets / f"bigcode/starcoderdata/{language}/train-00000-of-00001.parquet",
            [
                {
                    "max_stars_repo_path": "a.py",
                    "id": str(i),
                    "content": f"def add_{i}(a, b):\n    return a + b + {i}\n" * 5,
                }
                for i in range(n)
            ],
        )
    made = [problem(i) for i in range(n)]
    answers = [
        f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}" for _, a, b in made
    ]
    text_file(
        sets / "meta-math/MetaMathQA/MetaMathQA-395K.json",
        json.dumps(
            [
                {
                    "type": "GSM_AnsAug",
                    "query": q,
                    "original_question": q,
                    "response": f"{r}\nThe answer is: {a + b}",
                }
                for (q, a, b), r in zip(made, answers)
            ],
            indent=4,
        ),
    )
    text_file(
        sets / "TIGER-Lab/MathInstruct/MathInstruct.json",
        json.dumps(
            [
                {"source": "data/CoT/gsm_train.json", "output": r, "instruction": q}
                for (q, _, _), r in zip(made, answers)
            ]
        ),
    )
    for config in ("main", "socratic"):
        for split in ("test", "train"):
            parquet(
                sets / f"openai/gsm8k/{config}/{split}-00000-of-00001.parquet",
                [
                    {"question": f"{split} {config}: {q}", "answer": r}
                    for (q, _, _), r in zip(made, answers)
                ],
            )
    parquet(
        sets / "AI-MO/NuminaMath-TIR/data/train-00000-of-00001.parquet",
        [
            {
                "problem": q,
                "solution": r,
                "messages": [{"content": q, "role": "user"}, {"content": r, "role": "assistant"}],
            }
            for q, r in map(trajectory, range(n))
        ],
    )
    parquet(
        sets / "allenai/tulu-v2-sft-mixture/data/train-00000-of-00001.parquet",
        [
            {
                "dataset": "flan",
                "id": str(i),
                "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": r}]
                * 2,
            }
            for i, ((q, _, _), r) in enumerate(zip(made, answers))
        ],
    )
    text_file(
        sets / "teknium/OpenHermes-2.5/openhermes2_5.json",
        json.dumps(
            [
                {
                    "system_prompt": None,
                    "source": "x",
                    "conversations": [
                        {"from": "human", "value": q, "weight": None},
                        {"from": "gpt", "value": r, "weight": None},
                    ],
                }
                for (q, _, _), r in zip(made, answers)
            ],
            indent=2,
            ensure_ascii=False,
        ),
    )
    for models in (
        (
            ("TinyLlama/TinyLlama_v1.1", {}),
            ("meta-llama/Llama-2-7b-hf", {"hidden_size": 64}),
            ("microsoft/rho-math-1b-v0.1", {}),
        ),
        (
            ("mistralai/Mistral-7B-v0.1", {"model_type": "mistral", "sliding_window": 4096}),
            ("microsoft/rho-math-7b-v0.1", {"model_type": "mistral", "sliding_window": 4096}),
        ),
    ):
        make_family(Path(root) / "models", models)


def make_family(root, models):
    """Tiny models that share a vocabulary."""
    from hf import tokenizer
    from hf.checkpoint import save
    from model import Config, Transformer, initialise

    words = tokenizer.train_bpe([page(i) for i in range(100)], 500 + len(models))
    for number, (name, changes) in enumerate(models):
        config = Config(
            **{
                "vocab_size": words.n_vocab,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 8192,
                "eos_token_id": words.eos_id,
                **changes,
            }
        )
        save(initialise(Transformer(config), number), root / name)
        words.save(root / name)


# ---------------------------------------------------------------------------------------------------------------------
# the server


class Handler(http.server.BaseHTTPRequestHandler):
    """What huggingface-hub asks for: a data set's listing, and files of data sets and models. `log`: paths sent."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root, log, *args):
        self.root, self.log = Path(root), log
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            folder = self.root / "datasets" / "/".join(parts[2:4])
            if not folder.is_dir():
                return self.answer(401, X_Error_Code="RepoNotFound")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            body = json.dumps(
                {
                    "id": "/".join(parts[2:4]),
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
            ).encode()
            return self.answer(200, body, Content_Type="application/json")
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        folder = self.root / kind / "/".join(parts[:2])
        path = folder / "/".join(parts[4:])
        if not folder.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound")
        if parts[2:3] != ["resolve"] or not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.command == "GET":
            self.log.append("/".join(parts[4:]))
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            return self.answer(
                206,
                body[start:],
                Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}",
                **headers,
            )
        self.answer(200, body, **headers)

    do_HEAD = do_GET


def serve(root):
    """(server, address, log); it runs on a thread of its own until server.shutdown()."""
    log = []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, root, log)
    )
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}", log


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "made").exists():
        make(folder)
        (folder / "made").touch()
    server, address, _ = serve(folder)
    (folder / "address").write_text(address)
    threading.Event().wait()
