"""The kernels are defined once a process: interpreted where there is no GPU to compile them for, whichever test imports
them first.
"""

import json
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


def pytest_collection_modifyitems(items):
    """Puts the files that launch processes first: they take longest, and one that comes last leaves a worker idle."""
    launching = {
        item.path
        for item in items
        if {"run_command", "run_ranks", "fork_ranks"} & set(getattr(item, "fixturenames", ()))
    }
    items.sort(key=lambda item: item.path not in launching)


@pytest.fixture(scope="session")
def run_command():
    return run


@pytest.fixture(scope="session")
def run_ranks():
    """``run_ranks(world_size, script, *arguments)``: starts the ranks of one group, all of which must succeed; returns
    what they have printed.
    """

    def launch(world_size, *command):
        from scf_fast.distributed import free_port

        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", world_size]
        status, output = run([*start, "--master_port", free_port(), *command], PYTHONPATH=str(ROOT))
        assert status == 0, output
        return output

    return launch


@pytest.fixture(scope="session")
def fork_ranks(tmp_path_factory):
    """``fork_ranks(world_size, *flags)``: trains as a launch of ``world_size`` ranks does, without the time that one
    takes to start (tests/rank_server.py); ``module=`` names another command. Returns (exit status, output).
    """
    logs, server = tmp_path_factory.mktemp("ranks"), None

    def launch(world_size, *arguments, module="scf_fast.train"):
        nonlocal server
        if server is None:
            environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "rank_server.py"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
            )
        log = logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()
        request = {"ranks": world_size, "module": module, "arguments": list(map(str, arguments)), "log": str(log)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), log.read_text()

    yield launch
    if server is not None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
