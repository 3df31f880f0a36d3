"""Which model a stage works with: from scratch, a folder or a hub id.

Its vocabulary must be the one that the text was made with.
"""

from pathlib import Path

from common.errors import UserError, command
from common.records import read_json
from hf import downloads
from hf.checkpoint import load, model_hash
from hf.config import config_from_hf
from hf.tokenizer import Tokenizer
from model import Config, Transformer, initialise


def initial_model(args, token_set, env):
    """The model that training starts from: `--init scratch`, a folder or a hub id.

    Returns the model, the folder that its tokenizer files come from, and the hash of what it
    started from. Raises UserError where the model's tokenizer is not the token set's.
    """
    if args.init == "scratch":
        model = initialise(Transformer(scratch_config(args, token_set)), args.seed).to(env.device)
        folder = token_set.folder
        init = f"scratch-{args.seed}"
    else:
        folder = folder_of(args.init, args.revision, token_set, env)
        model = load(folder, device=env.device)
        init = env.from_main(lambda: model_hash(folder))
    if args.document_mask:
        mask_documents(model, token_set)
    return model, folder, init


def mask_documents(model, token_set):
    """Keep attention inside of each document of the token set (`--document-mask`)."""
    end = Tokenizer.load(token_set.folder).eos_id
    if end is None:
        raise UserError(
            f"--document-mask: the tokenizer of {token_set.folder} has no end-of-text token"
        )
    model.document_end = end


def width_of_mlp(d_model):
    """SwiGLU has three matrices: 8/3 of the width weigh as much as the usual two of four widths."""
    return max(16, d_model * 8 // 3 // 16 * 16)


def scratch_config(args, token_set):
    """The `Config` that --d-model, --n-layer and their like describe. Raises UserError."""
    n_kv_head = args.n_kv_head or args.n_head
    head_dim = args.d_model // args.n_head
    if args.d_model % args.n_head or head_dim % 2 or args.n_head % n_kv_head:
        raise UserError(
            f"--n-head {args.n_head} with --d-model {args.d_model} and --n-kv-head {n_kv_head}: "
            "wanted an even width per head and whole groups of heads"
        )
    tokenizer = Tokenizer.load(token_set.folder)
    return Config(
        vocab_size=token_set.vocab_size,
        hidden_size=args.d_model,
        num_hidden_layers=args.n_layer,
        intermediate_size=args.d_ff or width_of_mlp(args.d_model),
        num_attention_heads=args.n_head,
        num_key_value_heads=n_kv_head,
        head_dim=head_dim,
        max_position_embeddings=args.seq_len,
        rope_theta=args.rope_theta or Config.rope_theta,
        tie_word_embeddings=True,
        qk_norm=bool(args.qk_norm),
        model_type="qwen3" if args.qk_norm else "llama",
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def folder_of(name, revision, token_set, env):
    """The folder of the model `name` (folder or hub id), whose vocabulary is the token set's.

    What does not fit is refused before its weights are downloaded. Of several ranks the first
    downloads, the others read its cache.
    """

    def checked():
        check_vocabulary(downloads.resolve(name, revision, "tokenizer"), token_set)
        return downloads.resolve(name, revision)

    return env.main_first(checked)


def check_vocabulary(folder, token_set):
    """Refuse a model whose tokenizer is not the one that the token set was made with."""
    again = command("prepare.py", "--source", "TEXT", "--tokenizer", folder, "--out", "NEW")
    remedy = f"prepare the text again with {again}"
    got, wanted = Tokenizer.load(folder).hash, token_set.tokenizer_hash
    if got != wanted:
        raise UserError(
            f"vocabulary: {folder} has tokenizer {got[:12]}, "
            f"{token_set.folder} was made with {wanted[:12]}; {remedy}"
        )
    config = Path(folder) / "config.json"
    vocab_size = config_from_hf(read_json(config, "model"), config).vocab_size
    if vocab_size < token_set.vocab_size:
        raise UserError(
            f"vocabulary: {folder} has {vocab_size} rows of embeddings, "
            f"{token_set.folder} has ids below {token_set.vocab_size}; {remedy}"
        )
