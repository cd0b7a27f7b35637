"""Class centers as mean directions: the maximum-likelihood estimate for each identity from its images.

    center_c = s_c / |s_c|,   s_c = sum of x / |x| over the features x of the images of identity c
                              and, unless --no_flip, of their mirror images

This is the estimate of mu of a von Mises-Fisher distribution (Mardia and Jupp, Directional Statistics, section 10.3).
The centers that a margin softmax trains are others: their own images pull at them by how badly they fit, and the other
identities push. The sums are float64, 8 C D bytes on each rank's device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from scf_fast.errors import InputError
from scf_fast.features.feature_pass import FeaturePass
from scf_fast.features.stream import FeatureBatch, FeatureStream
from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler

_NAMED = 5  # identities in a message


@dataclass(frozen=True)
class MeanDirections:
    """The class centers of a data set, and how its images lie around them."""

    centers: torch.Tensor  # (C, D) float32, unit rows
    cosine: float  # mean cosine of an image, or of its mirror image, with its center
    broken: int  # images that were left out


def compute_mean_directions(inputs: FeaturePass) -> MeanDirections | None:
    """Computes the class centers of a data set; collective, and joins the group of ranks.

    Returns:
        The class centers on the main rank, None on the others.
    Raises:
        InputError: the data have no identities, one of them has no usable image, or the feature cache belongs to
            something else.
    """
    source = inputs.source
    if source.num_classes == 0:
        raise InputError(f"--data {inputs.config.data}: must have identities; give labeled images")
    check_all_have_images(np.bincount(source.labels, minlength=source.num_classes))
    orientations = 2 if inputs.config.flip else 1
    # As many epochs as orientations: the stream compiles the backbone if the images are worth it.
    inputs.config = dataclasses.replace(inputs.config, epochs=orientations)
    runtime, size = inputs.start()
    sampler = BothOrientations(len(source), size, runtime.rank, runtime.world_size)
    with (
        inputs.open_stream(sampler, runtime) as stream,
        tqdm(
            total=orientations * len(source),
            unit="img",
            unit_scale=True,
            desc="class centers",
            disable=not runtime.is_main,
        ) as bar,
    ):
        batches = batches_with_positions(stream, sampler, orientations, bar.update)
        sums, counts = sum_directions(batches, source.num_classes, inputs.network[1], runtime.device)
    centers = normalize_sums(sums, counts)
    if not runtime.is_main:
        return None
    cosine = float(torch.linalg.vector_norm(sums, dim=1).sum() / counts.sum())
    return MeanDirections(centers.cpu(), cosine, len(source) - int(counts.sum()) // orientations)


class BothOrientations(EpochSampler):
    """Every image in the order of the data set, in epoch 0 as it is and in epoch 1 mirrored."""

    def __init__(self, num_samples: int, global_batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(
            num_samples, global_batch_size, rank=rank, world_size=world_size, shuffle=False, last_batch="partial"
        )

    def flips(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), epoch == 1)


def batches_with_positions(
    stream: FeatureStream, sampler: Sampler, epochs: int, report: Callable[[int], object]
) -> Iterator[tuple[FeatureBatch, np.ndarray]]:
    """Yields every batch of the epochs with the (B,) positions of its images that the sampler asked for; reports how
    many images each has on all ranks.
    """
    for epoch in range(epochs):
        for number, batch in enumerate(stream.batches(epoch)):
            yield batch, sampler.indices(epoch, number)
            report(min(sampler.global_batch_size, sampler.num_samples - number * sampler.global_batch_size))


def sum_directions(
    batches: Iterable[tuple[FeatureBatch, np.ndarray]], num_classes: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds up the unit directions of each identity; collective in a process group, where every rank gets the sums over
    all ranks.

    Args:
        batches: of :func:`batches_with_positions`. An image that replaces a broken one is left out, since it also comes
            under its own position.
        num_classes: C.
        dim: D.
    Returns:
        (C, D) float64 sums, and (C,) int64, how many directions each of them has.
    """
    sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for batch, asked in batches:
        own = torch.from_numpy(np.flatnonzero(batch.indices.numpy() == asked)).to(device, non_blocking=True)
        labels = batch.labels[own]
        sums.index_add_(0, labels, F.normalize(batch.features[own].double()))
        counts.index_add_(0, labels, torch.ones_like(labels))
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    return sums, counts


def normalize_sums(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns (C, D) float32 unit class centers from the result of :func:`sum_directions`.

    Raises:
        InputError: an identity has no image, or its features are not finite or cancel out; the message names the first
            ones.
    """
    check_all_have_images(counts.cpu().numpy())
    bad = torch.nonzero(~(sums.isfinite().all(dim=1) & sums.any(dim=1)))[:, 0].tolist()
    if bad:
        raise InputError(
            f"the features of an identity must be finite and not cancel out; those of {_some(bad, len(sums))} are not "
            "so; see whether the backbone's training diverged"
        )
    return F.normalize(sums).float()


def check_all_have_images(counts: np.ndarray) -> None:
    """Checks that none of the (C,) counts is 0.

    Raises:
        InputError: one is; the message names the identities.
    """
    empty = np.flatnonzero(counts == 0).tolist()
    if empty:
        raise InputError(
            f"every identity must have an image that can be read; {_some(empty, len(counts))} have none; "
            "give all the images that there are, or number the identities without gaps"
        )


def _some(identities: Sequence[int], of: int) -> str:
    named = ", ".join(map(str, identities[:_NAMED]))
    return f"{len(identities)} of {of} ({named}{', ...' if len(identities) > _NAMED else ''})"
