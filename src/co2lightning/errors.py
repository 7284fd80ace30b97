"""The one exception that becomes exit code 2."""


class UserError(ValueError):
    """What was asked cannot be done; the message is the one line the user reads.

    It names the flag, file, row, column or key and says what would be right.
    """
