"""Records of published data sets: what is read of them, and what of that is learnt."""

import json
import re

import numpy as np
import pytest
from prepared import (  # noqa: F401 (fixtures)
    documents,
    made_fixture,
    online_fixture,
    prepared,
    same_files,
    words_fixture,
)

from common.errors import UserError
from hf.tokenizer import Tokenizer
from text import formats, hub_datasets, reading, sources
from tools import local_hub

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "```python\nprint(5)\n```\n```output\n5\n```\nIt is 5."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def test_chats_by_turns():
    texts = formats.document("chat", ["messages"], [TURNS])
    assert texts == [
        "<|system|>\nBe kind.\n<|user|>\n2+3?\n<|assistant|>\n",
        "```python\nprint(5)\n```\n```output\n",
        "5\n```\n",
        "It is 5.\n",
        "<|user|>\nSure?\n<|assistant|>\n",
        "Yes.",
    ]
    other = [
        {
            "from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]),
            "value": t["content"],
        }
        for t in TURNS
    ]
    assert formats.document("chat", ["conversations"], [other]) == texts
    assert formats.document("chat", ["prompt", "completion"], ["q", "```output\nno end"]) == [
        "<|user|>\nq\n<|assistant|>\n",
        "```output\n",
        "no end",
        "",
    ]
    for bad in (None, "text", [{"role": "user", "content": "q"}], [{"role": "assistant"}], [[1]]):
        with pytest.raises(ValueError):
            formats.document("chat", ["messages"], [bad])


SETS = {  # repository: (form, a document, of that what is learnt)
    "open-web-math/open-web-math": ("text", None, None),
    "cerebras/SlimPajama-627B": ("text", None, None),
    "bigcode/starcoderdata:java": ("text", "def add_0(a, b):\n    return a + b + 0\n" * 5, None),
    "meta-math/MetaMathQA": ("pair", "{q}\n{r}\nThe answer is: {s}", None),
    "TIGER-Lab/MathInstruct": ("pair", "{q}\n{r}", None),
    "openai/gsm8k:main:test": ("pair", "test main: {q}\n{r}", None),
    "AI-MO/NuminaMath-TIR": (
        "chat",
        "<|user|>\n{q}\n<|assistant|>\n{t}",
        "Add the two numbers.\n```python\nprint({a} + {b})\n```\n```output\n"
        "He has $\\boxed{{{s}}}$ apples.",
    ),
    "allenai/tulu-v2-sft-mixture": (
        "chat",
        "<|user|>\n{q}\n<|assistant|>\n{r}\n<|user|>\n{q}\n<|assistant|>\n{r}",
        "{r}\n{r}",
    ),
    "teknium/OpenHermes-2.5": ("chat", "<|user|>\n{q}\n<|assistant|>\n{r}", "{r}"),
}


@pytest.mark.parametrize("name", SETS)
def test_every_published_format(online, words, tmp_path, capsys, name):
    form, whole, learnt = SETS[name]
    tokens = prepared(tmp_path / "out", "--source", f"hf:{name}", "--tokenizer", words)
    shown = capsys.readouterr().out
    assert f"taken as {form} from" in shown and "at commit 0123456789ab" in shown
    q, a, b = local_hub.problem(0)
    fill = {
        "q": q,
        "a": a,
        "b": b,
        "s": a + b,
        "t": local_hub.trajectory(0)[1],
        "r": f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
    }
    if whole is None:
        file = hub_datasets.choose(
            [(str(p.relative_to(online[0] / name)), 1) for p in (online[0] / name).rglob("*")],
            None,
            None,
            sources.SHARDS,
        )[0][0]
        whole = local_hub.page(
            (5000 if "Slim" in name else 0) + 60 * int(re.search(r"train[-_](\d+)", file)[1])
        )
    else:
        whole = whole.format(**fill) if "{q}" in whole else whole
    tokenizer, ids = Tokenizer.load(words), documents(tokens)[0]
    assert tokenizer.decode(ids) == whole
    assert tokens.meta["sources"] == [
        {
            "name": f"hf:{name}",
            "documents": tokens.meta["sources"][0]["documents"],
            "tokens": tokens.count,
        }
    ]
    if learnt is None:
        assert tokens.loss_mask is None
    else:
        mask = tokens.loss_mask[: len(ids) + 1].astype(bool)
        assert tokenizer.decode(np.array(ids)[mask[:-1]]) == learnt.format(**fill) and mask[-1]
    assert not (tmp_path / "out" / hub_datasets.FOLDER).exists()


def test_an_input_beside_the_instruction_belongs_to_the_prompt():
    assert formats.guess({"instruction", "input", "output"}) == (
        "pair",
        ["instruction", "input", "output"],
    )
    assert formats.document(
        "pair", ["instruction", "input", "output"], ["Add.", "2 and 3", "5"]
    ) == ["Add.\n2 and 3\n", "5"]
    assert formats.document(
        "pair", ["instruction", "input", "output"], ["Add 2 and 3.", "", "5"]
    ) == ["Add 2 and 3.\n", "5"]


def test_pairs_are_masked_where_asked_for(online, words, tmp_path):
    tokens = prepared(
        tmp_path / "out",
        "--source",
        "hf:openai/gsm8k:main:train",
        "--tokenizer",
        words,
        "--mask-prompt",
    )
    tokenizer, ids = Tokenizer.load(words), np.array(documents(tokens)[0])
    mask = tokens.loss_mask[: len(ids)].astype(bool)
    assert tokenizer.decode(ids[~mask]) == f"train main: {local_hub.problem(0)[0]}\n"


@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_arrays_are_read_in_blocks(tmp_path, words, monkeypatch, block):
    rows = [
        {"text": t, "n": [1, {"a": "]"}]}
        for t in ("a", "naïve 数学 🙂", "x, ] [ {", '"quoted" \\ \n', "last")
    ]
    path = tmp_path / "x.json"
    path.write_text(" \n" + json.dumps(rows, indent=1, ensure_ascii=False))
    whole = prepared(tmp_path / "whole", "--source", path, "--tokenizer", words)
    monkeypatch.setattr(reading, "BLOCK", block)
    assert prepared(tmp_path / "out", "--source", path, "--tokenizer", words).hash == whole.hash
    assert [Tokenizer.load(words).decode(d) for d in documents(whole)] == [
        row["text"] for row in rows
    ]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="x.json: damaged after record 4"):
        prepared(tmp_path / "cut", "--source", path, "--tokenizer", words)
