"""Whether a run's folder is still the one that it began in.

A disk that is unmounted in mid-run leaves an empty folder of the same name, and a folder that was deleted would be made
anew by the next file: in either case the run would go on, and end, with its files where nobody looks for them.
"""

import logging
import os
import time
from pathlib import Path

from scf_fast.distributed import all_ranks_agree
from scf_fast.errors import Incomplete

log = logging.getLogger(__name__)

_PAUSE = 0.5  # seconds between looks


class SameFolder:
    """A folder by its device and inode, as they are now.

    Args:
        wait: seconds that it may be away.
    """

    def __init__(self, folder: Path, wait: float):
        self._folder, self._wait = folder, wait
        self._began = _identity(folder)

    def require(self, kept: str | None) -> None:
        """Checks that the folder is the same on all ranks, and waits for it where it is not; collective.

        Args:
            kept: the newest checkpoint, for the message.
        Raises:
            Incomplete: it is another one, or gone, on some rank.
        """
        problem = self._problem()
        if problem is not None and self._wait:
            log.error("%s; waiting up to %.0f s for it", problem, self._wait, extra={"event": "folder_gone"})
            deadline = time.monotonic() + self._wait
            while problem is not None and time.monotonic() < deadline:
                time.sleep(_PAUSE)
                problem = self._problem()
        if not all_ranks_agree(problem is None):
            problem = problem or f"--output_dir {self._folder}: is no longer the folder of this run on another rank"
            raise Incomplete(
                f"{problem}; nothing is written into another one: mount it again and --resume, from "
                f"{kept or 'the beginning'} (--wait_for_folder SECONDS waits for it)"
            )

    def _problem(self) -> str | None:
        now = _identity(self._folder)
        if now == self._began:
            return None
        what = "has gone" if now is None else "is no longer the folder that this run began in"
        return f"--output_dir {self._folder}: {what}, as when its disk is unmounted or somebody deletes it"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Returns device and inode of a folder; None where there is none."""
    try:
        facts = os.stat(folder)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
