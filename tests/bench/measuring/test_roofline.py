"""Floors against counts made by hand on small shapes."""

import pytest
import torch

from bench.measuring import roofline
from bench.measuring.roofline import Machine, Work

MACHINE = Machine(100.0, {"float32": 10.0, "bfloat16": 40.0}, 1e-3)


@pytest.mark.parametrize(
    "work, expected",
    [
        (Work(nbytes=500, flop=20), (5.0, "memory")),
        (Work(nbytes=100, flop=20), (2.0, "compute")),
        (Work(100, 20, "bfloat16"), (1.0, "memory")),
        (Work(nbytes=0.01), (1e-3, "launch")),
    ],
)
def test_the_floor_is_the_tightest_bound(work, expected):
    assert work.floor(MACHINE) == expected


def test_kernels_by_hand():
    assert roofline.log_bessel(10, backward=False) == Work(nbytes=120) and roofline.log_bessel(
        10, backward=True
    ) == Work(nbytes=240)
    assert roofline.scf_loss(3, 5, finetune=False) == Work(nbytes=2 * 4 * 15) and roofline.scf_loss(
        3, 5, finetune=True
    ) == Work(nbytes=3 * 4 * 15)
    assert (
        roofline.similarity_matrix(3, 4, 5) == Work(4 * (12 + 35), 2 * 60)
        and roofline.similarity_matrix(3, 4, 5, stored=False).nbytes == 140
    )
    assert roofline.margin_softmax(1024, 1_000_000, 512, "bfloat16").flop / 788e12 == pytest.approx(
        5.3e-3, rel=0.01
    )  # four products on one device


def test_networks_are_those_of_the_paper():
    """24.15 GFLOP and 65.1 M parameters of the R100, 0.787 GFLOP and 393.4 M of the MLP, as counted for the published
    code.
    """
    flop, parameters, net_flop, net_parameters = roofline.network_counts("ir_100", "mlp")
    assert (flop / 1e9, parameters / 1e6) == (pytest.approx(24.15, rel=0.01), pytest.approx(65.1, rel=0.01))
    assert (net_flop / 1e9, net_parameters / 1e6) == (pytest.approx(0.787, rel=0.01), pytest.approx(393.4, rel=0.01))
    step = roofline.stage2_step("ir_100", "mlp", 1024, "bfloat16")
    cached = roofline.stage2_step("ir_100", "mlp", 1024, "bfloat16", cached=True)
    assert step.flop - cached.flop == 1024 * flop and cached.nbytes == 7 * 4 * net_parameters
    assert roofline.stage1_step("ir_100", 8, 1000, "bfloat16").flop == 8 * 3 * flop + 4 * 2 * 8 * 1000 * 512


def test_rates_are_measured():
    machine = Machine.measure("cpu", small=True)
    assert (
        machine.copy_bytes_per_second > 1e6
        and machine.launch_seconds > 0
        and min(machine.flops_per_second.values()) > 1e5
    )
    assert Machine(**machine.as_dict()) == machine


@pytest.mark.parametrize("seconds, rows", [(1 / 100, 64), (1 / 10, 16)])
def test_a_product_that_would_take_seconds_is_smaller(seconds, rows, monkeypatch):
    ticks = iter([0.0, seconds])  # of a product of a quarter of the rows
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    call, flop = roofline._matrix_product(64, torch.float32, "cpu")
    assert call().shape == (rows, rows) and flop == 2 * rows**3
