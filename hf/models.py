"""Which model a stage works with: from scratch, a folder or a hub id, with the vocabulary that the text was made with."""

from pathlib import Path

from common.errors import UserError
from common.files import read_json
from hf import downloads
from hf.checkpoint import load, model_hash
from hf.config import config_from_hf
from hf.tokenizer import Tokenizer
from model import Config, Transformer, initialise


def begin(args, token_set, env):
    """The model that training starts from: `--init scratch`, a folder or a hub id.

    Returns the model, the folder that its tokenizer files come from, and the hash of what it started from. Raises
    UserError where the model's tokenizer is not the one that the token set was made with.
    """
    if args.init == "scratch":
        tokenizer = Tokenizer.load(token_set.folder)
        config = Config(
            vocab_size=token_set.vocab_size,
            hidden_size=args.d_model,
            num_hidden_layers=args.n_layer,
            intermediate_size=args.d_ff or max(16, args.d_model * 8 // 3 // 16 * 16),
            num_attention_heads=args.n_head,
            num_key_value_heads=args.n_kv_head or args.n_head,
            head_dim=args.d_model // args.n_head,
            max_position_embeddings=args.seq_len,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
        if (
            args.d_model % args.n_head
            or config.head_dim % 2
            or args.n_head % config.num_key_value_heads
        ):
            raise UserError(
                f"--n-head {args.n_head} with --d-model {args.d_model} and --n-kv-head "
                f"{config.num_key_value_heads}: wanted an even width per head and whole groups of heads"
            )
        return (
            initialise(Transformer(config), args.seed).to(env.device),
            token_set.folder,
            f"scratch-{args.seed}",
        )
    folder = find(args.init, args.revision, token_set, env)
    return load(folder, device=env.device), folder, env.from_main(lambda: model_hash(folder))


def find(name, revision, token_set, env):
    """The folder of the model `name` (folder or hub id), whose vocabulary is the token set's. What does not fit is
    refused before its weights are downloaded. Of several ranks the first downloads, the others read its cache."""

    def get():
        check_vocabulary(downloads.resolve(name, revision, "tokenizer"), token_set)
        return downloads.resolve(name, revision)

    return env.main_first(get)


def check_vocabulary(folder, token_set):
    """Refuse a model whose tokenizer is not the one that the token set was made with."""
    got, wanted = Tokenizer.load(folder).hash, token_set.tokenizer_hash
    if got != wanted:
        raise UserError(
            f"vocabulary: {folder} has tokenizer {got[:12]}, {token_set.folder} was made with "
            f"{wanted[:12]}; prepare the text again with prepare.py --tokenizer {folder}"
        )
    config = Path(folder) / "config.json"
    vocab_size = config_from_hf(read_json(config, "model"), config).vocab_size
    if vocab_size < token_set.vocab_size:
        raise UserError(
            f"vocabulary: {folder} has {vocab_size} rows of embeddings, {token_set.folder} has ids below "
            f"{token_set.vocab_size}; prepare the text again with prepare.py --tokenizer {folder}"
        )
