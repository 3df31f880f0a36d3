"""The tokenizer files in a model's folder: which of them decide, and what BOS and EOS are."""

from pathlib import Path

from common.errors import UserError
from common.json_files import shown
from common.records import read_json
from hf import byte_level_bpe, sentencepiece_bpe
from hf.vocabulary import LARGEST_ID, broken, check, refuse

DECIDING = ("tokenizer.json", "tokenizer.model")
FILES = (
    *DECIDING,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def read_vocabulary(path):
    """The `Vocabulary` in a folder with tokenizer.json and/or tokenizer.model, or in one such file.

    Where a SentencePiece model has both, tokenizer.model decides. Raises UserError naming whatever
    is missing, broken or not supported.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    as_json, as_model = deciding_files(path)
    spec = read_object(as_json) if as_json else {}
    config = read_object(folder / "special_tokens_map.json")
    for key, value in read_object(folder / "tokenizer_config.json").items():
        if value is not None:
            config[key] = value
    try:
        if as_json and not (as_model and spec["model"].get("byte_fallback")):
            vocabulary = from_json(spec, as_json)
        else:
            added = spec["added_tokens"] if spec else added_beside(folder, config)
            vocabulary = sentencepiece_bpe.from_model(as_model, added)
        check(vocabulary, as_json or path)
        read_ends(vocabulary, spec, config, read_object(folder / "config.json"))
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"tokenizer: {as_json or path} or a file beside it is not complete "
            f"({shown(error)}); get it again"
        ) from None
    vocabulary.files = [folder / name for name in FILES if (folder / name).exists()]
    if not path.is_dir():  # what lies beside it may describe another vocabulary
        others = [file for file in vocabulary.files if file.name not in DECIDING]
        vocabulary.files = [path, *others]
    return vocabulary


def deciding_files(path):
    """(tokenizer.json, tokenizer.model) of a folder or one file; None for what is not there."""
    if path.is_dir():
        as_json, as_model = path / "tokenizer.json", path / "tokenizer.model"
    elif path.suffix == ".json":
        as_json, as_model = path, None
    else:
        as_json, as_model = None, path
    as_json = as_json if as_json and as_json.exists() else None
    as_model = as_model if as_model and as_model.exists() else None
    if not as_json and not as_model:
        problem = "does not exist; give a folder with tokenizer.json or tokenizer.model"
        if path.is_dir():
            problem = "has neither tokenizer.json nor tokenizer.model"
        raise UserError(f"tokenizer: {path} {problem}")
    return as_json, as_model


def read_object(file):
    """The object in a JSON file; {} where there is no such file. Raises UserError."""
    if not file.exists():
        return {}
    return read_json(file, "tokenizer")


def from_json(spec, where):
    """The `Vocabulary` of a tokenizer.json (as an object) of either family."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        refuse(where, f"model type {model.get('type')!r}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(where, f"{key} {model[key]!r}")
    for token in spec.get("added_tokens") or []:
        if token.get("single_word"):
            refuse(where, f"added token {token['content']!r} with single_word")
    check_vocab(model["vocab"], where)
    # "a b" in older files, ["a", "b"] in newer ones
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for merge in merges:
        if len(merge) != 2 or not isinstance(merge[0], str) or not isinstance(merge[1], str):
            broken(where, f"the merge {shown(merge)}, wanted two parts")
    family = sentencepiece_bpe if model.get("byte_fallback") else byte_level_bpe
    return family.from_json(spec, merges, where)


def check_vocab(vocab, where):
    """Refuse a vocabulary that is not {token: id}, each id once."""
    if not isinstance(vocab, dict):
        broken(where, f"the vocab {shown(vocab)}, wanted an object")
    ids = vocab.values()
    if any(type(i) is not int for i in ids):
        broken(where, "an id in its vocab that is no whole number")
    if len(set(ids)) < len(ids):
        broken(where, "two tokens of one id in its vocab")


def added_beside(folder, config):
    """Added tokens of a folder with tokenizer.model only."""
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        return [{**token, "id": int(i)} for i, token in decoder.items()]
    added = read_object(folder / "added_tokens.json")
    return [{"content": content, "id": i, "special": True} for content, i in added.items()]


# ---- BOS and EOS


def read_ends(vocabulary, spec, config, model_config):
    """Set bos_id, eos_id, add_bos: by tokenizer_config.json, else config.json, else the vocabulary.

    Raises UserError where a file names a token that the vocabulary does not have.
    """
    first = first_special(spec.get("post_processor") or {})
    if first is not None:
        added = {token["content"]: token["id"] for token in vocabulary.added}
        vocabulary.bos_id = added[first]
    bos = end_id("bos", vocabulary, config, model_config)
    eos = end_id("eos", vocabulary, config, model_config)
    if bos is not None:
        vocabulary.bos_id = bos
    if eos is not None:
        vocabulary.eos_id = eos

    add = config.get("add_bos_token")
    if add is None:  # LlamaTokenizer's own default is to add it
        is_llama = "LlamaTokenizer" in config.get("tokenizer_class", "")
        add = first is not None or not spec or is_llama
    vocabulary.add_bos = bool(add) and vocabulary.bos_id is not None


def first_special(post_processor):
    """The special token that a tokenizer.json's template puts in front of a text, or None."""
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing":
            template = step["single"]
            return template[0].get("SpecialToken", {}).get("id") if template else None
    return None


def end_id(end, vocabulary, config, model_config):
    """The id of "bos" or "eos" that the files beside the vocabulary name, or None."""
    token = config.get(f"{end}_token")
    if isinstance(token, dict):
        token = token["content"]
    if token is None:
        i = model_config.get(f"{end}_token_id")
        if isinstance(i, list):
            i = i[0]
        if i is None or i == -1:  # some files' none
            return None
        if type(i) is not int or not 0 <= i < LARGEST_ID:
            broken("the config.json beside it", f"the {end}_token_id {shown(i)}, wanted an id")
        return i
    added = {a["content"]: a["id"] for a in vocabulary.added}
    if token in added:
        return added[token]
    hidden = set(added.values())
    for i, raw in sorted(vocabulary.table.items()):
        if raw == token.encode() and i not in hidden:
            return i
    raise UserError(
        f"tokenizer: the {end}_token that tokenizer_config.json or "
        f"special_tokens_map.json names, {token!r}, is not in the vocabulary"
    )
