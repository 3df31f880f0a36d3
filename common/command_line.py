"""Command lines: parsers whose errors are one line and whose --help fits on a screen."""

import argparse
import math

from common.errors import UserError

LARGEST = 1 << 24  # far beyond what is of use
LONGEST = 1 << 20  # windows of a batch, tokens of a window: the same
COUNTED = 1 << 40  # of what is only counted: steps, tokens
SEEDS = (1 << 32) - 1  # numpy's limit
SEED = 0  # the default one, of data and training
THREADS = 1024  # more than any machine has cores; PyTorch crashes at tens of thousands
SHOWN = 80  # characters of a wrong value


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is a UserError: `--k: got 60, wanted ...`.

    The module's docstring stands above the flags. Each flag's default stands behind its help.
    """

    def __init__(self, docstring):
        super().__init__(
            description=docstring,
            usage=argparse.SUPPRESS,  # the launch lines in the docstring say more
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=100)

    def _get_help_string(self, action):
        text = action.help
        if action.choices and any(name not in text for name in action.choices):
            text = f"{text}: {', '.join(action.choices)}"
        if action.default is None or action.default is False or "default" in text:
            return text
        return f"{text} (default %(default)s)"

    def _metavar_formatter(self, action, default_metavar):
        name = action.metavar
        if name is None:  # an argument with a type is a number here
            name = "N" if action.type else "NAME"
        return lambda size: (name,) * size


def _number(kind, text, wanted, holds):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"got {text[:SHOWN]}, wanted {wanted}")
    return value


def whole(least, most=LARGEST):
    """An argument type: an integer from `least` to `most`."""
    wanted = f"a whole number of at least {least}, at most {most:,}"
    return lambda text: _number(int, text, wanted, lambda n: least <= n <= most)


def positive(text):
    """An argument type: a number above 0."""
    return _number(float, text, "a number above 0", lambda x: 0 < x < math.inf)


def not_negative(text):
    """An argument type: a number of 0 or more."""
    return _number(float, text, "0 or more", lambda x: 0 <= x < math.inf)


def duration(text):
    """An argument type: seconds, above 0 and at most a day."""
    wanted = "seconds, above 0 and at most 86400"
    return _number(float, text, wanted, lambda x: 0 < x <= 86_400)


def share(text):
    """An argument type: a share above 0 and at most 1."""
    wanted = "a share above 0 and at most 1, such as 0.6 for 60 %"
    return _number(float, text, wanted, lambda x: 0 < x <= 1)


def add_machine(group, purpose="of the forward pass"):
    """The flags that `common.device.Env` reads."""
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help=f"{purpose}: float32 or bfloat16; auto: bfloat16 on a GPU",
    )
    group.add_argument("--threads", type=whole(1, THREADS), help="CPU threads per rank")


def add_compile(group, what="torch.compile; auto is on a GPU"):
    """The flag that `common.numerics.is_compiled` reads."""
    group.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help=what)
