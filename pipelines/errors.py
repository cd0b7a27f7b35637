"""The errors that a command shows as one line."""


class InputError(ValueError):
    """Something that the user of a command can fix: a file, a flag or their combination.

    The message says what must hold, what was found and what to do. A command prints it as one line; any other
    ValueError is a bug and keeps its traceback.
    """


class UnreadableError(InputError):
    """An image could not be read from where it lies: the disk, the mount or the permissions are at fault, and the image
    may be good.
    """
