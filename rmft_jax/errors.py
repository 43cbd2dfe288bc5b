"""The one exception for mistakes the user can mend."""


class UserError(Exception):
    """Say in one line what is wrong, where, and how to mend it.

    The command line prints it as `error: ...` and exits with code 2; library callers catch it like any exception.
    """
