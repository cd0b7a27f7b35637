import json

import pytest

from bench import decode


def test_every_path_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(decode, "DISTINCT", 20)
    monkeypatch.setattr(decode, "SHUFFLED", 5000)
    decode.main(["--images", "200", "--batch", "16", "--batches", "2", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("decode-*.json")
    rates = json.loads(path.read_text())["images_per_second"]
    assert set(rates) == {"index", "source", "decoding"} and set(rates["index"]) == {"recordio", "tar", "folder", "list"}
    assert all(rate > 0 for group in rates.values() for rate in group.values())
    assert "DALI's MXNet reader" in capsys.readouterr().out
