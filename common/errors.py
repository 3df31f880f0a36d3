"""Users' errors: one line and an exit code."""

import os
import signal
import sys


class UserError(ValueError):
    """Something the user can mend. Stages print it as one line and exit with code 2."""


def cli(main):
    """Run a stage's `main()`. A user's error is one line and exit code 2; Ctrl-C and SIGTERM are exit code 130."""

    def interrupted(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        main()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        code, line = (
            2,
            f"error: {error.strerror or error}{where}; what was finished before is kept, run again to go on",
        )
    except KeyboardInterrupt:
        code, line = (
            130,
            "interrupted: what was done is kept; the same command goes on (a model's stages with --resume outside the demo's folders)",
        )
    else:
        if ranks := in_a_group():
            ranks.destroy_process_group()
        return
    print(
        "\n" + " ".join(str(line).split()) if sys.stderr.isatty() else " ".join(str(line).split()),
        file=sys.stderr,
    )
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code) if in_a_group() else sys.exit(code)  # other ranks must not wait for this one


def in_a_group():
    """torch.distributed where this process is one of several ranks, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None
