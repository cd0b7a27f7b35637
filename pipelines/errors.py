"""The error that a command shows as one line."""


class InputError(ValueError):
    """Something that the user of a command can fix: a file, a flag or their combination.

    The message says what must hold, what was found and what to do. A command prints it as one line; any other
    ValueError is a bug and keeps its traceback.
    """
