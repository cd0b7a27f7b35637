"""The command that shows and converts weight files."""

import numpy as np
import pytest
import torch

from scf_fast.checkpoints import main
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.weights.contents import Weights
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights


@pytest.mark.parametrize(
    "family, parts, layout, expected",
    [
        ("published", ["backbone"], "insightface", "ir_small cannot be written for insightface, whose"),
        ("tface", ["backbone"], "published", "use --to tface"),
        ("insightface", ["backbone"], "tface", "no projection where the width stays"),
        ("tface", ["confidence_net"], "published", "which has mlp alone"),
        ("published", ["confidence_net"], "tface", "which has conv alone"),
        ("published", ["confidence_net"], "insightface", "insightface has no confidence net"),
        ("published", ["backbone", "class_centers"], "published", "choose with --part"),
        ("published", ["backbone", "class_centers"], "scf_fast", "choose with --part"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_line(family, parts, layout, expected, tmp_path, capsys, small_backbone):
    net = build_confidence_net("conv" if family == "tface" else "mlp", 16, 7).state_dict()
    whole = {
        "backbone": small_backbone(family).state_dict(),
        "class_centers": torch.randn(3, 32),
        "confidence_net": net,
    }
    write_weights(Weights(**{part: whole[part] for part in parts}), tmp_path / "in", "safetensors")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", layout]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and expected in error and not (tmp_path / "out").exists()
    if "--part" in expected:
        assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", layout, "--part", "backbone"]) == 0
        assert read_weights(tmp_path / "out").parts == ("backbone",)


def test_convert_overwrites_when_told_to(tmp_path, capsys, save_as):
    saved = save_as("published", tmp_path)
    command = ["convert", str(saved.saved_fc), str(tmp_path / "out"), "--to", "tface"]
    assert main(command) == 0 and main(command) == 2 and "exists; give another name" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and torch.equal(torch.load(tmp_path / "out"), saved.centers)


def test_inspect_says_what_a_file_is(tmp_path, capsys, save_as):
    save_as("insightface", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "backbone iresnet_small (insightface), embedding 32, last map 128 x 7 x 7" in out
    assert "class centers of 5 identities, width 32, float32" in out and "epoch 3" in out and "global_step 120" in out
    torch.save(
        {
            "epoch": 1,
            "uncer_net_state_dict": build_confidence_net("mlp", 8, 7).state_dict(),
            "opt_state": {"state": {}},
        },
        tmp_path / "c",
    )
    assert main(["inspect", str(tmp_path / "c")]) == 0 and "confidence net mlp on 392 values" in capsys.readouterr().out
    np.save(tmp_path / "n.npy", np.zeros(3))
    assert main(["inspect", str(tmp_path / "n.npy")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
