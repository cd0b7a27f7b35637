"""Validation of stage 2: people that training has left out."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from scf_fast.distributed import Runtime, broadcast_from_main
from scf_fast.errors import InputError
from scf_fast.held_out import Held, measure
from scf_fast.objectives import Density
from scf_fast.stages.base import VALIDATION_LOSS
from scf_fast.stages.criteria import Criterion, PairShare

log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")


class Prediction(NamedTuple):
    """What the nets say of one rank's share of a batch of B images.

    Attributes:
        features: (B, d), unnormalized.
        parameters: of each net: log kappa or log variances.
        labels: (B,) int64, as :meth:`Criterion.loss` takes them.
        people: (B,) int64, the person of each image.
        share: for pairs, of their sum; else None.
    """

    features: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    people: torch.Tensor
    share: PairShare | None


class _Part(NamedTuple):
    """One batch of one rank as one net sees it."""

    mu: np.ndarray
    kappa: np.ndarray
    people: np.ndarray
    loss: float  # summed over images, or over pairs
    samples: float  # images, or pairs


def measure_people(
    batches: Iterable[_Batch],
    predict: Callable[[_Batch], Prediction],
    criteria: dict[str, Criterion],
    runtime: Runtime,
) -> dict[str, float]:
    """Passes over the images of people held out and measures each net on them; collective, the same on every rank.

    The loss is the training loss, against the class centers or over genuine pairs; everything else goes by the images
    alone, see :mod:`scf_fast.held_out`.

    Args:
        batches: of the images held out, each once; the features of a rank are kept in host memory.
        predict: what the nets say of a batch, in the order of ``criteria``; called on all ranks as often, also with a
            share of no images.
    Returns:
        By name, ``validation/loss`` among it: the sum over the objectives.
    """
    parts: dict[str, list[_Part]] = {name: [] for name in criteria}
    for batch in batches:
        found = predict(batch)  # of no images too: under ZeRO 3 all ranks take part
        if not len(found.labels):
            continue
        mu, people = torch.nn.functional.normalize(found.features.float()).cpu().numpy(), found.people.cpu().numpy()
        for (name, criterion), parameter in zip(criteria.items(), found.parameters, strict=True):
            result = criterion.loss(found.features, parameter, found.labels, found.share)
            (confidence,) = result.distributions.values()
            count = float(len(found.labels) if found.share is None else found.share.pairs)
            loss = result.loss.item() * (count if found.share is None else 1.0)
            parts[name].append(_Part(mu, confidence.double().cpu().numpy(), people, loss, count))
    gathered: list[dict[str, list[_Part]] | None] = [None] * runtime.world_size
    dist.gather_object(parts, gathered if runtime.is_main else None)
    values_of: dict[str, float] = {}
    if runtime.is_main:
        for name, criterion in criteria.items():
            own = [part for rank in gathered if rank is not None for part in rank[name]]
            values = _measured(own, criterion)
            values_of[VALIDATION_LOSS] = values_of.get(VALIDATION_LOSS, 0.0) + values["loss"]
            prefix = f"{name}/" if len(criteria) > 1 else ""
            values_of |= {
                f"{prefix}validation/{key}": value for key, value in values.items() if prefix or key != "loss"
            }
    return broadcast_from_main(values_of)


def _measured(parts: list[_Part], criterion: Criterion) -> dict[str, float]:
    mu, kappa, people = (np.concatenate([part[column] for part in parts]) for column in range(3))
    values = {"loss": sum(part.loss for part in parts) / sum(part.samples for part in parts)}
    if not (np.isfinite(kappa) & (kappa > 0)).all():
        return values
    try:
        measures = measure(Held(mu, kappa, people), criterion.objective.density is Density.VMF)
    except InputError as error:  # of an untrained backbone, for one; training goes on
        log.warning("validation: %s", error)
        return values
    values |= {"spearman": measures.spearman, "reject_area": measures.reject_area}
    if measures.reliability is not None:
        values |= {"reliability_error": measures.reliability.error, "kappa_factor": measures.reliability.factor}
        log.info("validation: mean cosine with the own center by decile of kappa")
        for line in measures.reliability.lines():
            log.info("%s", line)
    return values
