"""Runs a stage on a disk that is full for one rank: no file may be longer than BYTES there.

torchrun --nproc-per-node 2 tests/limited.py RANK BYTES STAGE.py ARGS...
"""

import os
import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main():
    rank, size, stage, *rest = sys.argv[1:]
    if os.environ.get("RANK") == rank:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), hard))  # Python ignores SIGXFSZ
    sys.path[0] = str(ROOT)
    sys.argv = [str(ROOT / stage), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
