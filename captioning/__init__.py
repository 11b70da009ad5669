"""What the three scripts share: five rooms, the command line, and files."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (said in a sentence, before an import of something else fails)
    sys.exit(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old; make the environment with 3.11 or newer")


class InputError(Exception):
    """Bad input from the user: the message is one sentence that names the bad value and the remedy.

    The scripts print it without a traceback and exit with code 2.
    """
