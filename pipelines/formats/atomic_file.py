"""Output files that appear whole or not at all, and files of arrays that are read by mapping them into memory."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_output(path, sync=True):
    """Open a binary file beside `path` for writing; on success it takes the name `path`, on an exception it is removed.

    Args:
        path: str or Path. Missing parent folders are created.
        sync: wait until the bytes are on the disk; False for many small files that can be made anew, which it would
            slow a hundredfold.
    Yields:
        A binary file object, seekable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(
        f".{path.name}.{os.getpid()}.partial"
    )  # the process id keeps ranks that write the same cache apart
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
