import contextlib
import errno
import json
import os
import re
import resource
import secrets
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_safetensors

from scf_fast.pipelines.formats.atomic_file import (
    atomic_output,
    atomic_path,
    folder_aside,
    publish,
    remove_leftovers,
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
    durable = [("rename", str(path)), ("sync", str(tmp_path))]

    def check_durable():
        (what, aside), *rest = calls
        assert what == "sync" and re.fullmatch(r"\.file\.[0-9a-f]{12}\.part", Path(aside).name) and rest == durable
        calls.clear()

    write_bytes(path, b"1")
    check_durable()
    with atomic_path(path) as other:
        other.write_bytes(b"2")
    check_durable()
    (tmp_path / "made").write_bytes(b"3")
    publish(tmp_path / "made", path)
    assert calls == [("sync", str(tmp_path / "made")), *durable] and path.read_bytes() == b"3"
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


def test_a_planted_link_is_not_followed_and_writers_stay_apart(tmp_path, monkeypatch):
    victim, tokens = tmp_path / "victim", iter(["0" * 12, "0" * 12, "1" * 12, "0" * 12, "1" * 12, "2" * 12])
    victim.write_bytes(b"mine")
    monkeypatch.setattr(secrets, "token_hex", lambda count: next(tokens))
    (tmp_path / f".file.{'0' * 12}.part").symlink_to(victim)
    with atomic_output(tmp_path / "file") as outer:
        outer.write(b"outer")
        write_bytes(tmp_path / "file", b"inner")
        assert (tmp_path / "file").read_bytes() == b"inner"
    assert (tmp_path / "file").read_bytes() == b"outer" and victim.read_bytes() == b"mine"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_long_names(tmp_path):
    for name in ("n" * 255, "ä" * 127):
        write_bytes(tmp_path / name, b"1")
        (tmp_path / f".{os.fsdecode(os.fsencode(name)[:200])}.{'a' * 12}.part").write_bytes(b"left")
        write_bytes(tmp_path / name, b"2")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match=r"File name too long: '.*nnn'"):
        write_bytes(tmp_path / ("n" * 256), b"")


def test_what_a_killed_process_has_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    program = (
        "import sys, time; from scf_fast.pipelines.formats.atomic_file import atomic_output\n"
        "with atomic_output(sys.argv[1]) as file:\n    file.write(b'half'); file.flush(); print(); sys.stdout.flush()\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "file"], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        (left,) = tmp_path.glob(".file.*.part")
        write_bytes(tmp_path / "file", b"other")
        assert left.exists() and remove_leftovers(tmp_path) == 0
        writer.kill()
    write_bytes(tmp_path / "other", b"1")
    assert left.exists()
    write_bytes(tmp_path / "file", b"1")
    assert not left.exists()
    for name, age in ((".file.123.part", 2), (".file.124.part", 0)):  # of older versions, which have locked none
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age * 86400,) * 2)
    os.mkfifo(tmp_path / f".file.{'b' * 12}.part")
    (tmp_path / "notes.part").write_bytes(b"mine")
    assert remove_leftovers(tmp_path) == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", "other", ".file.124.part", f".file.{'b' * 12}.part", "notes.part"}


def test_a_folder_aside_is_removed_after_use_and_after_a_kill(tmp_path):
    """A child that ends without a word is what a kill leaves."""
    path = tmp_path / "model.onnx"
    with folder_aside(path) as folder:
        (folder / "data").write_bytes(b"1")
        with folder_aside(path) as other:  # of another process: this one is locked
            assert folder.exists() and other != folder
        assert remove_leftovers(tmp_path) == 0
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if child == 0:
        with folder_aside(path) as folder:
            (folder / "data").write_bytes(b"1")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "model.onnx.part").mkdir()  # somebody else's
    with folder_aside(path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "model.onnx.part"])
    (tmp_path / f".model.onnx.{'a' * 12}.part").mkdir()
    write_bytes(path, b"model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "model.onnx.part"}


def test_a_folder_aside_that_cannot_be_made_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/model.onnx'"), folder_aside(tmp_path / "missing/model.onnx"):
        pass
