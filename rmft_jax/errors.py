"""What ends a command before it is done: a mistake the user can mend, or a notice from outside."""


class UserError(Exception):
    """Say in one line what is wrong, where, and how to mend it.

    The command line prints it as `error: ...` and exits with code 2; library callers catch it like any exception.
    """


class Preempted(Exception):
    """Say where a run was saved when it was told to stop (SIGTERM).

    The command line prints it and exits with code 143, which is 128 + SIGTERM.
    """


class PeersMissing(Exception):
    """Say which processes of a run are missing: nothing is wrong with this one, and the same command may well succeed.

    The command line prints it as `error: ...` and exits with code 75 (EX_TEMPFAIL of sysexits.h).
    """
