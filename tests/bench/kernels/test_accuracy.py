"""The accuracy benchmark finds errors known in advance, and the ranges and optima it reports are right."""

import json

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from bench.kernels import accuracy


def test_errors_are_relative_with_a_floor():
    exact = accuracy.Exact.split([mpf(100), mpf("0.5")])
    np.testing.assert_allclose(accuracy.errors([101.0, 0.25], exact), [0.01, 0.5])
    np.testing.assert_allclose(accuracy.errors([101.0, 0.25], exact, floor=1.0), [0.01, 0.25])
    assert np.isinf(accuracy.errors([np.nan, -np.inf], exact)).all()


def test_errors_see_below_the_spacing_of_float64():
    with mp.workdps(60):
        exact = accuracy.Exact.split([1 + mpf(2) ** -60])
    np.testing.assert_allclose(accuracy.errors([1.0], exact), [2.0**-60], rtol=1e-12)


def test_range_where():
    kappas = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    for holds, expected in ((11111, [1, 5]), (111, [3, 5]), (10110, [3, 4]), (11000, [1, 2]), (0, None)):
        assert accuracy.range_where(np.array([digit == "1" for digit in f"{holds:05d}"]), kappas) == expected


def test_reference_is_log_bessel_i():
    """Spot checks with mpmath's own Bessel function; every entry was computed in two other ways when it was made."""
    reference = accuracy.load_reference()
    assert sorted(reference) == [2, 3, 4, 8, 32, 128, 512, 1024, 4096, 8192]
    for dim, entries in reference.items():
        kappas = [entry["kappa"] for entry in entries]
        assert kappas == sorted(kappas) and len(kappas) >= 40
        assert kappas[0] == pytest.approx(1e-6) and kappas[-1] == pytest.approx(1e7)
        assert all(kappa == np.float32(kappa) for kappa in kappas)
        for entry in entries[18:27:4]:
            with mp.workdps(50):
                order, kappa = mpf(dim) / 2 - 1, mpf(entry["kappa"])
                bessel = mp.besseli(order, kappa)
                ratio = mp.besseli(order + 1, kappa) / bessel
                assert mp.almosteq(mp.log(bessel) - order * mp.log(kappa), mpf(entry["psi"]), rel_eps=mpf(10) ** -35)
                assert mp.almosteq(ratio, mpf(entry["A"]), rel_eps=mpf(10) ** -35)
                assert mp.almosteq(
                    1 - ratio**2 - (dim - 1) * ratio / kappa, mpf(entry["A_prime"]), rel_eps=mpf(10) ** -30
                )


def test_a_planted_error_is_found(monkeypatch):
    """A_d off by 1e-3 at one decade of kappa only."""
    honest = accuracy.QUANTITIES[2]

    def off_in_one_decade(kappa, dim):
        return honest.ours(kappa, dim) * (1 + 1e-3 * ((kappa > 10) & (kappa < 100)).to(kappa.dtype))

    monkeypatch.setattr(accuracy, "QUANTITIES", (honest._replace(ours=off_in_one_decade),))
    found = accuracy.our_errors(512, accuracy.load_reference()[512], "cpu")["A_d"]
    assert found["float64"] == pytest.approx(1e-3, rel=1e-6)
    # The dense float32 grid is judged by float64 of the same function, so here the reference entries alone can tell.
    assert found["float32"] == pytest.approx(1e-3, rel=1e-2)


def test_where_others_hold():
    """float64 ive_255 is least just above kappa = 12 and iv_255 overflows near 750; the published gradient is 1 until
    ive matters.
    """
    found = accuracy.other_errors(512, "cpu")
    low, high = found["scipy log ive + kappa"]["finite"]
    assert (low, high) == (pytest.approx(12.9, rel=0.02), pytest.approx(1e7))
    low, high = found["scipy log iv"]["finite"]
    assert (low, high) == (pytest.approx(10.3, rel=0.02), pytest.approx(749, rel=0.02))
    low, high = found["published"]["gradient holds"]
    assert 1000 < low < 3200 and high == pytest.approx(1e7)
    assert found["published"]["largest"] > 1


COSINES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)


def test_optimal_kappa_of_the_published_objective():
    """(d/2 - 1) / (1 - cos), while ive_255 is lost in the 1e-6."""
    for cos, expected in zip(COSINES, (255, 283, 364, 510, 850, 1275, 2547)):
        assert accuracy.published_optimal_kappa(255.0, cos) == pytest.approx(expected, abs=0.6)


def test_optimal_kappa_of_the_exact_objective():
    found = accuracy.evaluate(accuracy.inverse_mean_resultant_length, COSINES, 512, torch.float64, "cpu")
    np.testing.assert_allclose(found, [0, 51.7, 168.7, 341, 702, 1136, 2421], rtol=1e-3, atol=1e-12)


def test_command_prints_a_row_for_each_dimension_and_writes_both_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "DENSE_COUNT", 200)
    monkeypatch.setattr(accuracy.compiled_accuracy, "measure", list)  # test_compiled_accuracy has the second part
    assert accuracy.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    measured = json.loads((tmp_path / "accuracy-cpu.json").read_text())
    for dim, errors in measured["ours"].items():
        row = next(line.split() for line in printed if line.split()[:1] == [dim])
        assert row[1] == f"{errors['log I_v']['float32']:.1e}"
        assert {name for by_dtype in errors.values() for name in by_dtype} == {"float32", "float64"}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
