"""Where the demo's data and results lie."""

from pathlib import Path

from common.command_line import SEED


def roots(seed):
    """Folders of the demo's data and results; each seed has its own."""
    suffix = "" if seed == SEED else f"-seed{seed}"
    return Path("data/demo" + suffix), Path("out/demo" + suffix)
