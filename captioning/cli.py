"""What the three scripts share at the command line: error messages, exit codes, one-line notes."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from captioning import InputError

DEBUG_HELP = "show the traceback of every error"


def note(message: str) -> None:
    """One line about what was decided, on stderr: stdout carries results only."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and exit: 2 with one sentence for bad input, 130 for Ctrl-C.

    An InputError with an `exit_code` of its own decides otherwise: 1 where running again goes on from what is done.
    """
    try:
        code = main()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        name = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    except BrokenPipeError:
        # The reader (head, say) has gone. Nothing more can be said to it, not even at interpreter exit.
        sys.stdout = None
        code = 1
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        name = sys.argv[0].rsplit("/", 1)[-1]
        where = f"'{error.filename}': " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full; make room and run the same command again" if full else error.strerror or error
        print(f"{name}: error: {where}{what}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        if "--debug" in sys.argv:
            raise
        print(f"\n{str(error) or 'stopped'}", file=sys.stderr)
        code = 130
    sys.exit(code)


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a caption cannot drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
