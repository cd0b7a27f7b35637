"""Class centers of a backbone whose own are lost, from images of its identities: stage 2 needs them, and released
backbones come without.

    center_c = s_c / |s_c|,   s_c = sum of x / |x| over the features x of the images of identity c and, unless --no_flip, of their mirror images

This mean direction is the maximum-likelihood estimate of mu of a von Mises-Fisher distribution (Mardia and Jupp,
Directional Statistics, section 10.3). The centers that a margin softmax trains are others: their own images pull at
them by how badly they fit, the other identities push.

``python -m scf_fast.centers_from_data`` computes them; the sums are float64, 8 C D bytes on each rank's device.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from scf_fast import distributed
from scf_fast.errors import InputError
from scf_fast.features.feature_pass import FeaturePass
from scf_fast.features.open import open_stream
from scf_fast.features.stream import FeatureBatch, FeatureStream
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.weights import reading, writing

_NAMED = 5  # identities in a message


class BothOrientations(EpochSampler):
    """Every image in the order of the data set, in epoch 0 as it is and in epoch 1 mirrored."""

    def __init__(self, num_samples: int, global_batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(
            num_samples, global_batch_size, rank=rank, world_size=world_size, shuffle=False, last_batch="partial"
        )

    def flips(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), epoch == 1)


def batches_with_positions(
    stream: FeatureStream, sampler: EpochSampler, epochs: int, report: Callable[[int], object]
) -> Iterator[tuple[FeatureBatch, np.ndarray]]:
    """Every batch of the epochs with the (B,) positions of its images that the sampler asked for; reports how many
    images each has on all ranks.
    """
    for epoch in range(epochs):
        for number, batch in enumerate(stream.batches(epoch)):
            yield batch, sampler.indices(epoch, number)
            report(min(sampler.global_batch_size, sampler.num_samples - number * sampler.global_batch_size))


def sum_directions(
    batches: Iterator[tuple[FeatureBatch, np.ndarray]], num_classes: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the unit directions of each identity, and of how many; collective in a process group, where every rank
    gets those of all.

    Args:
        batches: of :func:`batches_with_positions`. An image that stands in for a broken one is left out, since it is
            there on its own account.
        num_classes: C.
        dim: D.
    Returns:
        (C, D) float64, (C,) int64.
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


def mean_directions(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(C, D) float32 unit class centers from what :func:`sum_directions` gives.

    Raises:
        ValueError: an identity has no image, or its features are not finite or cancel out; the message names the first
            ones.
    """
    check_all_have_images(counts.cpu().numpy())
    bad = torch.nonzero(~(sums.isfinite().all(dim=1) & sums.any(dim=1)))[:, 0].tolist()
    if bad:
        raise InputError(
            f"the features of an identity must be finite and not cancel out; those of {_some(bad, len(sums))} are not "
            "so; "
            "see whether the backbone's training diverged"
        )
    return F.normalize(sums).float()


def check_all_have_images(counts: np.ndarray) -> None:
    """Raises:
    ValueError: one of the (C,) counts is 0; the message names the identities.
    """
    empty = np.flatnonzero(counts == 0).tolist()
    if empty:
        raise InputError(
            f"every identity must have an image that can be read; {_some(empty, len(counts))} have none; "
            "give all the images that there are, or number the identities without gaps"
        )


def _some(identities: list[int], of: int) -> str:
    return f"{len(identities)} of {of} ({', '.join(map(str, identities[:_NAMED]))}{', ...' if len(identities) > _NAMED else ''})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.centers_from_data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        allow_abbrev=False,
        usage="%(prog)s --data DATA --saved_bkb FILE --output fc.pth [flags of train.py: --feature_cache, "
        "--precision, --normalization, --no_flip ...]",
        epilog="Also under the deepspeed launcher or torchrun. With --feature_cache each image is decoded once, and "
        "stage 2 finds the cache filled.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="where the class centers go; --saved_fc of stage 2"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    options, flags = parser.parse_known_args(arguments)
    try:
        _compute(options.output, options.overwrite, flags)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        distributed.finish()
    return 0


def _compute(output: Path, overwrite: bool, flags: list[str]) -> None:
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; give another name, or --overwrite")
    inputs = FeaturePass(flags, output.parent)
    config, source = inputs.config, inputs.source
    config.epochs = 2 if config.flip else 1
    if source.num_classes == 0:
        raise InputError(f"--data {config.data}: must have identities; give labeled images")
    check_all_have_images(np.bincount(source.labels, minlength=source.num_classes))
    runtime, size = inputs.start()
    sampler = BothOrientations(len(source), size, runtime.rank, runtime.world_size)
    with (
        open_stream(config, inputs.backbone.backbone, source, sampler, runtime) as stream,
        tqdm(
            total=config.epochs * len(source),
            unit="img",
            unit_scale=True,
            desc="class centers",
            disable=not runtime.is_main,
        ) as bar,
    ):
        batches = batches_with_positions(stream, sampler, config.epochs, bar.update)
        sums, counts = sum_directions(batches, source.num_classes, inputs.backbone.network()[1], runtime.device)
    centers = mean_directions(sums, counts)
    if runtime.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
        writing.write(
            reading.Weights(str(output), class_centers=centers.cpu(), facts={"normalization": config.normalization}),
            output,
        )
        broken = config.epochs * len(source) - int(counts.sum())
        cosine = float(torch.linalg.vector_norm(sums, dim=1).sum() / counts.sum())
        print(
            f"{output}: class centers of {source.num_classes} identities; mean cosine of an image with its center "
            f"{cosine:.3f}" + (f"; {broken // config.epochs} broken images left out" if broken else "")
        )


if __name__ == "__main__":
    distributed.leave(main())
