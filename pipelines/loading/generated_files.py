"""Files that DALI leaves in the temporary folder.

DALI translates the definition of a pipeline with conditionals to Python, writes that into a file, imports it, and
deletes the file when the interpreter ends by itself: not where a process is killed, nor where a rank leaves without the
interpreter's teardown. Nothing needs the file once it is imported, so it is deleted at once.
"""

import contextlib
import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "__autograph_generated_file"  # of nvidia.dali._autograph.pyct.loader, as of DALI 2.4; TensorFlow has it too
_OLD = 60.0  # seconds; a younger file may be about to be imported
_LOCK = threading.Lock()


@contextlib.contextmanager
def deleted_after() -> Iterator[None]:
    """Deletes the files that building a pipeline in the block leaves, and keeps it from leaving their bytecode."""
    with _LOCK:
        before, writes_no_bytecode = set(sys.modules), sys.dont_write_bytecode
        sys.dont_write_bytecode = True  # other imports of the moment keep no bytecode either, and do no worse
        try:
            yield
        finally:
            sys.dont_write_bytecode = writes_no_bytecode
            for name in set(sys.modules) - before:
                file = sys.modules[name].__file__
                if name.startswith(_PREFIX) and file is not None:
                    Path(file).unlink(missing_ok=True)


def delete_left_over(definition: str) -> int:
    """Deletes what killed processes have left, and returns how many files that were.

    Args:
        definition: name of a pipeline's function: a file that does not define it is somebody else's and stays, as does
            one of another user, or of the last minute.
    """
    mark, deleted = f"def autograph__{definition}(".encode(), 0
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*.py"):
            with contextlib.suppress(OSError):
                about = path.lstat()
                ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()
                if ours and about.st_mtime < time.time() - _OLD and mark in path.read_bytes():
                    path.unlink()
                    deleted += 1
                    for bytecode in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                        bytecode.unlink()
    return deleted
