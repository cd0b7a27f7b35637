"""The command that counts instructions: what it chooses, refuses and records; tests/kernels has the counts."""

import json

import pytest

from bench.kernels import instructions
from bench.kernels.catalog import variants
from bench.kernels.variant import Product, Variant
from scf_fast.kernels._common import INTERPRETED


def test_kernels_are_chosen_by_name():
    assert len(instructions.chosen([])) == len(variants())
    names = [variant.work for variant in instructions.chosen(["SCF loss, float*", "pooling, kappa*bfloat16*"])]
    assert names == [
        "SCF loss, float32, d = 512",
        "SCF loss, float64, d = 512",
        "SCF loss, float32, d = 8192",
        "pooling, kappa weights, bfloat16, d = 512",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "none"], "must match the name of a kernel"),
        (["--architectures", "80,75"], "must be some of 80, 86, 89, 90, 100, 120, got 75"),
    ],
)
def test_unknown_names_are_refused(arguments, message, tmp_path, capsys):
    assert instructions.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")
def test_interpreted_kernels_are_refused(tmp_path, capsys):
    assert instructions.main(["--only", "log C*", "--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err


def test_names_are_unique():
    assert len({variant.work for variant in variants()}) == len(variants())


def variant(**facts):
    return Variant("work", "kernel", lambda: None, "element", lambda arguments: 1.0, **facts)


def test_memory_sets_the_pace_of_few_instructions_and_issue_that_of_many():
    light, heavy = ({"fp32": number} for number in (10.0, 1000.0))
    assert instructions.shares(variant(nbytes=12), 90, light) == {"H200": 1.0, "H100": 1.0}
    shares = instructions.shares(variant(nbytes=12), 90, heavy)
    assert shares["H200"] == pytest.approx(12 / 4.32e12 / (1000 / (132 * 128 * 1.98e9)), abs=1e-3)
    assert shares["H100"] == pytest.approx(shares["H200"] * 4.8 / 3.35, abs=2e-3)


def test_a_product_is_set_against_the_tensor_cores():
    (share,) = instructions.shares(
        variant(product=Product("bfloat16", 1024, 512, "STEP")), 80, {"fp32": 100.0}
    ).values()
    assert share == pytest.approx(1024 / 312e12 / (100 / (108 * 64 * 1.41e9)), abs=1e-3)


def record(work, architecture, number, spilled=0):
    return {"work": work, "architecture": architecture, "instructions": number, "spilled": spilled}


def test_committed_counts_are_entered_beside_the_others(tmp_path):
    path = tmp_path / "counts.json"
    first, second = (variant.work for variant in variants()[:2])
    instructions.write_committed([record(second, 90, 10.0, 8), record(first, 80, 5.0)], path)
    instructions.write_committed([record(second, 90, 9.0), record(second, 89, 11.0, 4)], path)
    content = json.loads(path.read_text())
    assert content["kernels"] == [
        {"work": first, "instructions": {"80": 5.0}, "spilled": {}},
        {"work": second, "instructions": {"90": 9.0, "89": 11.0}, "spilled": {"89": 4}},
    ]
    path.write_text(json.dumps(content | {"triton": "3.0"}))
    instructions.write_committed([record(first, 80, 6.0)], path)
    assert len(json.loads(path.read_text())["kernels"]) == 1
