"""The flags of prepare.py, in titled groups."""

import os

from common.command_line import COUNTED, LARGEST, SEED, SEEDS, THREADS, whole


def add_input_and_output(group):
    group.add_argument(
        "--source",
        nargs="+",
        default=["demo"],
        help="files (.txt .parquet .jsonl .json, these two also .gz or .zst), token sets, data "
        "sets on the hub (hf:REPO[:CONFIG][:SPLIT][@REVISION]) (default: demo)",
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the token set (default with the demo: data/demo, or data/demo-seedS)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start over, whatever token set lies in --out"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="make nothing: check the finished set in --out, and the files that it was made of",
    )
    group.add_argument(
        "--max-tokens", type=whole(2, COUNTED), help="stop after exactly N tokens (default: all)"
    )
    group.add_argument(
        "--mix",
        nargs="+",
        type=float,
        metavar="W",
        help="each --source's part of --max-tokens (default: all of the first one, then the next)",
    )
    group.add_argument(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="hold out so much of the documents, in OUT/val, by a hash of each one's text (0.01: "
        "one in a hundred); reads the sources a second time",
    )
    group.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="TASK",
        help="leave out documents that hold a problem of these test sets (gsm8k math ...)",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with the test sets' eval/ (default: download them)",
    )
    group.add_argument(
        "--seed", type=whole(0, SEEDS), metavar="S", help=f"of the demo's text (default: {SEED})"
    )


def add_records(group):
    group.add_argument(
        "--text-field",
        help="field with the text (default: known formats by their fields' names, else text)",
    )
    group.add_argument("--prompt-field", help="fine-tuning data: field with the prompt")
    group.add_argument("--response-field", help="fine-tuning data: field with the response")
    group.add_argument(
        "--mask-prompt",
        action="store_true",
        help="the prompt's tokens are no targets (loss_mask.bin)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out broken records, count them, and go on (default: stop at the first)",
    )
    group.add_argument(
        "--max-document-bytes",
        type=whole(1, COUNTED),
        help="a longer line, record or .txt file counts as broken (default: 64 MiB)",
    )


def add_tokenizer(group):
    group.add_argument("--tokenizer", help="folder or file of a tokenizer, or a model's hub id")
    group.add_argument(
        "--train-vocab",
        type=whole(1, LARGEST),
        help="train a byte-level BPE of N tokens on the first 10 MB of text, an equal share of "
        "each source (default with the demo: 512)",
    )


def add_workers(group):
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    group.add_argument(
        "--workers",
        type=whole(1, THREADS),
        default=cores,
        help=f"processes that tokenise (default: one for each core, here {cores})",
    )
