r"""Stage 0: text -> token sets.

    python prepare.py                                        # the embedded demo -> data/demo
    python prepare.py --source web-*.jsonl.zst --train-vocab 4096 --out data/web
    python prepare.py --source web.parquet --tokenizer TinyLlama/TinyLlama_v1.1 --out data/web
    python prepare.py --source sft.jsonl --prompt-field question --response-field answer \
        --mask-prompt --tokenizer out/base --out data/sft    # fine-tuning data
    python prepare.py --source hf:open-web-math/open-web-math --max-tokens 1000000000 \
        --decontaminate gsm8k math --tokenizer TinyLlama/TinyLlama_v1.1 --out data/owm
    python prepare.py --source web.parquet --val-share 0.01 --tokenizer out/base --out data/web
    python prepare.py --source data/web data/curated data/curated --out data/mixed

A source is a .txt file (one document), a .jsonl, .json (.gz and .zst, too) or .parquet file (one
document per record), a token set (taken over as it is; named twice it goes in twice), or a data set
on the hub, hf:REPO[:CONFIG][:SPLIT][@REVISION], whose shards are streamed one by one
(text/hub_datasets.py). What a record says goes by its fields' names where no flag says it: text,
pair, or chat, whose prompts and tool outputs are never targets (text/formats.py). --mix 6 3 1 takes
that many parts of --max-tokens from each source.

A document is its tokens with EOS after it, and BOS in front of it where the model's config adds
one; BOS is never a target. With --prompt-field a document is prompt + "\n" + response, tokenised as
one text; --mask-prompt makes every token a non-target that is the same whatever the response is.
Empty documents are left out.

One process reads, --workers processes parse and tokenise, and the results are written in the
sources' order: the set is the same for any number of workers. Memory holds a few MB per worker, and
each single document whole. After a kill the same command goes on where it stopped and ends in
identical files.
"""

import copy
import os
from pathlib import Path

from common.checksums import file_hash
from common.command_line import SEED, Parser
from common.errors import UserError, cli
from common.owned import refuse_overlap
from hf.tokenizer import Tokenizer, train_bpe
from text import arguments as flags
from text import reading
from text.building import Settings, build, limits_of
from text.contents import close_notes, notes_of, verify
from text.decontaminate import SHORTEST, Decontaminator
from text.held_out import FOLDER, Side
from text.sources import LONGEST, open_set, sources_of

NOT_OF_THE_DEMO = [
    "tokenizer",
    "max_tokens",
    "text_field",
    "prompt_field",
    "mask_prompt",
    "skip_bad",
    "max_document_bytes",
    "data_dir",
    "decontaminate",
    "val_share",
]
TRAIN_BYTES = 10_000_000  # text that --train-vocab learns from
SMALLEST_VOCABULARY = 257
# The same line in every problem with choices, and so no part of one:
CHOICES = "What of the following is the right choice? Explain your answer."


def arguments(argv=None):
    """The command line. Raises UserError."""
    about = "\n\n".join(__doc__.split("\n\n")[:2])  # what it is, and commands to start from
    parser = Parser(about)
    flags.add_input_and_output(parser.add_argument_group("what goes in and out"))
    flags.add_records(parser.add_argument_group("records (.jsonl, .json and .parquet)"))
    flags.add_tokenizer(
        parser.add_argument_group(
            "tokenizer (one of these; a token set in --source brings its own)"
        )
    )
    flags.add_workers(parser.add_argument_group("machine"))
    args = parser.parse_args(argv)
    check(args)
    args.form, args.fields = form_and_fields(args)
    return args


def check(args):
    """Raises UserError for what no run could mean."""
    if args.train_vocab is not None and args.train_vocab < SMALLEST_VOCABULARY:
        raise UserError(
            f"--train-vocab: got {args.train_vocab}, wanted at least {SMALLEST_VOCABULARY} (256 "
            f"bytes and the end-of-text token)"
        )
    if bool(args.prompt_field) != bool(args.response_field):
        raise UserError("--prompt-field and --response-field go together: got one, wanted both")
    if args.text_field and args.prompt_field:
        raise UserError("--text-field and --prompt-field: got both, wanted one")
    if args.tokenizer and args.train_vocab:
        raise UserError("--tokenizer and --train-vocab: got both, wanted one")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise UserError(
            f"--val-share: got {args.val_share:g}, wanted a share between 0 and 1, such as 0.01"
        )
    if args.mix:
        positive = all(0 < weight < float("inf") for weight in args.mix)
        if not (positive and len(args.mix) == len(args.source) and args.max_tokens):
            weights = " ".join(f"{weight:g}" for weight in args.mix)
            raise UserError(
                f"--mix {weights}: wanted a weight above 0 for each of {len(args.source)} sources, "
                f"and --max-tokens"
            )


def flag(name):
    return "--" + name.replace("_", "-")


def form_and_fields(args):
    """How the flags say that a record is read (text/formats.py); (None, None) where they do not."""
    if args.prompt_field:
        return "pair", [args.prompt_field, args.response_field]
    if args.text_field:
        return "text", [args.text_field]
    return None, None


# --------------------------------------------------------------------------------------------------
# what is made of --source


def prepare_demo(args):
    """The demo's token sets and test problems (demo/sets.py). Raises UserError."""
    for name in NOT_OF_THE_DEMO:
        if getattr(args, name) not in (None, False):
            raise UserError(f"{flag(name)}: does not go with --source demo; name files as --source")
    from demo import sets

    seed = SEED if args.seed is None else args.seed
    sets.prepare(args.out, seed, args.train_vocab, args.workers, args.overwrite)


def prepare_files(args):
    """A token set of files, token sets and data sets on the hub, and one of what is held out.

    Raises UserError.
    """
    if not args.out:
        raise UserError("--out: got none, wanted the folder of the new token set")
    if "demo" in args.source:
        raise UserError(
            "--source demo: goes alone; to mix its token sets, name data/demo/corpus and so on"
        )
    if args.seed is not None:
        raise UserError(
            f"--seed: got {args.seed} with --source {args.source[0]}, of which nothing is drawn; "
            f"leave it out"
        )
    args.max_document_bytes = args.max_document_bytes or LONGEST
    out = Path(args.out)
    refuse_overlap(out, {"--source": args.source, "--tokenizer": args.tokenizer})
    if not args.val_share:
        if args.overwrite and (out / FOLDER / "meta.json").exists():
            raise UserError(
                f"--out {out}: {out / FOLDER} holds documents that were held out of another set, "
                f"and would not be any more; give --val-share again, or name another --out"
            )
        prepare_set(args, out)
        return
    held_out = copy.copy(args)
    if args.max_tokens:
        held_out.max_tokens = max(1, round(args.max_tokens * args.val_share))
    if args.mix:
        limits_of(args.mix, held_out.max_tokens)  # before the first set is made
    sources = prepare_set(args, out, Side(args.val_share, held_out=False))
    held_out.source = pinned(args.source, sources)
    held_out.tokenizer = args.out
    held_out.train_vocab = None
    prepare_set(held_out, out / FOLDER, Side(args.val_share, held_out=True))


def pinned(names, sources):
    """The --source names, those on the hub at the commit that was read."""
    commits = {source.entry: source.shard.commit for source in sources if source.shard}
    found = []
    for entry, name in enumerate(names):
        if entry in commits:
            name = f"{name.partition('@')[0]}@{commits[entry]}"
        found.append(name)
    return found


def prepare_set(args, out, side=None):
    """One token set, of the documents on one side of --val-share. Returns its sources."""
    sources = sources_of(
        args.source,
        args.form,
        args.fields,
        args.skip_bad,
        out,
        args.overwrite,
        args.max_document_bytes,
    )
    only_sets = all(source.kind == "set" for source in sources)
    if args.mask_prompt and not any(source.form in ("pair", "chat") for source in sources):
        raise UserError("--mask-prompt: needs --prompt-field and --response-field")
    settings = Settings(
        workers=1 if only_sets else args.workers,
        overwrite=args.overwrite,
        mask_prompt=args.mask_prompt,
        skip_bad=args.skip_bad,
        max_tokens=args.max_tokens,
        mix=args.mix,
        side=side,
    )
    has_set = any(source.kind == "set" for source in sources)
    if side and has_set:
        raise UserError(
            "--val-share: got a token set as --source, wanted text; hold a part out where its text "
            "is prepared"
        )
    if args.decontaminate and has_set:
        raise UserError(
            "--decontaminate: got a token set as --source, wanted text; leave problems out where "
            "its text is prepared"
        )
    if args.decontaminate:
        settings.decontaminator = decontaminator_of(args.decontaminate, args.data_dir)
    tokenizer = tokenizer_for(args, sources, settings)
    plan = plan_of(args, sources, tokenizer, settings)
    notes = notes_of(out, plan, sources, args.overwrite)
    tokens = build(out, sources, plan, tokenizer, settings, names=args.source)
    close_notes(notes, tokens, sources, args.max_tokens, args.mix)
    return sources


def tokenizer_for(args, sources, settings):
    """The Tokenizer that the flags or the first token set name, or a function that trains one."""
    folder = next((source.path for source in sources if source.kind == "set"), None)
    if folder and args.train_vocab:
        raise UserError(
            f"--train-vocab: does not go with {folder}, a token set that brings its tokenizer"
        )
    if args.train_vocab:

        def is_learnt_from(text):
            check = settings.decontaminator
            taken = settings.side is None or settings.side.takes(text)
            return taken and not (check and check.problems_in(text))

        def train():
            texts = reading.sample(sources, args.skip_bad, TRAIN_BYTES, is_learnt_from)
            return train_bpe(texts, args.train_vocab)

        return train
    name = args.tokenizer or folder
    if not name:
        raise UserError("--tokenizer: got none, wanted --tokenizer NAME or --train-vocab N")
    if not Path(name).exists():
        from hf.downloads import resolve

        name = resolve(name, files="tokenizer")
    return Tokenizer.load(name)


def plan_of(args, sources, tokenizer, settings):
    """What identifies the set: one of another plan in --out is refused.

    --skip-bad is no part of it: it makes no difference before the first broken record. Nor is
    --max-document-bytes, unless it says what is left out.
    """
    left_out = []
    if args.skip_bad and args.max_document_bytes != LONGEST:
        left_out = [f"none over {args.max_document_bytes} bytes"]
    described = []
    formats = []
    by_entry = {}
    for source in sources:
        by_entry.setdefault(source.entry, []).append(source)
    for entry, name in enumerate(args.source):
        parts = by_entry[entry]
        described.append(f"{name} {identity(parts)}")
        formats.append([parts[0].form, parts[0].fields, *left_out])
    check = settings.decontaminator
    return {
        "sources": described,
        "fields": formats,
        "train_vocab": args.train_vocab,
        "mask_prompt": args.mask_prompt,
        "max_tokens": args.max_tokens,
        "mix": args.mix,
        "tokenizer": None if args.train_vocab else tokenizer.hash,
        "labels": [labels_of(parts[0]) for parts in by_entry.values()],
        "ends": None if args.train_vocab else tokenizer.ends,
        "decontaminate": check.hash if check else None,
        "side": settings.side.name if settings.side else None,
    }


def identity(parts):
    """What tells a --source's content from another."""
    first = parts[0]
    if first.shard:
        return f"commit {first.shard.commit}, {len(parts)} shards"
    if first.kind == "set":
        return f"sha256 {open_set(first.path).hash[:20]}"
    return f"sha256 {file_hash(first.path, sampled=True)[:20]}"


def labels_of(source):
    """What tells a token set's targets and labels from others; None where it has neither."""
    if source.kind != "set":
        return None
    tokens = open_set(source.path)
    parts = [f"targets {tokens.mask_hash[:20]}"] if tokens.mask_hash else []
    if tokens.kinds:
        labels = file_hash(tokens.folder / "kind.bin", sampled=True)
        parts.append(f"labels {' '.join(tokens.kinds)} {labels[:20]}")
    return ", ".join(parts) or None


# --------------------------------------------------------------------------------------------------
# decontamination


def decontaminator_of(names, data_dir=None):
    """A Decontaminator that knows the kit's test sets of these names. Raises UserError."""
    names = list(dict.fromkeys(names))
    check = Decontaminator(test_problems(names, data_dir))
    print(
        f"decontamination: {check.checked.total():,} problems of {', '.join(names)}; "
        f"{check.uncheckable.total():,} more are under {SHORTEST} words and cannot be checked"
    )
    return check


def test_problems(names, data_dir=None):
    """[(task, number, question)] of the kit's test sets. Raises UserError for unknown ones."""
    from evaluation import tasks

    problems = []
    for name in names:
        tasks.task_of(name)
        for example in tasks.load(name, data_dir, answers=False):
            problems.append((name, example.idx, example.question.replace(CHOICES, "")))
    return problems


def main(argv=None):
    args = arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork
    if args.verify:
        verify(args.out)
        held_out = Path(args.out) / FOLDER
        if (held_out / "meta.json").exists():  # of --val-share
            verify(held_out)
    elif args.source == ["demo"]:
        prepare_demo(args)
    else:
        prepare_files(args)


if __name__ == "__main__":
    cli(main)
