"""The one exception that means "the caller can mend this"."""


class UserError(Exception):
    """Bad input: a file, field or flag that the user can correct.

    The message is one line that names it and says what to do. Every command
    (``engine.train``, ``engine.evaluate``) prints it without a traceback and exits with status 2.
    """
