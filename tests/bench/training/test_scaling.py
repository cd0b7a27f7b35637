"""Two ranks send the bytes that the model computes, and the model agrees with cases worked out by hand."""

import json
from types import SimpleNamespace

import pytest

from bench.training import collectives, scaling
from bench.training.collectives import on_the_wire
from bench.training.scaling_model import GPUS, IDENTITIES, Assumptions, model, predicted, step_seconds

RANK = """
import sys
from bench.training import collectives, scaling

collectives.OVERLAP_CLASSES, collectives.OVERLAP_ROUNDS = 100, 1
scaling.main(sys.argv[1:])
"""


@pytest.fixture
def forked(monkeypatch, tmp_path, run_ranks):
    """Ranks that start without a launcher and time a small classifier."""

    def run(command, **_):
        start, worker = command.index("bench.scaling"), tmp_path / "rank.py"
        worker.write_text(RANK)
        run_ranks(int(command[command.index("--nproc_per_node") + 1]), worker, *command[start + 1 :])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(collectives, "subprocess", SimpleNamespace(run=run))


def test_two_ranks_send_what_the_model_says(forked, tmp_path, capsys):
    assert scaling.main(["--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    for stage in ("stage 1", "stage 2"):
        for zero_stage in (0, 1, 2):
            counted = on_the_wire(result["measured"]["counted"][stage][str(zero_stage)], 2)
            assert counted == pytest.approx(on_the_wire(predicted(stage, zero_stage), 2), rel=1e-3)
    assert result["measured"]["counted"]["overlap"].keys() == {"beside", "in turn"}
    printed = capsys.readouterr().out
    assert "A model, not a measurement. Assumptions: network ir_100" in printed and "| 29 M |" in printed


def test_bytes_on_the_wire():
    assert on_the_wire({"all_reduce": 80, "all_gather": 40, "reduce_scatter": 40}, 4) == 120 + 30 + 30
    assert on_the_wire({"all_reduce": 80}, 1) == 0


def test_model_by_hand():
    a = Assumptions(latency_us=0.0, inter_gb_per_s=1e9, intra_gb_per_s=1e9)  # communication costs nothing
    parts = step_seconds(16, 1_000_000, a)
    products = 4 * 2 * 128 * 16 * 62_500 * 512 / 500e12
    assert parts["backbone"] == 128 / 5000 and parts["margin softmax"] == pytest.approx(products)
    assert parts["total"] == pytest.approx(128 / 5000 + products + 5 * 4 * 62_500 * 512 / 4.3e12, rel=1e-4)
    rows = model(a)
    assert len(rows) == len(GPUS) * len(IDENTITIES) and all(0 < row["efficiency"] < 1 for row in rows)
    slower = model(Assumptions(inter_gb_per_s=5.0))
    assert all(b["images_per_second"] < a["images_per_second"] for a, b in zip(rows, slower))
    assert not model(Assumptions(gpu_gb=1.0))[-7]["fits"]  # 29 M on 8 GPUs: 14.8 GB each
    assert "does not fit" in scaling.model_table(model(Assumptions(gpu_gb=1.0)))
