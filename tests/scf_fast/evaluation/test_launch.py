"""The whole command on the synthetic data set's own files, by two ranks."""

import json

import pytest
import torch

from scf_fast.model import save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net


@pytest.fixture(scope="module")
def data(fork_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "set"
    sizes = ["--identities", 1, "--images-per-identity", 1, "--eval-identities", 20]
    status, output = fork_ranks(0, root, *sizes, "--seed", 5, module="scf_fast.pipelines.synthetic")
    assert status == 0, output
    return root


def test_two_ranks_report_on_the_synthetic_set(fork_ranks, data, tmp_path):
    torch.manual_seed(0)
    backbone = Backbone("ir_tiny", 24)
    save_model(
        tmp_path / "model.pt",
        backbone.state_dict(),
        build_confidence_net("conv", 16, 7, initial_kappa=300.0).state_dict(),
        radius=64.0,
        normalization="insightface",
    )
    arguments = [
        "report",
        "--model",
        tmp_path / "model.pt",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--loader",
        "torch",
        "--num-workers",
        0,
    ]
    status, output = fork_ranks(2, *arguments, module="scf_fast.evaluation")
    assert status == 0, output
    assert output.count("## Verification") == 1  # rank 0 alone reports
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["verification"]["accuracy"] <= 1 and 0 <= results["verification"]["accuracy_vmf"] <= 1
    assert -1 <= results["kappa"]["severity_spearman"] <= 1
    assert {"kappa", "feature_norm", "random"} <= results["reject_area"].keys()
    assert results["templates"]["average"].keys() == results["templates"]["kappa"].keys() == {"1e-01", "1e-02"}
    searches = results["identification"]
    assert searches["galleries"] == ["G1", "G2"] and (
        searches["enrolled"],
        searches["searches"],
        searches["kappa_vmf"]["mated"],
    ) == (20, 60, 60)
    assert 0 <= searches["kappa_vmf"]["rank"]["1"] <= searches["kappa_vmf"]["rank"]["10"] <= 1
    assert sum(searches["comparisons"]["genuine"]) == 60 and sum(searches["comparisons"]["impostor"]) == 60 * 19
    assert (tmp_path / "out" / "scores.png").exists() and not any("1:N" in note for note in results["notes"])
