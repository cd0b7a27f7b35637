"""The warning of a kappa that has collapsed."""

import logging

import pytest

from scf_fast.stages.confidence import KappaWatch


@pytest.mark.parametrize(
    "kappas, said",
    [
        ([1.0, 0.5, 3.0, 300.0], 0),  # from PyTorch's initialization up
        ([100.0, 5.0, 600.0, 380.0], 0),
        ([94.0, 1e3, 0.5, 2.5e-3, 1e-5], 1),
    ],
)
def test_a_collapse_is_said_once(kappas, said, caplog):
    watch = KappaWatch(512)
    with caplog.at_level(logging.WARNING):
        for step, kappa in enumerate(kappas, 1):
            watch.check(step, kappa, cos_theta=0.55)
    assert [record.event for record in caplog.records] == ["kappa_collapsed"] * said
    assert all(
        "step 3: kappa has collapsed to 5.0e-01" in message and "0.55 asks for 403" in message
        for message in caplog.messages
    )


def test_faces_that_have_nothing_to_do_with_their_centers_may_have_no_kappa(caplog):
    watch = KappaWatch(512)
    for kappa in (100.0, 1.0, 1e-3):
        watch.check(1, kappa, cos_theta=-0.01)
    assert not caplog.records
