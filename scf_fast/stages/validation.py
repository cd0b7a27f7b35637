"""Validation of stage 2: people that training has left out."""

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from scf_fast.distributed import Runtime, broadcast_from_main
from scf_fast.errors import InputError
from scf_fast.features.stream import FeatureBatch, FeatureStream
from scf_fast.held_out import Held, measure
from scf_fast.objectives import Density
from scf_fast.stages.base import VALIDATION_LOSS
from scf_fast.stages.criteria import Criterion

log = logging.getLogger(__name__)

_Part = tuple[np.ndarray, np.ndarray, np.ndarray, float]  # mu, kappa, labels, sum of the losses


def measure_people(
    stream: FeatureStream,
    predict: Callable[[FeatureBatch], tuple[torch.Tensor, ...]],
    criteria: dict[str, Criterion],
    runtime: Runtime,
) -> dict[str, float]:
    """Passes over the images of people held out and measures each net on them; collective, the same on every rank.

    The loss is the training loss, against the class centers; everything else goes by the images alone, see
    :mod:`scf_fast.held_out`.

    Args:
        stream: of the images held out, each once; the features of a rank are kept in host memory.
        predict: what each net says of a batch, in the order of ``criteria``.
    Returns:
        By name, ``validation/loss`` among it: the sum over the objectives.
    """
    parts: dict[str, list[_Part]] = {name: [] for name in criteria}
    for batch in stream.batches(0):
        predicted = predict(batch)  # of no images too: under ZeRO 3 all ranks take part
        if not len(batch.labels):
            continue
        mu = torch.nn.functional.normalize(batch.features.float()).cpu().numpy()
        for (name, criterion), parameter in zip(criteria.items(), predicted, strict=True):
            result = criterion.loss(batch.features, parameter, batch.labels, None)
            (confidence,) = result.distributions.values()
            loss = result.loss.item() * len(batch.labels)
            parts[name].append((mu, confidence.double().cpu().numpy(), batch.labels.cpu().numpy(), loss))
    gathered: list[dict[str, list[_Part]] | None] = [None] * runtime.world_size
    dist.gather_object(parts, gathered if runtime.is_main else None)
    found: dict[str, float] = {}
    if runtime.is_main:
        for name, criterion in criteria.items():
            own = [part for rank in gathered if rank is not None for part in rank[name]]
            values = _measured(own, criterion)
            found[VALIDATION_LOSS] = found.get(VALIDATION_LOSS, 0.0) + values["loss"]
            prefix = f"{name}/" if len(criteria) > 1 else ""
            found |= {f"{prefix}validation/{key}": value for key, value in values.items() if prefix or key != "loss"}
    return broadcast_from_main(found)


def _measured(parts: list[_Part], criterion: Criterion) -> dict[str, float]:
    mu, kappa, labels = (np.concatenate([part[column] for part in parts]) for column in range(3))
    values = {"loss": sum(part[3] for part in parts) / len(labels)}
    if not (np.isfinite(kappa) & (kappa > 0)).all():
        return values
    try:
        measures = measure(Held(mu, kappa, labels), criterion.objective.density is Density.VMF)
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
