"""The one error a person can cause."""


class UserError(ValueError):
    """Something a person can mend: one sentence with the value and the remedy.

    The launcher prints the message and exits with code 2, without a traceback and before the first step.
    """
