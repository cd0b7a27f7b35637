"""The accuracy of compiled kernels: errors are found where they are planted, and a bound that does not hold fails."""

import json

import pytest
import torch

from bench.executor.approximation import Mode
from bench.kernels import accuracy, compiled_accuracy
from bench.kernels.compiled_accuracy import Bound, Error, Table

DIM = 512


def test_a_planted_error_breaks_its_bound(monkeypatch):
    """A of one kappa too large by 1e-6, from Triton alone."""
    honest = compiled_accuracy._family

    def off_at_one_kappa(kappa, dim, triton_kernel):
        results = honest(kappa, dim, triton_kernel)
        if triton_kernel:
            results["A_d f32"][100] *= 1 + 1e-6
        return results

    errors = compiled_accuracy.worst(compiled_accuracy.family_errors(DIM, 256))
    assert not compiled_accuracy.failures(errors)
    monkeypatch.setattr(compiled_accuracy, "_family", off_at_one_kappa)
    found = compiled_accuracy.worst(compiled_accuracy.family_errors(DIM, 256))
    (ratio,) = (error for error in found if error.column == "A_d f32")
    assert ratio.error == pytest.approx(1e-6, rel=0.2)
    assert ratio.kappa == compiled_accuracy.family_kappas(DIM, 256)[100]
    (failure,) = compiled_accuracy.failures(found)
    assert failure.startswith(f"FAILED: A_d f32 at d = {DIM} is 1") and "bound 3e-07" in failure


def test_a_planted_error_of_the_loss_breaks_its_bounds(monkeypatch):
    """log kappa that Triton gets too large by 2e-6 changes the loss, its slope and two coefficients by as much."""
    honest = compiled_accuracy._loss

    def of_another_kappa(batch, options):
        if options & compiled_accuracy.LossOption.TRITON:
            batch = batch._replace(log_kappa=torch.nextafter(batch.log_kappa, batch.log_kappa.new_tensor(100.0)) + 2e-6)
        return honest(batch, options)

    monkeypatch.setattr(compiled_accuracy, "_INPUTS", {"f32": torch.float32})
    errors = compiled_accuracy.worst(compiled_accuracy.loss_errors(DIM, 64))
    assert not compiled_accuracy.failures(errors)
    monkeypatch.setattr(compiled_accuracy, "_loss", of_another_kappa)
    failed = compiled_accuracy.failures(compiled_accuracy.worst(compiled_accuracy.loss_errors(DIM, 64)))
    assert [failure.split()[1] for failure in failed] == ["loss", "slope", "coefficients"]


def test_the_largest_error_of_each_cell_is_kept():
    cells = [
        Error(Table.PAIRS, "f32 a100", 32, error, mode.value, 1.0)
        for error, mode in zip((1e-8, 3e-8, 2e-8), (Mode.EXACT, Mode.PLUS, Mode.MINUS))
    ]
    assert compiled_accuracy.worst(cells) == [cells[1]]
    nothing = compiled_accuracy.largest(
        Table.PAIRS, "", 2, "", torch.tensor([1.0, torch.nan]), torch.tensor([5.0, 6.0])
    )
    assert nothing.error == torch.inf and nothing.kappa == 6.0


def test_bounds_hold_from_their_dimension_on():
    bound = Bound(Table.FAMILY, "A_d' f32", 3e-7, from_dim=64)
    error = Error(Table.FAMILY, "A_d' f32", 32, 1e-5, "plus", 1.0)
    assert not bound.covers(error) and bound.covers(error._replace(dim=64))
    assert not bound.covers(error._replace(dim=64, column="A_d f32"))
    assert compiled_accuracy.failures([error._replace(dim=64, error=torch.nan)])


def test_the_command_fails_with_a_bound(tmp_path, capsys, monkeypatch):
    """A bound below what float32 can do."""
    monkeypatch.setattr(accuracy, "DENSE_COUNT", 200)
    for name, value in (
        ("DIMS", (DIM,)),
        ("COUNT", 64),
        ("PAIR_DIMS", (DIM,)),
        ("PAIR_ROWS", 16),
        ("GAUSSIAN_DIMS", (2,)),
    ):
        monkeypatch.setattr(compiled_accuracy, name, value)
    monkeypatch.setattr(compiled_accuracy, "_INPUTS", {"f32": torch.float32})
    monkeypatch.setattr(compiled_accuracy, "BOUNDS", (Bound(Table.PAIRS, "f32 h100", 1e-9),))
    assert accuracy.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert all(table.value in printed for table in Table) and "FAILED: f32 h100 at d = 512" in printed
    measured = json.loads((tmp_path / "accuracy-cpu.json").read_text())
    assert len(measured["failed"]) == 1 and {error["table"] for error in measured["compiled"]} == {
        table.name.lower() for table in Table
    }
