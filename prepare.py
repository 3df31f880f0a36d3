"""Stage 0: text -> token sets.

    python prepare.py                                              # the embedded demo -> data/demo, no network, no GPU
    python prepare.py --source web-*.jsonl.zst --train-vocab 4096 --out data/web                  # its own vocabulary
    python prepare.py --source web.parquet --tokenizer TinyLlama/TinyLlama_v1.1 --out data/web    # a model's vocabulary
    python prepare.py --source sft.jsonl --prompt-field question --response-field answer --mask-prompt \
        --tokenizer out/base --out data/sft                                                       # fine-tuning data
    python prepare.py --source hf:open-web-math/open-web-math --tokenizer TinyLlama/TinyLlama_v1.1 \\
        --max-tokens 1000000000 --decontaminate gsm8k math --out data/owm                                                 # from the hub
    python prepare.py --source data/web data/curated data/curated --out data/mixed                # mixing token sets

A source is a .txt file (one document), a .jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet file (one document per
record), a token set (taken over as it is; named twice it goes in twice), or a data set on the hub,
hf:REPO[:CONFIG][:SPLIT][@REVISION], whose shards are streamed one by one (hub_datasets.py). What a record says goes by its
fields' names where no flag says it: text, pair, or chat, whose prompts and tool outputs are never targets (records.py).
--mix 6 3 1 takes that many parts of --max-tokens from each source. A document is its tokens with EOS after it, and BOS in
front of it where the model's config adds one; BOS is never a target. With --prompt-field a document is
prompt + "\\n" + response, tokenised as one text; --mask-prompt makes every token a non-target that is the same
whatever the response is. Empty documents are left out.

One process reads, --workers processes parse and tokenise, the results are written in the sources' order: the set is
the same for any number of workers. Memory holds a few MB per worker, and each single document whole. After a kill the
same command goes on where it stopped and ends in identical files.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError, cli
from common.files import read_json, write_atomic
from data import TokenSet, TokenSetWriter, file_hash
from demo import corpus
from hf.tokenizer import FILES, Tokenizer, train_bpe
from text import hub_datasets, reading
from text.workers import UNLABELLED, in_order

MARK_SECONDS = 5  # a kill costs at most this much work
TRAIN_BYTES = 10_000_000  # text that --train-vocab learns from
DEMO_VOCAB, DEMO_TRAIN_PAGES = 512, 2000
SET_FILES = (
    "meta.json",
    *FILES,
    *TokenSetWriter.NAMES.values(),
    *(name + ".partial" for name in TokenSetWriter.NAMES.values()),
)


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what goes in and out")
    group.add_argument(
        "--source",
        nargs="+",
        default=["demo"],
        metavar="SOURCE",
        help="demo, or files (.txt .jsonl .jsonl.gz .jsonl.zst .json .parquet), token sets and data sets "
        "on the hub, hf:REPO[:CONFIG][:SPLIT][@REVISION] (default: demo)",
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the token set (default with the demo: data/demo, "
        "or data/demo-seedS with --seed S)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="as the other stages have it; this one goes on without",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace a finished --out made from something else"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="stop after exactly N tokens (default: take all)",
    )
    group.add_argument(
        "--mix",
        nargs="+",
        type=float,
        metavar="W",
        help="a weight for each --source: its part of --max-tokens, counted in tokens",
    )
    group.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="TASK",
        help="leave out documents that hold a problem of "
        "these test sets (gsm8k math ...), see tools/decontaminate.py",
    )
    group.add_argument(
        "--data-dir", help="folder with the test sets' eval/ (default: download them)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the demo's text (default: 0)")

    group = parser.add_argument_group("records (.jsonl, .json and .parquet)")
    group.add_argument(
        "--text-field",
        metavar="NAME",
        help="field that holds the text (default: by the fields' names, see records.py; else text)",
    )
    group.add_argument(
        "--prompt-field", metavar="NAME", help="fine-tuning data: field that holds the prompt"
    )
    group.add_argument(
        "--response-field", metavar="NAME", help="fine-tuning data: field that holds the response"
    )
    group.add_argument(
        "--mask-prompt",
        action="store_true",
        help="the prompt's tokens are no targets (loss_mask.bin)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out broken records and go on; their number is reported at the end",
    )

    group = parser.add_argument_group(
        "tokenizer (one of these; a token set in --source brings its own)"
    )
    group.add_argument(
        "--tokenizer", metavar="NAME", help="folder or file of a tokenizer, or a model's hub id"
    )
    group.add_argument(
        "--train-vocab",
        type=int,
        metavar="N",
        help="train a byte-level BPE of N tokens on the first 10 MB of text, an equal share of each "
        f"source (the demo's default: {DEMO_VOCAB})",
    )

    group = parser.add_argument_group("machine")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    group.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help=f"processes that tokenise (default: the number of cores, here {cores})",
    )
    args = parser.parse_args(argv)

    for flag, value, least in (
        ("--workers", args.workers, 1),
        ("--train-vocab", args.train_vocab, 257),
        ("--max-tokens", args.max_tokens, 2),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            why = " (256 bytes and the end-of-text token)" if flag == "--train-vocab" else ""
            raise UserError(f"{flag}: got {value}, wanted at least {least}{why}")
    if bool(args.prompt_field) != bool(args.response_field):
        raise UserError("--prompt-field and --response-field go together: got one, wanted both")
    if args.text_field and args.prompt_field:
        raise UserError("--text-field and --prompt-field: got both, wanted one")
    if args.mix and (
        len(args.mix) != len(args.source)
        or not args.max_tokens
        or not all(0 < weight < float("inf") for weight in args.mix)
    ):
        raise UserError(
            f"--mix {' '.join(f'{w:g}' for w in args.mix)}: wanted a weight above 0 for each of "
            f"{len(args.source)} sources, and --max-tokens"
        )
    if args.tokenizer and args.train_vocab:
        raise UserError("--tokenizer and --train-vocab: got both, wanted one")
    args.form = "pair" if args.prompt_field else "text" if args.text_field else None
    args.fields = (
        [args.prompt_field, args.response_field] if args.prompt_field else [args.text_field]
    )
    return args


# ---------------------------------------------------------------------------------------------------------------------
# one token set


def build(out, todo, plan, tokenizer, options, workers, overwrite):
    """Make the token set `out` from the sources `todo`, or go on with it, or open it where it is finished.

    `plan` (JSON) says what identifies the work. `tokenizer`: a Tokenizer, or a function that trains one; that is called
    at the very start only, a restart takes the one that was saved. Returns the TokenSet. Raises UserError for a
    finished set of another plan, and whatever reading the sources raises.
    """
    out, began, plan, limits = (
        Path(out),
        time.time(),
        json.loads(json.dumps(plan)),
        shares(todo, options),
    )
    finished, partial = (out / "meta.json").exists(), None
    if finished and not overwrite:
        done = TokenSet(out)
        if differs := difference(done.meta.get("plan", {}), plan):
            raise UserError(
                f"--out {out}: is a finished token set of something else ({differs}); "
                f"name another folder, or replace it with --overwrite"
            )
        refuse_bad(out, done.meta["bad_records"], options)
        print(f"{out}: used again, {summary(done.meta)}")
        return done
    if not finished and (out / "progress.json").exists():
        partial = read_json(out / "progress.json", "progress of an unfinished token set").get(
            "plan"
        )
        if partial == plan:
            print(f"{out}: goes on where it stopped")
        elif partial:
            print(
                f"{out}: an unfinished token set of something else is started over ({difference(partial, plan)})"
            )
    elif not finished:
        for name in SET_FILES:
            if (out / name).exists():
                raise UserError(
                    f"--out {out}: holds {name}, but is not a token set; name another folder"
                )
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(out) if partial == plan else tokenizer()
    if tokenizer.eos_id is None:
        raise UserError(
            "tokenizer: it names no end-of-text token; wanted eos_token in its tokenizer_config.json"
        )
    arrays, kinds = what_to_write(todo, tokenizer, options)
    if partial != plan:
        write_atomic(
            out / "progress.json", json.dumps({"plan": None})
        )  # from here on the folder is ours
        for name in SET_FILES:
            (out / name).unlink(missing_ok=True)
        tokenizer.save(out)

    writer = TokenSetWriter(out, tokenizer.n_vocab, arrays, plan)
    names = options.get("names") or [source["path"] for source in todo]
    state = writer.state or {
        "source": 0,
        "record": 0,
        "bad": 0,
        "contaminated": 0,
        "text_bytes": 0,
        "sources": [{"name": name, "documents": 0, "tokens": 0} for name in names],
    }
    refuse_bad(out, state["bad"], options)
    writer.mark(state)
    shared = (
        tokenizer,
        todo,
        {
            **options,
            "arrays": arrays,
            "kinds": kinds,
            "folder": out,
            "end": np.array([tokenizer.eos_id], np.uint32),
            "front": np.array([tokenizer.bos_id] if tokenizer.add_bos else [], np.uint32),
        },
    )
    for stop, limit in limits:
        if state["source"] < stop:
            full = writer.count >= limit  # stopped just before it said so
            if not full:
                results = in_order(
                    reading.jobs(todo, state, stop, options["skip_bad"]), workers, shared
                )
                full = fill(writer, state, results, todo, tokenizer.eos_id, limit)
                results.close()
            if options.get("mix") and not full:
                raise UserError(
                    f"--mix: {names[todo[stop - 1]['entry']]} ends {limit - writer.count:,} tokens short of "
                    f"its share; lower --max-tokens or its weight"
                )
            if stop < len(todo):
                state["source"], state["record"] = stop, 0
                writer.mark(state)
    shutil.rmtree(out / hub_datasets.FOLDER, ignore_errors=True)
    for entry in state["sources"]:
        if writer.count == 0 or not (entry["tokens"] or full or options["skip_bad"]):
            raise UserError(
                f"{entry['name']}: has no documents, wanted at least one that is not blank"
                + f" ({state['bad']:,} broken ones were left out)" * (state["bad"] > 0)
            )
    done = writer.finish(
        tokenizer=tokenizer.hash,
        sources=state["sources"],
        bad_records=state["bad"],
        text_bytes=state["text_bytes"],
        contaminated=state["contaminated"],
        **({"kinds": kinds} if kinds else {}),
        seed=options["seed"],
        plan=plan,
    )
    print(f"{out}: {summary(done.meta)}, {time.time() - began:.1f} s")
    return done


def shares(todo, options):
    """[(number of the source to stop before, tokens written by then)]: one for all, or with --mix one for each name."""
    whole = options["max_tokens"] or sys.maxsize
    if not options.get("mix"):
        return [(len(todo), whole)]
    entries, behind = (
        [source["entry"] for source in todo],
        np.cumsum(options["mix"]) / np.sum(options["mix"]),
    )
    limits = [round(whole * part) for part in behind.tolist()]
    if 0 in np.diff([0, *limits]):
        raise UserError(
            f"--mix: a source's part of --max-tokens {whole} is less than a token; raise --max-tokens"
        )
    return [(len(entries) - entries[::-1].index(i), limit) for i, limit in enumerate(limits)]


def fill(writer, state, results, todo, eos, limit):
    """Append the results up to `limit` tokens, keeping `state` (what a restart needs). Returns whether it got there."""
    behind = np.cumsum([0] + [source["size"] for source in todo]).tolist()
    unit, marked = {"demo": "page", "set": "token"}.get(todo[0]["type"], "B"), time.time()
    with tqdm(
        total=behind[-1],
        desc=str(writer.folder),
        unit=unit,
        unit_scale=True,
        mininterval=0.5,
        disable=None,
        initial=behind[state["source"]],
    ) as bar:
        try:
            for pieces, counts, job in results:
                room = limit - writer.count
                if (
                    full := len(pieces["tokens"]) >= room
                ):  # the rest of the last document is cut off
                    counts["bytes"] = counts["bytes"] * room // len(pieces["tokens"])
                    pieces = {name: piece[:room] for name, piece in pieces.items()}
                    ended = pieces["tokens"] == eos
                    counts["documents"] = int(np.count_nonzero(ended)) + int(not ended[-1])
                writer.append(**pieces)
                state["source"], state["record"] = job["source"], job["next"]
                entry = state["sources"][todo[job["source"]].get("entry", 0)]
                entry["documents"] += counts["documents"]
                state["text_bytes"] += counts["bytes"]
                state["bad"] += counts["bad"]
                state["contaminated"] += counts["contaminated"]
                if "damage" in job:
                    tqdm.write(f"left out from there on: {job['damage']}")
                entry["tokens"] += len(pieces["tokens"])  # last: see below
                bar.update(behind[job["source"]] + job["read"] - bar.n)
                bar.set_postfix_str(f"{writer.count / 1e6:.1f}M tokens", refresh=False)
                if full:
                    return True
                if time.time() - marked > MARK_SECONDS:
                    writer.mark(state)
                    marked = time.time()
        except (
            UserError,
            KeyboardInterrupt,
        ):  # the same command, or --skip-bad with it, goes on from here
            if (
                sum(entry["tokens"] for entry in state["sources"]) == writer.count
            ):  # not in the midst of the updates
                writer.mark(state)
            raise
    return False


def refuse_bad(out, bad, options):
    if bad and not options["skip_bad"]:
        raise UserError(
            f"--out {out}: {bad:,} broken records were left out of it; accept that with --skip-bad, "
            f"or mend the sources"
        )


def what_to_write(todo, tokenizer, options):
    """Names of the arrays, and of the kinds of all sources together ([] where no source has labels)."""
    sets = [reading.open_set(source["path"]) for source in todo if source["type"] == "set"]
    for tokens in sets:
        if tokens.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"{tokens.folder}: got a token set of tokenizer {tokens.tokenizer_hash[:12]}, wanted "
                f"{tokenizer.hash[:12]} as in the rest; prepare its text again with that --tokenizer"
            )
    kinds = list(
        dict.fromkeys(name for tokens in sets if tokens.kind is not None for name in tokens.kinds)
    )
    if todo[0]["type"] == "demo":
        kinds = corpus.KINDS
    elif (
        kinds
        and UNLABELLED not in kinds
        and sum(tokens.kind is not None for tokens in sets) < len(todo)
    ):
        kinds.append(UNLABELLED)
    masked = (
        options["mask_prompt"]
        or tokenizer.add_bos
        or any(source.get("form") == "chat" for source in todo)
        or any(tokens.loss_mask is not None for tokens in sets)
    )
    return ["tokens"] + ["loss_mask"] * masked + ["kind"] * bool(kinds), kinds


def difference(old, new):
    """What differs between two plans, in words; None where nothing does."""
    for key in new:
        was, now = old.get(key), new[key]
        if was != now:
            if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
                was, now = next((a, b) for a, b in zip(was, now) if a != b)
            was, now = (
                text if len(text) < 200 else text[:200] + "..."
                for text in map(json.dumps, (was, now))
            )
            return f"{key} was {was}, is now {now}"


def summary(meta):
    bad = f", {meta['bad_records']:,} broken records left out" if meta["bad_records"] else ""
    bad += f", {meta['contaminated']:,} contaminated ones" if meta.get("contaminated") else ""
    return (
        f"{sum(entry['documents'] for entry in meta['sources']):,} documents, {meta['count']:,} tokens, "
        f"vocabulary {meta['vocab_size']:,}, {meta['count'] / max(1, meta['text_bytes']):.3f} tokens per byte{bad}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# what is made of --source


def prepare_demo(args):
    """OUT/{base,corpus,curated,val}, all with one tokenizer trained on noisy pages, and OUT/test.jsonl."""
    for flag in ("tokenizer", "max_tokens", "text_field", "prompt_field", "decontaminate"):
        if getattr(args, flag) is not None:
            raise UserError(
                f"--{flag.replace('_', '-')}: does not go with --source demo; name files as --source"
            )
    root = Path(args.out or ("data/demo" if args.seed == 0 else f"data/demo-seed{args.seed}"))
    vocabulary = args.train_vocab or DEMO_VOCAB
    splits = [
        {key for template in corpus.keys(split) for key in template}
        for split in ("train", "val", "test")
    ]
    test = corpus.test_problems()
    assert len(set.union(*splits)) == sum(map(len, splits)), "a problem is in two splits"
    assert {tuple(problem["key"]) for problem in test} <= splits[2], (
        "a test problem is not of the test split"
    )

    def trained():
        pages = range(0, corpus.PAGES["base"], max(1, corpus.PAGES["base"] // DEMO_TRAIN_PAGES))
        return train_bpe(
            ("".join(text for text, _ in corpus.page("base", args.seed, i)) for i in pages),
            vocabulary,
        )

    tokenizer = trained
    for name, pages in corpus.PAGES.items():
        text = json.dumps(
            [corpus.page(name, args.seed, i) for i in range(0, pages, 50)]
        )  # another generator shows
        plan = {
            "source": "demo",
            "set": name,
            "seed": args.seed,
            "pages": pages,
            "kinds": corpus.KINDS,
            "vocabulary": vocabulary,
            "text": hashlib.sha256(text.encode()).hexdigest(),
        }
        options = {"mask_prompt": False, "skip_bad": False, "max_tokens": None, "seed": args.seed}
        done = build(
            root / name,
            [{"type": "demo", "path": name, "size": pages}],
            plan,
            tokenizer,
            options,
            args.workers,
            args.overwrite,
        )
        tokenizer = Tokenizer.load(done.folder) if name == "base" else tokenizer
        if done.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"{done.folder}: its tokenizer is not that of {root}/base; make all again with --overwrite"
            )
    write_atomic(root / "test.jsonl", "".join(json.dumps(problem) + "\n" for problem in test))
    print(f"{root}/test.jsonl: {len(test):,} problems, none of them in the sets above")


def prepare_files(args):
    if not args.out:
        raise UserError("--out: got none, wanted the folder of the new token set")
    out = Path(args.out)
    for name in [*args.source, *([args.tokenizer] if args.tokenizer else [])]:
        if Path(name).is_dir() and Path(name).resolve() == out.resolve():
            raise UserError(f"--out {out}: is also read from; name another folder")
    if args.overwrite:
        (out / "hub.json").unlink(missing_ok=True)
    todo = reading.find(args.source, args.form, args.fields, args.skip_bad, out)
    if args.mask_prompt and not any(source.get("form") in ("pair", "chat") for source in todo):
        raise UserError("--mask-prompt: needs --prompt-field and --response-field")
    folder = next((source["path"] for source in todo if source["type"] == "set"), None)
    if not (args.tokenizer or args.train_vocab or folder):
        raise UserError("--tokenizer: got none, wanted --tokenizer NAME or --train-vocab N")
    if folder and args.train_vocab:
        raise UserError(
            f"--train-vocab: does not go with {folder}, a token set that brings its tokenizer"
        )
    if args.train_vocab:
        tokenizer = lambda: train_bpe(
            reading.sample(todo, args.skip_bad, TRAIN_BYTES), args.train_vocab
        )
    else:
        name = args.tokenizer or folder
        if not Path(name).exists():
            from hf.downloads import resolve

            name = resolve(name, files="tokenizer")
        tokenizer = Tokenizer.load(name)
    options = {
        name: getattr(args, name)
        for name in ("mask_prompt", "skip_bad", "max_tokens", "seed", "mix")
    }
    plan = {
        "sources": [],
        "fields": [],
        "train_vocab": args.train_vocab,
        **options,
        "tokenizer": None if args.train_vocab else tokenizer.hash,
        "decontaminate": None,
    }
    for entry, name in enumerate(args.source):
        parts = [source for source in todo if source["entry"] == entry]
        what = (
            f"commit {parts[0]['commit']}, {len(parts)} shards"
            if "repo" in parts[0]
            else "sha256 " + (open_hash(parts[0]))[:20]
        )
        plan["sources"].append(f"{name} {what}")
        plan["fields"].append([parts[0].get("form"), parts[0].get("fields")])
    options["names"] = args.source
    if args.decontaminate:
        from tools.decontaminate import Decontaminator

        options["decontaminator"] = Decontaminator.of_tasks(args.decontaminate, args.data_dir)
        plan["decontaminate"] = options["decontaminator"].hash
    del plan["skip_bad"]  # it makes no difference before the first broken record
    workers = 1 if all(source["type"] == "set" for source in todo) else args.workers
    build(out, todo, plan, tokenizer, options, workers, args.overwrite)


def open_hash(source):
    return (
        reading.open_set(source["path"]).hash
        if source["type"] == "set"
        else file_hash(source["path"], sampled=True)
    )


def main(argv=None):
    args = arguments(argv)
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # threads of its own would not survive the fork
    prepare_demo(args) if args.source == ["demo"] else prepare_files(args)


if __name__ == "__main__":
    cli(main)
