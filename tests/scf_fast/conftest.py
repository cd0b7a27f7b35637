"""Runs of both stages on a small synthetic data set, made once a session."""

import sys

import pytest

from scf_fast.distributed import launcher


@pytest.fixture(scope="session")
def faces(tmp_path_factory, run_command):
    """A small synthetic data set."""
    root = tmp_path_factory.mktemp("faces") / "set"
    sizes = ["--identities", 8, "--images-per-identity", 16, "--eval-identities", 0]
    status, output = run_command([sys.executable, "-m", "scf_fast.pipelines.synthetic", root, *sizes, "--seed", 3])
    assert status == 0, output
    return root


_COMMON = ["--batch_size", "32", "--epochs", "2", "--log_every", "1", "--num_workers", "1"]
_FLAGS = {
    "stage1": ["--stage", "backbone", "--network", "ir_small", "--z_dim", "32", "--lr", "0.01", *_COMMON],
    "stage2": ["--stage", "confidence", "--confidence_net", "conv", "--precision", "fp32", "--lr", "1e-3", *_COMMON],
}


@pytest.fixture(scope="session")
def flags():
    """Flags of the launches of both stages."""
    return _FLAGS


@pytest.fixture(scope="session")
def stage1(faces, tmp_path_factory, run_command):
    """Output folder of a whole stage 1 on two ranks under the deepspeed launcher, and its log."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    status, output = run_command(
        [*launcher(2), *_FLAGS["stage1"], "--zero_stage", 2, "--data", faces / "train", "--output_dir", out]
    )
    assert status == 0, output
    return out, output


@pytest.fixture(scope="session")
def stage2(faces, stage1, tmp_path_factory, run_command):
    """The same for stage 2, on the backbone of stage 1."""
    out = tmp_path_factory.mktemp("stage2") / "run"
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"]
    status, output = run_command(
        [*launcher(2), *_FLAGS["stage2"], *weights, "--data", faces / "train", "--output_dir", out]
    )
    assert status == 0, output
    return out, output
