"""What two of the three scripts must do identically."""


class InputError(Exception):
    """Bad input from the user: the message is one sentence that names the bad value and the remedy.

    The scripts print it without a traceback and exit with code 2.
    """
