"""Speed of the losses of the published table at d = 512, forward and backward in what the confidence net predicts:
ours, plain PyTorch, and that compiled.

    python -m bench.suite --sections objective_losses

Batches for pairs have groups of four rows of one person, as PFE's sampler deals them; ours are not told so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.baselines import objectives as plain
from bench.baselines.compiled import compiled_scf_loss
from bench.baselines.eager import eager_scf_loss
from bench.kernels.scf_loss import DIM, MS1M, Batch, Loss, forward_backward, fresh_class_centers
from bench.measuring import roofline
from bench.measuring.case import Case
from bench.measuring.timing import Buffers, buffer_count
from scf_fast.kernels import gaussian_center_loss, pair_likelihood_loss, reference, scf_loss

BATCHES = (256, 1024, 4096)


@dataclass(frozen=True)
class Objective:
    """A loss and who computes it.

    Attributes:
        exact: the formula in float64.
        ways: {way: loss}, each a scalar of (features, parameter, class_centers, labels).
        log_parameter: mean of the parameter in the batches.
        diagonal: whether there is a parameter for each dimension.
        of_pairs: whether rows are compared with each other, not with class centers.
    """

    exact: Loss
    ways: dict[str, Loss]
    log_parameter: float
    diagonal: bool = False
    of_pairs: bool = False


_PAIR_LOSS: dict[str, Loss] = {
    "scf_fast": lambda x, p, w, y: pair_likelihood_loss(x, p, y, "gaussian"),
    "eager": plain.eager_pair_likelihood_loss,
    "compiled": plain.compiled_pair_likelihood_loss,
}


def _exact_pair_loss(x: torch.Tensor, p: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return reference.pair_likelihood_loss(x, p, y, "gaussian")


OBJECTIVES = {
    "SCF": Objective(
        lambda x, p, w, y: reference.scf_loss(x, p, w, y).mean(),
        {
            "scf_fast": lambda x, p, w, y: scf_loss(x, p, w, y),
            "eager": lambda x, p, w, y: eager_scf_loss(x, p, w, y).mean(),
            "compiled": lambda x, p, w, y: compiled_scf_loss(x, p, w, y).mean(),
        },
        6.0,
    ),
    "SCF-G": Objective(
        lambda x, p, w, y: reference.gaussian_center_loss(x, p, w, y).mean(),
        {
            "scf_fast": lambda x, p, w, y: gaussian_center_loss(x, p, w, y),
            "eager": plain.eager_gaussian_center_loss,
            "compiled": plain.compiled_gaussian_center_loss,
        },
        -6.0,
    ),
    "PFE-G, scalar": Objective(_exact_pair_loss, _PAIR_LOSS, -7.0, of_pairs=True),
    "PFE-G, diagonal": Objective(_exact_pair_loss, _PAIR_LOSS, -7.0, diagonal=True, of_pairs=True),
    "PFE-v": Objective(
        lambda x, p, w, y: reference.pair_likelihood_loss(x, p, y),
        {
            "scf_fast": lambda x, p, w, y: pair_likelihood_loss(x, p, y),
            "eager": plain.eager_vmf_pair_loss,
            "compiled": plain.compiled_vmf_pair_loss,
        },
        6.0,
        of_pairs=True,
    ),
}


def fresh_batches(objective: Objective, batch: int, class_centers: torch.Tensor) -> list[Batch]:
    """Returns input sets of a loss: features at a cosine of about 0.7 to their class center, and the parameter, which
    alone asks for a gradient.
    """
    device = class_centers.device
    batches = []
    for _ in range(buffer_count(4 * batch * DIM)):
        if objective.of_pairs:
            people = torch.randperm(len(class_centers), device=device)[: batch // plain.GROUP]
            labels = people.repeat_interleave(plain.GROUP)
        else:
            labels = torch.randint(len(class_centers), (batch,), device=device)
        centers = torch.nn.functional.normalize(class_centers[labels], dim=1)
        features = torch.randn(batch, DIM, device=device).add_(centers, alpha=DIM**0.5)
        parameter = torch.empty((batch, DIM) if objective.diagonal else (batch,), device=device)
        parameter.normal_(objective.log_parameter, 0.5).requires_grad_()
        batches.append((features, parameter, class_centers, labels))
    return batches


def check(objective: Objective, way: str, batch: Batch) -> None:
    """Refuses to time a loss that differs, in value or gradient, from the formula in float64.

    Raises:
        AssertionError: it differs.
    """
    features, parameter, class_centers, labels = batch
    features, parameter, labels = features[:256], parameter[:256].detach(), labels[:256]
    leaf, exact = parameter.clone().requires_grad_(), parameter.double().requires_grad_()
    loss = objective.ways[way](features, leaf, class_centers, labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    rows = labels if objective.of_pairs else torch.arange(len(labels), device=labels.device)
    expected = objective.exact(features.double(), exact, class_centers[labels].double(), rows)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4 * float(expected_gradient.abs().max())
    )


def prepare(
    objective: Objective, way: str, batch: int, classes: int, device: torch.device | str
) -> tuple[Callable, Buffers]:
    batches = fresh_batches(objective, batch, fresh_class_centers(classes, device))
    check(objective, way, batches[0])
    return partial(forward_backward, objective.ways[way]), batches


def cases(device: torch.device | str, tiny: bool = False) -> list[Case]:
    """Returns a case for every loss, batch size and way."""
    classes = 100 if tiny else MS1M
    return [
        Case(
            f"{name}, forward_backward, B = {batch}",
            way,
            partial(prepare, objective, way, batch, classes, device),
            roofline.objective(batch, DIM, objective.of_pairs, objective.diagonal),
            (batch, "images"),
            {"batch": batch, "classes": classes, "dim": DIM, "dtype": "float32"},
        )
        for name, objective in OBJECTIVES.items()
        for batch in ((32,) if tiny else BATCHES)
        for way in objective.ways
    ]
