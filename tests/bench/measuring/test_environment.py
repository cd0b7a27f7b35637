"""The account of the machine is complete, and names no place on it."""

import sys
from pathlib import Path

import torch

from bench.measuring.environment import environment

ROOT = Path(__file__).parents[3]


def test_environment_names_what_a_number_needs():
    found = environment("cpu")
    assert found["device"] == "cpu" and found["cpu"] and found["torch"] == torch.__version__
    assert {"driver", "triton", "commit", "date", "threads"} <= set(found)


def test_command_names_no_place_on_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/else", "--out", "/home/me/runs", str(ROOT / "bench" / "results"), "--batch", "3"]
    )
    found = environment("cpu")["command"]
    assert (
        found.startswith("python ") and found.endswith(" --out runs bench/results --batch 3") and "/home" not in found
    )
