"""The end of a forked process that runs a program of its own."""

import os
import sys
import traceback


def end_with(program):
    """Call `program()` and end this process with its exit code, as Python would. Does not return.

    What is registered for the end of the process is the parent's, and is not called.
    """
    code = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
