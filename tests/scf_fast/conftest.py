import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scf_fast.demo import launcher

ROOT = Path(__file__).resolve().parents[2]


def run(command, timeout=240, **environment):
    """A command in its own process group: (exit status, stdout + stderr); nothing of it is left running."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env={**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning", "OMP_NUM_THREADS": "1", **environment})
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, output


@pytest.fixture(scope="session")
def run_command():
    return run


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A small synthetic data set."""
    root = tmp_path_factory.mktemp("faces") / "set"
    sizes = ["--identities", 8, "--images-per-identity", 16, "--eval-identities", 0]
    status, output = run([sys.executable, "-m", "pipelines.synthetic", root, *sizes, "--seed", 3])
    assert status == 0, output
    return root


_COMMON = ["--batch_size", "32", "--epochs", "2", "--log_every", "1", "--num_workers", "1"]
_FLAGS = {
    "stage1": ["--stage", "backbone", "--network", "ir_small", "--z_dim", "32", "--lr", "0.01", *_COMMON],
    "stage2": ["--stage", "confidence", "--confidence_net", "conv", "--precision", "fp32", "--lr", "1e-3", *_COMMON],
}


@pytest.fixture(scope="session")
def flags():
    """What the launches of both stages have in common."""
    return _FLAGS


@pytest.fixture(scope="session")
def stage1(faces, tmp_path_factory):
    """Output folder of a whole stage 1 on two ranks under the deepspeed launcher, and its log."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    status, output = run([*launcher(2), *_FLAGS["stage1"], "--zero_stage", 2, "--data", faces / "train", "--output_dir", out])
    assert status == 0, output
    return out, output


@pytest.fixture(scope="session")
def stage2(faces, stage1, tmp_path_factory):
    """The same for stage 2, on the backbone of stage 1."""
    out = tmp_path_factory.mktemp("stage2") / "run"
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"]
    status, output = run([*launcher(2), *_FLAGS["stage2"], *weights, "--data", faces / "train", "--output_dir", out])
    assert status == 0, output
    return out, output
