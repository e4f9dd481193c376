"""The one exception that means: tell the user in a line, no traceback."""

from handlers.errors import MlvgmError


class CliError(MlvgmError):
    """Something the user can mend; the message says what, and how."""
