"""The one exception for a user's mistake: bad input or a machine that cannot do the job.

Its message is one or two lines that name what was wrong, the value, the bound and the way out. The command line
prints it without a traceback and exits with 2.
"""


class InputError(ValueError):
    """Bad input; `str(error)` is the whole message for the user."""


def one_line(error: BaseException) -> str:
    """The message of another library's error, as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
