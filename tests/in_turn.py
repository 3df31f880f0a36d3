"""Runs commands of the stages one after another, under torchrun in each rank, in one process.

    torchrun --standalone --nproc-per-node 2 tests/in_turn.py FILE     # a command a line

Starting Python with PyTorch takes seconds on a slow core. So runs on as many ranks share a start.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import cli


def main():
    for line in Path(sys.argv[1]).read_text().splitlines():
        script, *sys.argv[1:] = line.split()
        importlib.import_module(Path(script).stem).main()


if __name__ == "__main__":
    cli(main)
