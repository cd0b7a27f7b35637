import json

import pytest

from bench.input import decode


def test_every_path_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(decode, "DISTINCT", 20)
    monkeypatch.setattr(decode, "SHUFFLED", 5000)
    decode.main(
        [
            "--images",
            "200",
            "--batch",
            "16",
            "--batches",
            "2",
            "--rounds",
            "1",
            "--threads",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    (path,) = tmp_path.glob("decode-*.json")
    measured = json.loads(path.read_text())
    rates = measured["images_per_second"]
    assert measured["rate_over_dali_reader"]["DALI's MXNet reader"] == 1 and len(measured["rate_over_dali_reader"]) == 4
    assert len(measured["processor_us_an_image"]) == 3 and min(measured["processor_us_an_image"].values()) > 0
    assert set(rates) == {"index", "source", "decoding"} and set(rates["index"]) == {
        "recordio",
        "tar",
        "folder",
        "list",
    }
    assert all(rate > 0 for group in rates.values() for rate in group.values())
    assert "DALI's MXNet reader" in capsys.readouterr().out
