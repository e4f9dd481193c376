"""The exception for errors of commands."""

from handlers.errors import MlvgmError


class CliError(MlvgmError):
    """An error that the user can correct; the message says what is wrong, and what to do."""
