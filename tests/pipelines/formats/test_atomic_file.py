import contextlib
import errno
import json
import os
import resource
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_safetensors

from scf_fast.pipelines.formats import atomic_file
from scf_fast.pipelines.formats.atomic_file import (
    atomic_output,
    atomic_path,
    publish,
    write_bytes,
    write_json,
    write_text,
)


def test_output_appears_when_closed_and_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        with atomic_output(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_exception_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_output(path) as file:
        file.write(b"half")
        raise error
    with pytest.raises(error), atomic_path(path) as aside:
        aside.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_whole_contents(tmp_path):
    write_bytes(tmp_path / "bytes", memoryview(b"\0\1"))
    write_text(tmp_path / "text", "größe\r\n")
    write_json(tmp_path / "json", {"a": [1]}, indent=2, end="\n")
    assert (tmp_path / "bytes").read_bytes() == b"\0\1"
    assert (tmp_path / "text").read_bytes() == "größe\r\n".encode()
    assert (tmp_path / "json").read_text() == json.dumps({"a": [1]}, indent=2) + "\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "json", float("nan"), allow_nan=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "json", "text"]


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("rename", str(new))), replace(old, new)))
    aside = str(tmp_path / f".file.{os.getpid()}.part")
    durable = [("sync", aside), ("rename", str(path)), ("sync", str(tmp_path))]
    write_bytes(path, b"1")
    assert calls == durable
    calls.clear()
    with atomic_path(path) as other:
        other.write_bytes(b"2")
    assert calls == durable
    calls.clear()
    (tmp_path / "made").write_bytes(b"3")
    publish(tmp_path / "made", path)
    assert calls == [("sync", str(tmp_path / "made")), *durable[1:]] and path.read_bytes() == b"3"
    calls.clear()
    write_bytes(path, b"4", sync=False)
    assert calls == [("rename", str(path))]


def test_folders_that_cannot_be_synced_are_left_alone(tmp_path, monkeypatch):
    open_file = os.open

    def refuse(number):
        def opened(path, flags, *rest, **options):
            if str(path) == str(tmp_path):
                raise OSError(number, os.strerror(number))
            return open_file(path, flags, *rest, **options)

        return opened

    monkeypatch.setattr(os, "open", refuse(errno.EINVAL))
    write_bytes(tmp_path / "file", b"1")
    monkeypatch.setattr(os, "open", refuse(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: '.*file'"):
        write_bytes(tmp_path / "file", b"2")


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, EFBIG in place of ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill_plainly(path):
    with atomic_output(path) as file:
        file.write(bytes(1 << 20))


def fill_with_numpy(path):
    with atomic_output(path) as file:
        np.savez(file, a=np.zeros(1 << 18))


def fill_with_torch(path):
    with atomic_output(path) as file:
        torch.save(torch.zeros(1 << 18), file)


def fill_with_safetensors(path):
    with atomic_path(path) as aside:
        save_safetensors({"a": torch.zeros(1 << 18)}, aside)


@pytest.mark.parametrize("fill", [fill_plainly, fill_with_numpy, fill_with_torch, fill_with_safetensors])
def test_error_of_a_full_disk_names_the_file(tmp_path, fill):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files_of_at_most(1 << 16), pytest.raises(OSError, match=r"File too large: '.*/file'") as caught:
        fill(path)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_output(tmp_path / "file"):
        open(tmp_path / "other")
    with pytest.raises(RuntimeError, match="a bug"), atomic_output(tmp_path / "file"):
        raise RuntimeError("a bug")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Is a directory: '.*/folder'"):
        write_bytes(tmp_path / "folder", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_what_killed_processes_left_is_removed_by_the_next_writer(tmp_path):
    """Half files and half exports; nothing young, of a living process, or of another name."""
    dead = subprocess.Popen(["true"])
    dead.wait()

    def leave(name, age=7200, folder=False):
        path = tmp_path / name
        if folder:
            path.mkdir()
            (path / "m.onnx").touch()
        else:
            path.touch()
        os.utime(path, (time.time() - age,) * 2)

    leave(f".results.json.{dead.pid}.part")
    leave(f".m.onnx.{dead.pid}.part", folder=True)
    kept = [f".results.json.{os.getppid()}.part", f".young.{dead.pid}.part", ".somebody.part", f"x.{dead.pid}.part"]
    for name in kept:
        leave(name, 60 if "young" in name else 7200)
    atomic_file._remove_left_over.cache_clear()
    atomic_file.write_text(tmp_path / "new.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "new.txt"}


def test_a_folder_aside_goes_away_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_file.aside_folder(tmp_path / "deep" / "m.onnx") as folder:
        (folder / "part").touch()
        assert folder.parent == tmp_path / "deep" and atomic_file._ASIDE.fullmatch(folder.name)
        1 // 0  # noqa: B018
    assert list((tmp_path / "deep").iterdir()) == []
