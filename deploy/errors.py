"""The one exception that means: tell the user in a line, no traceback."""


class CliError(Exception):
    """Something the user can mend; the message says what, and how."""
