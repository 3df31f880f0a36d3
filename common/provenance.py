"""What made a run: the kit's commit and changed files, versions, the number of ranks."""

import functools
import importlib.metadata
import platform
import subprocess

from common.errors import KIT

PACKAGES = ("torch", "numpy")
SAID = {
    "commit": "commit",
    "changed": "files changed since the commit",
    "python": "Python",
    "torch": "torch",
    "numpy": "numpy",
    "device": "device",
    "ranks": "ranks",
}
SHOWN = 5  # names of changed files


@functools.cache
def of_the_kit():
    """{"commit": a hash or None where git knows none, "changed": names of files that differ}."""
    try:
        commit = git(KIT, "rev-parse", "HEAD")
        changed = git(KIT, "status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": []}
    return {"commit": commit, "changed": [line[3:] for line in changed]}


def git(folder, *words):
    """What git prints there. Raises OSError or CalledProcessError where it cannot say."""
    # Without optional locks `status` only reads; with them it writes .git/index.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def made_by(device, ranks):
    """The record for args.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        **of_the_kit(),
        "python": platform.python_version(),
        **versions,
        "device": device,
        "ranks": ranks,
    }


def differences(before, now):
    """What differs between two records, such as "commit a -> b; Python c -> d"; else ""."""
    found = []
    for key, title in SAID.items():
        if key in before and before[key] != now[key]:
            found.append(f"{title} {_shown(before[key])} -> {_shown(now[key])}")
    return "; ".join(found)


def _shown(value):
    if isinstance(value, list):
        more = [f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else []
        return ", ".join([*value[:SHOWN], *more]) or "none"
    return str(value)[:12]
