"""Users' errors: one line and an exit code."""

import errno
import os
import shlex
import signal
import sys
from pathlib import Path

KIT = Path(__file__).parents[1]
# What to do before the same command can go on, for failures of the machine.
MENDS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EROFS: "make the place writable, or name another one",
    errno.EACCES: "allow it, or name another place",
    errno.EPERM: "allow it, or name another place",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EAGAIN: "allow more processes (ulimit -u), or lower --threads or --workers",
}
# What to lower where memory runs out.
LOWER = {
    "prepare.py": "--workers",
    "train_ref.py": "--micro-batch-size, or add --checkpointing",
    "train_slm.py": "--micro-batch-size (with --rank-windows it changes no choice), or add "
    "--checkpointing",
    "score.py": "--batch-size or --seq-len",
    "eval_math.py": "--batch-tokens or --max-new-tokens",
}
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
SHOWN = 1000  # characters of a message's beginning, and of its end
CLOSED_PIPE = 128 + signal.SIGPIPE  # what a shell calls a program that ended so

SHOWN_REASON = 80  # characters of what a library says


class UserError(ValueError):
    """Something the user can mend. Stages print it as one line and exit with code 2.

    A message may quote a stranger's file: what is not printable is escaped.
    """

    def __init__(self, message):
        super().__init__(one_line(str(message)))


def one_line(message):
    """The message without line ends and control characters, and its middle where it is long."""
    if len(message) > 2 * SHOWN:
        message = f"{message[:SHOWN]} [...] {message[-SHOWN:]}"
    if message.isprintable():
        return message
    line = message.replace("\n", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def command(*words):
    """A command line for a message, as a shell takes it: python score.py --data 'my data'."""
    return "python " + shlex.join(map(str, words))


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

    A user's error is one line and exit code 2, and so is a full disk, or memory that runs out.
    Ctrl-C and SIGTERM are exit code 130.
    """
    _open_standard_streams()
    _listen()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _stop(2, f"error: {error}")
    except BrokenPipeError:  # of `| head`: nobody reads any further
        _discard_output()
        _stop(CLOSED_PIPE)
    except (OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _stop(2, f"error: {_out_of_memory(error)}")
        if not isinstance(error, OSError):
            raise
        _stop(2, f"error: {_failure(error)}")
    except KeyboardInterrupt:
        _stop(130, f"interrupted: what was done is kept; {_same_command()} goes on")
    if ranks := in_a_group():
        ranks.destroy_process_group()


def is_out_of_memory(error):
    """Does an exception of Python, numpy, PyTorch or the system say so?"""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, on a GPU
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _out_of_memory(error):
    reason = next(iter(str(error).splitlines()), "").split(". ")[0][:200]
    what = LOWER.get(Path(sys.argv[0]).name, "what is held at once: batches, lengths, the model")
    shown = f" ({reason})" if reason else ""
    return f"out of memory{shown}; lower {what}; what was finished before is kept"


def _failure(error):
    """A failure of the machine, and what to do about it."""
    where = f" ({error.filename})" if error.filename else ""
    mend = MENDS.get(error.errno, "mend that")
    return (
        f"{error.strerror or error}{where}; {mend}, then {_same_command()} goes on: what was "
        f"finished before is kept"
    )


def _same_command():
    if "--overwrite" in sys.argv:  # would start over again
        return "the same command without --overwrite"
    return "the same command"


def _stop(code, message=None):
    if message is not None:
        line = " ".join(message.split())
        try:
            end_progress_bars()
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
        except OSError:  # nobody reads it, or the disk behind it is full
            _discard_output()
    if in_a_group():
        os._exit(code)  # other ranks must not wait for this one
    sys.exit(code)


def end_progress_bars():
    """So that a message is a line of its own, and the last one."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    for bar in list(bars):
        bar.close()


def in_a_group():
    """torch.distributed where this process is one of several ranks, else None."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        return dist
    return None


# --------------------------------------------------------------------------------------------------
# the standard streams and signals


def _open_standard_streams():
    """Where one was closed (`>&-`), open a void: else the next file that is opened takes its
    number, and what a library prints goes into that file."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))


def _discard_output():
    """Nobody reads it any more: let Python's last flush have somewhere to go."""
    void = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(void, number)


def _interrupted(signum, frame):
    raise KeyboardInterrupt


def _listen():
    """Ctrl-C, where it is not ignored, and SIGTERM raise KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupted)


def end_quietly_while_loading():
    """Until `cli` listens, Ctrl-C ends the program at once: nothing has been done yet.

    Else it would be a traceback out of the middle of PyTorch. Only for the kit's own programs.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and KIT in Path(program).resolve().parents:
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


end_quietly_while_loading()
