"""The criteria of the objectives: which kappa or variance fits, and the warning of one that has collapsed."""

import logging
import math
import re

import mpmath
import pytest
import scipy.optimize
import torch

from scf_fast.config import ConfidenceConfig
from scf_fast.objectives import Objective
from scf_fast.stages.criteria import CollapseWatch, PairShare, doubt_about, fitting_value, make_criterion


def psi(kappa, dim):
    v = mpmath.mpf(dim) / 2 - 1
    return mpmath.log(mpmath.besseli(v, kappa)) - v * mpmath.log(kappa)


def loss_at(objective, value, cosine, dim):
    """Of images that all have this cosine with their center, or with each other, and the same kappa or variance; with
    what does not depend on these left out.
    """
    if objective is Objective.SCF:
        return psi(value, dim) - value * cosine
    if objective is Objective.PFE_VMF:
        return 2 * psi(value, dim) - psi(value * mpmath.sqrt(2 + 2 * cosine), dim)
    variance = value if objective is Objective.SCF_GAUSSIAN else 2 * value
    return (1 - cosine) / variance + dim / 2 * mpmath.log(variance)


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("cosine, dim", [(0.05, 512), (0.5, 512), (0.9, 512), (0.4, 32)])
def test_the_fitting_value_has_the_lowest_loss(objective, cosine, dim):
    found = fitting_value(objective, cosine, dim)
    with mpmath.workdps(30):
        lowest = scipy.optimize.minimize_scalar(
            lambda log_value: float((loss_at(objective, mpmath.exp(log_value), cosine, dim)
                                     - loss_at(objective, mpmath.mpf(found), cosine, dim)) * 1e6),
            bracket=(math.log(found) - 0.3, math.log(found) + 0.2),
            tol=1e-6,
        )  # fmt: skip
    assert math.exp(lowest.x) == pytest.approx(found, rel=1e-4)


def test_the_table_of_fitting_values():
    """The mathematics section of the design notes, d = 512."""
    for cosine, pfe_vmf, scf, scf_gaussian in (
        (0.05, 120.7, 25.7, 269.5),
        (0.3, 400.5, 168.7, 365.7),
        (0.7, 1425.9, 701.8, 853.3),
        (0.99, 50844.6, 25422.1, 25600.0),
    ):
        assert fitting_value(Objective.PFE_VMF, cosine, 512) == pytest.approx(pfe_vmf, rel=4e-4)
        assert fitting_value(Objective.SCF, cosine, 512) == pytest.approx(scf, rel=2e-3)
        assert 1 / fitting_value(Objective.SCF_GAUSSIAN, cosine, 512) == pytest.approx(scf_gaussian, rel=2e-4)
        assert 1 / fitting_value(Objective.PFE, cosine, 512) == pytest.approx(2 * scf_gaussian, rel=2e-4)


@pytest.mark.parametrize(
    "objective, values, said",
    [
        (Objective.SCF, [1.0, 0.5, 3.0, 300.0], 0),  # from PyTorch's initialization up
        (Objective.SCF, [100.0, 5.0, 600.0, 380.0], 0),
        (Objective.SCF, [94.0, 1e3, 0.5, 2.5e-3, 1e-5], "kappa has collapsed to 5.0e-01, .* 0.55 asks for 403"),
        (Objective.PFE_VMF, [94.0, 1e3, 0.5, 2.5e-3], "kappa has collapsed to 5.0e-01, .* 0.55 asks for 842.9"),
        (Objective.PFE_VMF, [94.0, 10.0, 9.0], 0),
        (Objective.SCF_GAUSSIAN, [1.0, 1e-3, 1.7e-5, 1e-6], "variance has collapsed to 1.7e-05, .* asks for 0.001758"),
        (Objective.PFE, [9e-4, 1e-3, 1.2e-6], "variance has collapsed to 1.2e-06, .* asks for 0.0008789"),
        (Objective.PFE, [1.0, 1e-4, 9e-6], 0),
        (Objective.SCF, [94.0, 600.0, 1e18, 1e19], "kappa has diverged to 1.0e.18, .* 0.55 asks for 403"),
        (Objective.PFE_VMF, [94.0, 900.0, 9e5, 1e-5], "kappa has diverged to 9.0e.05, .* 0.55 asks for 842.9"),
    ],
)
def test_a_collapse_is_said_once(objective, values, said, caplog):
    watch = CollapseWatch(objective, 512)
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate(values, 1):
            watch.check(step, value, cosine=0.55)
    assert len(caplog.records) == bool(said)
    if said:
        name, _, what = said.split()[:3]
        assert caplog.records[0].event == f"{name}_{what}"
        assert re.match(f"step 3: {said}", caplog.messages[0])


def test_faces_that_have_nothing_to_do_with_their_centers_may_have_no_kappa(caplog):
    for objective in (Objective.SCF, Objective.PFE_VMF):
        watch = CollapseWatch(objective, 512)
        for kappa in (100.0, 1.0, 1e-3):
            watch.check(1, kappa, cosine=-0.01)
    assert not caplog.records


@pytest.mark.parametrize("variance", ["scalar", "diagonal"])
def test_pairs_count_by_their_share(variance):
    """Two micro-batches of unequal size average to the means over all pairs and all images."""
    config = ConfidenceConfig(
        data="d", output_dir="o", saved_bkb="b", objective=("pfe",), variance=variance, pair_batch=(2, 2)
    )
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, generator=generator)
    log_variance = torch.randn(5, *([8] * (variance == "diagonal")), generator=generator) / 4 - 3
    labels, pairs, images = torch.tensor([0, 0, 1, 1, 1]), torch.tensor(4.0), 5
    criterion = make_criterion(Objective.PFE, config, 8, None)
    share = PairShare(2 / pairs, torch.tensor(2 / images), pairs)
    results = [
        criterion.loss(features[rows], log_variance[rows], labels[rows], share) for rows in (slice(2), slice(2, 5))
    ]
    mu, v = torch.nn.functional.normalize(features).double(), log_variance.double().exp().reshape(5, -1).expand(5, 8)
    expected = []
    for a, b in ((0, 1), (2, 3), (2, 4), (3, 4)):
        total = v[a] + v[b]
        expected.append(((mu[a] - mu[b]) ** 2 / total + (2 * math.pi * total).log()).sum() / 2)
    mean = sum(result.loss for result in results).item() / 2
    assert mean == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    cosines = mu @ mu.T
    of_rows = [cosines[0, 1], cosines[1, 0]]
    of_rows += [(cosines[a, b] + cosines[a, c]) / 2 for a, b, c in ((2, 3, 4), (3, 2, 4), (4, 2, 3))]
    wanted = {
        "precision": (1 / v).mean(),
        "variance": v.mean(),
        "pair_cos": torch.stack(of_rows).mean(),
        "pairs": pairs,
    }
    for name, value in wanted.items():
        assert sum(result.metrics[name] for result in results).item() / 2 == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize(
    ("kappa", "said"),
    [
        ([1e-4, 1e-5, 50.0], "2 of 3 images .* outside 0.001 to 1e.08"),
        ([1e18, 1e18, 1e18], "3 of 3 images"),
        ([float("nan"), 1e9, 3.0], "2 of 3 images"),
        ([90.0, 90.0, 90.0], "all images have the same"),
        ([90.0, 100.0, 1e9], None),
        ([7.0], None),
    ],
)
def test_models_that_mean_nothing_are_doubted(kappa, said):
    found = doubt_about(torch.tensor(kappa))
    assert found is None if said is None else re.match(said, found)
