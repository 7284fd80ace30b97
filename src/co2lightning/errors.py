"""The exceptions that become one line and an exit code, and how a message shows a value."""

from co2lightning.terminal import clean


class UserError(ValueError):
    """What was asked cannot be done; the message is the one line the user reads.

    It names the flag, file, row, column or key and says what would be right.
    """

    def __init__(self, message: object) -> None:
        # It may quote a stranger's file, and a traceback would print it as it is.
        super().__init__(clean(" ".join(str(message).split())))


class TrainingError(RuntimeError):
    """Training ended in an error of its own, exit code 1; the message is the line the user reads.

    What was saved before stands.
    """

    def __init__(self, message: object, rank: int = 0) -> None:
        super().__init__(clean(" ".join(str(message).split())))
        # Lightning kills rank 0, which says it too, when another rank ends in error.
        self.exit_code = 0 if rank else 1


def show(value: object) -> str:
    """Write a value for a message: one line, short, whatever it is."""
    try:
        shown = isinstance(value, str) and value.isprintable() and value.strip()
        text = str(value) if shown else repr(value)
    except (ValueError, RecursionError):  # an integer too long to be written out
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, noun: str) -> str:
    """Say how many, such as 2 episodes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
