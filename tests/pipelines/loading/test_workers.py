"""Processes that decode: what becomes of a run when they hang, die, have no memory, or when the disk is slow."""

import ctypes
import os
import re
import resource
import signal
import time

import numpy as np
import pytest
import torch

from scf_fast.pipelines import memory, waiting
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading import workers
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import TimedOut

_CLONE_NEWNS = 0x20000


class Faces(ImageSource):
    """Gray faces; ``act`` is called with the position of each before it is shown."""

    def __init__(self, count, act=lambda i: None):
        self._act = act
        self._set_labels(np.arange(count) % 3, count)

    def encoded(self, i):
        raise InputError("not stored")

    def pixels(self, i):
        self._act(i)
        return np.full((112, 112, 3), i % 256, dtype=np.uint8)

    def name(self, i):
        return f"face {i}"


def open_loader(source, batch_size=4, **options):
    options = {"num_workers": 1, "prefetch": 1, **options}
    return make_loader(source, EpochSampler(len(source), batch_size, shuffle=False), backend="torch", **options)


def at(position, act):
    return lambda i: act() if i == position else None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_hangs_is_named(num_workers, monkeypatch):
    source = Faces(12, at(6, lambda: time.sleep(60)))
    monkeypatch.setattr(waiting, "_JOIN", 0.1)
    began = time.monotonic()
    with open_loader(source, num_workers=num_workers, timeout=0.5) as loader:
        batches = loader.batches(0)
        assert next(batches).indices.tolist() == [0, 1, 2, 3]
        where = r"process 2 of 2 that decode \(pid \d+\), which is at face 6" if num_workers else "face 6"
        with pytest.raises(TimedOut, match=f"^the torch loader has waited [01] s for {where}, and there was no progre"):
            next(batches)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slow_disk_is_waited_for(num_workers):
    """A batch takes three times the limit, no image takes half of it."""
    with open_loader(Faces(8, lambda i: time.sleep(0.12)), 8, num_workers=num_workers, timeout=0.3) as loader:
        assert len(list(loader.batches(0))) == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by SIGKILL, as the system does when memory runs"),
        (lambda: os.kill(os.getpid(), signal.SIGHUP), "was killed by SIGHUP"),
        (lambda: os._exit(3), "has ended with status 3"),
        (lambda: bytearray(1 << 60), r"\(pid \d+\) has no memory left; take fewer --num_workers"),
    ],
)
def test_a_process_that_dies_or_has_no_memory_ends_the_epoch_at_once(act, message):
    began = time.monotonic()
    with open_loader(Faces(16, at(5, act)), num_workers=2) as loader:
        with pytest.raises(InputError, match=message):
            list(loader.batches(0))
        assert next(loader.batches(0)).indices.tolist() == [0, 1, 2, 3]  # others can be started
    assert time.monotonic() - began < 10


def test_another_error_keeps_its_traceback():
    def fail():
        raise KeyError("what is this")

    with open_loader(Faces(4, at(1, fail))) as loader, pytest.raises(RuntimeError, match=r"(?s)in fail.*what is this"):
        list(loader.batches(0))


def test_an_iteration_left_half_way_is_given_up_at_its_next_image():
    with open_loader(Faces(240, lambda i: time.sleep(0.005)), 60, num_workers=2, prefetch=4) as loader:
        next(loader.batches(0))
        began = time.monotonic()
        loader._processes.cancel()
        assert time.monotonic() - began < 0.25  # of 0.6 seconds that two processes have still to do


def test_signals_that_stop_the_run_do_not_end_its_processes(monkeypatch):
    with open_loader(Faces(16)) as loader:
        batches = loader.batches(0)
        next(batches)
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(loader._processes._processes[0].pid, sign)
        assert len(list(batches)) == 3


def test_processes_end_with_the_one_that_trains():
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not live in a forked process
        loader = open_loader(Faces(16), num_workers=2)
        next(loader.batches(0))
        os.write(writing, " ".join(str(p.pid) for p in loader._processes._processes).encode())
        time.sleep(60)
        os._exit(0)
    pids = [int(pid) for pid in os.read(reading, 100).split()]
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(_runs(pid) for pid in pids)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def in_a_fork(work):
    """Runs ``work`` in a process of its own, and returns what it returns as text, or its error's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def read_large_batches():
    with open_loader(Faces(8 * 512), 512, num_workers=8) as loader:
        return sum(len(batch.labels) for batch in loader.batches(0))


def test_eight_processes_train_where_shared_memory_has_64_megabytes():
    """Docker's default; their batches take 170 MB. PyTorch's own workers hung there."""

    def work():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64m"):
            return "not allowed"
        before = os.statvfs("/dev/shm")
        assert before.f_blocks * before.f_frsize == 64 << 20
        result = read_large_batches()
        assert os.statvfs("/dev/shm").f_bavail == before.f_bavail
        return result

    result = in_a_fork(work)
    if result == "not allowed":
        pytest.skip("this user may not mount")
    assert result == "4096"


def test_open_files_do_not_grow_with_batches():
    """Each batch of PyTorch's workers took a descriptor."""

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, 1 << 10))
        with open_loader(Faces(400), 4, num_workers=1, prefetch=40) as loader:
            kept = list(loader.batches(0))
        return len(kept)

    assert in_a_fork(work) == "100"


def test_too_few_descriptors_are_said():
    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 6, 1 << 10))
        with open_loader(Faces(40), num_workers=8) as loader:
            return len(list(loader.batches(0)))

    text = in_a_fork(work)
    assert re.match(r"InputError: 8 processes that decode cannot be started: Too many open files; .*`ulimit -n`", text)


def test_batches_that_do_not_fit_are_refused_beforehand(monkeypatch):
    monkeypatch.setattr(workers, "free_memory", lambda: 100_000_000)
    with pytest.raises(
        InputError, match=r"^9 batches of 512 images on their way need 0\.17 GB of memory, but 0\.10 GB are fr"
    ):
        read_large_batches()


def test_free_memory_is_what_the_control_group_leaves(tmp_path, monkeypatch):
    group = tmp_path / "groups" / "job"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/inner\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    for name in ("own", "meminfo", "groups"):
        attribute = {"own": "_OWN_GROUPS", "meminfo": "_MEMINFO", "groups": "_GROUPS"}[name]
        monkeypatch.setattr(memory, attribute, tmp_path / name)
    assert memory.free_memory() == 8000 << 10
    for name, text in {"memory.max": "max", "memory.current": "5000"}.items():
        (group / name).write_text(f"{text}\n")
    assert memory.free_memory() == 8000 << 10
    (group / "memory.max").write_text("6000\n")
    assert memory.free_memory() == 1000
    (group / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert memory.free_memory() == 1300
    (tmp_path / "own").write_text("7:cpu,memory:/elsewhere\n")  # version 1, in a container
    old = tmp_path / "groups" / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("2500\n")
    (old / "memory.usage_in_bytes").write_text("500\n")
    assert memory.free_memory() == 2000
