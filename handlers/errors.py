"""Every exception that is written for the user: one line that says what is wrong and what to do.

MlvgmError                 the base of all of them; `mlvgm` prints it in a line and exits with 2
"""


class MlvgmError(Exception):
    """Something the user can mend; the message says what, and how."""
