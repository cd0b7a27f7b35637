"""The lock of a run's folder: of several claims one holds, a dead holder is told from a live one."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from scf_fast.errors import InputError
from scf_fast.run import folder_lock
from scf_fast.run.folder_lock import FolderLock, Holder, locked


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.4)
    monkeypatch.setattr(folder_lock, "_DEAD_SECONDS", 0.6)
    monkeypatch.setattr(folder_lock, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.02)


def leave_lock(folder, **changes):
    """Writes the lock of another holder."""
    holder = dataclasses.replace(Holder.of_this_process(), token="left", **changes)
    (folder / ".lock").write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_claim_is_refused_by_name_and_leaves_nothing(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()} on .*, since 20.*: kill {os.getpid()}$"):
            with locked(tmp_path):
                pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path, caplog):
    """In spite of its number, which another process may have by now."""
    script = f"from scf_fast.run.folder_lock import *\nFolderLock(Path({str(tmp_path)!r})).acquire()\nos._exit(9)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 0.3
        assert "was left by process" in caplog.text
    assert not list(tmp_path.iterdir())
    start = Holder.of_this_process().process_start
    leave_lock(tmp_path, process_start=start + 1)  # this process's number, of an earlier one
    with locked(tmp_path):
        pass


def test_a_holder_on_another_machine_is_dead_if_its_date_stands_still(tmp_path):
    leave_lock(tmp_path, host="elsewhere", machine="another boot")
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began > 0.6
    leave_lock(tmp_path, host="elsewhere", machine="another boot")
    done = threading.Event()

    def live():
        while not done.wait(0.1):
            os.utime(tmp_path / ".lock")

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(InputError, match="on elsewhere"), locked(tmp_path):
            pass
    finally:
        done.set()
        alive.join()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_find_a_dead_holder_one_takes_over(links, tmp_path, monkeypatch):
    """Each in a moment of its own, as often as they can: never two at once, and all of them in the end."""
    if not links:

        def refuse(*paths):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(folder_lock, "PATIENCE", 20.0)
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(FolderLock, "_wait_for_flock", lambda self, began: None)  # the files alone must do
    leave_lock(tmp_path, pid=2**22 + 1)
    inside, most, turns = set(), [], []

    def claim(number):
        for _ in range(3):
            with locked(tmp_path):
                inside.add(number)
                most.append(len(inside))
                time.sleep(0.002)
                inside.discard(number)
                turns.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(turns) == 18
    assert not list(tmp_path.iterdir())


def test_the_lock_of_an_older_version_counts(tmp_path):
    """It had flock alone; the message has the process that the kernel knows."""
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match=rf"another process holds the folder.*\(process {os.getpid()} on"):
        with locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    leave_lock(tmp_path, pid=2**22 + 1)  # a dead host's flock may stay on its file system
    with locked(tmp_path):
        os.close(handle)


def test_a_holder_whose_lock_was_taken_ends(tmp_path, monkeypatch, caplog):
    """As a process that a scheduler has stopped for a while."""
    left = threading.Event()
    monkeypatch.setattr(folder_lock, "_leave", lambda status: left.set())
    with locked(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        other = leave_lock(tmp_path, pid=1)
        assert left.wait(5) and lock.lost_to == other
    assert "has taken its place" in caplog.text and (tmp_path / ".lock").exists()  # it is the other's


def test_a_damaged_lock_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_READ_TRIES", 1)
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(InputError, match="is damaged; delete it if no run writes to"), locked(tmp_path):
        pass
