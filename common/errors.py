"""Users' errors: one line and an exit code."""

import os
import signal
import sys

SHOWN_REASON = 80  # characters of what a library says


class UserError(ValueError):
    """Something the user can mend. Stages print it as one line and exit with code 2."""


def reason_of(error):
    """The first line of what a library says, for a line of ours."""
    return str(error).splitlines()[0][:SHOWN_REASON] if str(error) else type(error).__name__


class StopRequest:
    """SIGTERM, noted (`asked`) instead of raised: whoever trains ends with the step it is in."""

    def __init__(self):
        self.asked = False
        self.before = None

    def watch(self):
        self.before = signal.signal(signal.SIGTERM, self._note)

    def release(self):
        """SIGTERM is again what it was. Does nothing where it was not watched for."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, signum, frame):
        self.asked = True


def cli(main):
    """Run a stage's `main()`.

    A user's error is one line and exit code 2. Ctrl-C and SIGTERM are exit code 130.
    """

    def interrupted(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        main()
    except UserError as error:
        _stop(2, f"error: {error}")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        kept = "what was finished before is kept"
        _stop(2, f"error: {error.strerror or error}{where}; {kept}, {_same_command()} goes on")
    except KeyboardInterrupt:
        _stop(130, f"interrupted: what was done is kept; {_same_command()} goes on")
    if ranks := in_a_group():
        ranks.destroy_process_group()


def _same_command():
    if "--overwrite" in sys.argv:  # would start over again
        return "the same command without --overwrite"
    return "the same command"


def _stop(code, message):
    line = " ".join(message.split())
    if sys.stderr.isatty():  # behind a progress bar
        line = "\n" + line
    print(line, file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    if in_a_group():
        os._exit(code)  # other ranks must not wait for this one
    sys.exit(code)


def in_a_group():
    """torch.distributed where this process is one of several ranks, else None."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        return dist
    return None
