"""A shell file's commands, read with the stages' own parsers; nothing runs."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import common.device  # noqa: F401  first: it sets how torch's threads wait

import prepare
import score
import train_ref
import train_slm
from common.errors import UserError
from tools.plan.shell import commands_in
from training.arguments import settle
from training.method_flags import refuse_ranking

STAGES = {
    "prepare.py": prepare,
    "train_ref.py": train_ref,
    "score.py": score,
    "train_slm.py": train_slm,
}


def commands_of(recipe, n_gpus):
    """The stages' commands of a shell file, [[script, flag, ...]].

    PLAN=1 makes the kit's recipes print them. Any other file is read, for it would run instead.
    Raises UserError where the commands cannot be told.
    """
    if not Path(recipe).is_file():
        raise UserError(f"{recipe}: no such file; the kit's recipes are in runs/")
    text = Path(recipe).read_text(errors="replace")
    if not re.search(r"\$\{?PLAN\b", text) and not is_of_the_kit(recipe, text):
        commands = commands_in(recipe, text, STAGES)
        if not commands:
            raise UserError(f"{recipe}: holds no command of {', '.join(STAGES)}")
        return commands
    done = subprocess.run(
        ["bash", recipe],
        capture_output=True,
        text=True,
        env={**os.environ, "PLAN": "1", "GPUS": str(n_gpus)},
    )
    if done.returncode:
        *_, last = ["", *done.stderr.splitlines()]
        raise UserError(f"{recipe}: PLAN=1 stopped with {done.returncode}: {last}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    if not lines:
        raise UserError(f"{recipe}: prints no commands under PLAN=1")
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def is_of_the_kit(recipe, text):
    """Is it a recipe of runs/ that knows PLAN through the file beside it?"""
    runs = Path(__file__).parents[2] / "runs"
    return Path(recipe).resolve().parent == runs and "/common.sh" in text


def stage_of(words):
    """(stage's file name, its parsed arguments) of a command.

    The arguments are None where there is nothing to plan. Raises UserError for flags that the stage
    does not take or that cannot be meant.
    """
    names = [Path(word).name for word in words]
    known = [i for i, name in enumerate(names) if name in STAGES]
    if not known:
        scripts = [name for name in names if name.endswith(".py")]
        return (scripts or words)[0], None
    at = known[0]
    name = names[at]
    command = " ".join(words[at:])[:200]
    try:
        args = STAGES[name].arguments(words[at + 1 :])
    except UserError as error:
        raise UserError(f"{command}: {error}") from None
    except SystemExit:
        raise UserError(f"{command}: {name} does not take these flags (see above)") from None
    if name != "prepare.py":
        model = "model" if name == "score.py" else "init"
        for flag in ("data", model):
            if not getattr(args, flag):
                raise UserError(f"{command}: wanted a --{flag}")
    args.out = args.out or "(no --out)"
    if name.startswith("train_"):
        settle(args, run=False)
    if name == "train_slm.py":
        refuse_ranking(args)
    return name, args
