"""The command that makes class centers from images; what it computes is tested in ``features``."""

import pytest
import torch

from scf_fast import centers_from_data
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.index import open_source


@pytest.mark.parametrize(
    "output, message",
    [("here.pth", "exists; give another name, or --overwrite"), ("fc.pth", "1 of 3 (1) have none")],
)
def test_refuses_in_one_line(output, message, faces, tmp_path, capsys):
    torch.save(Backbone("ir_tiny", 16).state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "here.pth").touch()
    source = open_source(faces / "train")
    for number, label in enumerate((0, 2)):  # nobody has the number 1
        (tmp_path / f"{number}.jpg").write_bytes(source.encoded(number).tobytes())
        with open(tmp_path / "list.txt", "a") as file:
            file.write(f"{number}.jpg {label}\n")
    arguments = ["--data", tmp_path / "list.txt", "--saved_bkb", tmp_path / "backbone.pth"]
    assert centers_from_data.main(list(map(str, [*arguments, "--output", tmp_path / output]))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "fc.pth").exists()
