"""The kernels are defined once a process: interpreted where there is no GPU to compile them for, whichever test imports
them first.
"""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


def run(command, timeout=240, **environment):
    """A command in its own process group, on the CPU, where any machine has room for several ranks: (exit status,
    stdout + stderr); nothing of it is left running.
    """
    inherited = {
        key: value for key, value in os.environ.items() if key != "MASTER_PORT"
    }  # a benchmark in this process may listen there already
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **inherited,
            "PYTHONWARNINGS": "ignore::FutureWarning",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, output


# Files of 20 seconds and more of one core, longest first.
_LONGEST = (
    "test_instructions.py",
    "test_train.py",
    "test_step_guard.py",
    "test_suite.py",
    "test_wheel.py",
    "test_margin_softmax.py",
    "test_chaos.py",
    "test_compiled.py",
)


def pytest_collection_modifyitems(config, items):
    """Leaves the tests of several nodes to ``-m cluster``, and puts the longest files first, then the others that
    launch processes: a long one that comes last leaves the other worker idle.
    """
    if "cluster" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cluster")])
        items[:] = [item for item in items if not item.get_closest_marker("cluster")]
    launching = {item.path for item in items if {"run_command", "start_ranks"} & set(getattr(item, "fixturenames", ()))}

    def place(item):
        longest = _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST)
        return longest, item.path not in launching

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escapes what a test has printed of names that are not UTF-8: xdist cannot send them on."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


def pytest_collection_finish():
    """Spares each collection of garbage from here on, which loaders and engines ask for, the look through all that is
    imported: a quarter of a second.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def log_levels_stay():
    """Gives the loggers the levels back that a command, run in this process, has changed."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("scf_fast")]
    before = {logger: logger.level for logger in (logging.root, *map(logging.getLogger, names))}
    yield
    for logger, level in before.items():
        logger.setLevel(level)


@pytest.fixture(scope="session")
def run_command():
    return run


class Launch:
    """A launch of forked ranks; with what a ``subprocess.Popen`` has to wait for it and to kill it."""

    def __init__(self, ask, pid, log):
        self._ask, self.pid, self.log, self.returncode = ask, pid, log, None

    @property
    def ranks(self):
        """Their process ids."""
        return [int(child) for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def poll(self):
        return self._wait(0)

    def wait(self, timeout=240):
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.log, timeout)
        return self.returncode

    def _wait(self, seconds):
        if self.returncode is None:
            self.returncode = self._ask({"wait": self.pid, "seconds": seconds})
        return self.returncode


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory):
    """``start_ranks(world_size, *command)``: starts a ``Launch`` of this many ranks without the time that one takes to
    start (tests/rank_server.py).

    ``command`` is a script or ``-m module``, and its arguments; ``world_size`` 0 is plain python, without a launcher.
    The output is appended to ``log``; ``file_bytes`` limits the size of any file that is written; ``launcher="srun"``
    gives the ranks Slurm's variables, ``variables`` others on top; ``node`` starts them on another "machine".
    """
    logs = tmp_path_factory.mktemp("ranks")
    server = None

    def ask(request):
        nonlocal server
        if server is None:
            environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
            server = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "rank_server.py"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
            )
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(world_size, *command, log=None, file_bytes=None, launcher=None, variables=None, node=None):
        log = log or logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()
        request = {"ranks": world_size, "command": list(map(str, command)), "log": str(log)}
        request |= {"file_bytes": file_bytes, "launcher": launcher, "variables": variables, "node": node}
        return Launch(ask, ask(request), log)

    yield start
    if server is not None:
        server.stdin.close()  # it kills what is still running, and ends
        server.wait()


@pytest.fixture(scope="session")
def fork_ranks(start_ranks):
    """``fork_ranks(world_size, *flags)``: trains as a launch of ``world_size`` ranks does, or with 0 as plain python
    does; ``module=`` names another command. Returns (exit status, output).
    """

    def run_to_the_end(world_size, *arguments, module="scf_fast.train", **options):
        launch = start_ranks(world_size, "-m", module, *arguments, **options)
        return launch.wait(), launch.log.read_text()

    return run_to_the_end


@pytest.fixture(scope="session")
def run_ranks(start_ranks):
    """``run_ranks(world_size, script, *arguments)``: forks the ranks of one group, all of which must succeed; returns
    what they have printed.
    """

    def run_to_the_end(world_size, *command):
        launch = start_ranks(world_size, *command)
        assert launch.wait() == 0, launch.log.read_text()
        return launch.log.read_text()

    return run_to_the_end
