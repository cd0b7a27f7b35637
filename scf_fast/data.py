"""Data of a run as its configuration describes them: source, sampler, loader."""

from pathlib import Path

import numpy as np
import torch

from scf_fast.config import ConfidenceConfig, Config
from scf_fast.distributed import Runtime, decoding_workers
from scf_fast.errors import InputError
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.augmentation import PRESETS
from scf_fast.pipelines.loading.base import Loader, Preprocessing
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler
from scf_fast.pipelines.sampling.selection import Mixture, Only, PerIdentity, hold_out_people
from scf_fast.pipelines.sources.base import ImageSource

_BLOCK_IMAGES = 256  # neighbors read in one go by --shuffle block: 2 MB of faces


def open_data(config: Config) -> ImageSource:
    """Opens the images at ``--data``, or where ``--dataset`` has them.

    Raises:
        InputError: nothing is there, or nothing of a known kind.
    """
    if config.dataset and not Path(config.data).exists():
        raise InputError(
            f"--dataset {config.dataset}: there is no {config.data}; give --dataroot, the folder that holds "
            f"list/{config.dataset}_list.txt, or the data set itself as --data"
        )
    return open_source(list(config.data_sets), config.dataroot, config.index_dir)


def epoch_sampler(config: Config, source: ImageSource, rank: int, world_size: int) -> EpochSampler | PairSampler:
    """Returns the sampler of this rank: which images an epoch has, and in which order.

    Raises:
        InputError: the choice does not fit the data, or an epoch fills no batch.
    """
    if isinstance(config, ConfidenceConfig) and config.pair_batch is not None:
        try:
            return PairSampler(
                source.labels,
                *config.pair_batch,
                rank=rank,
                world_size=world_size,
                seed=config.seed,
                chosen=~held_out_images(config, source) if config.validation else None,
            )
        except InputError as error:
            named = ",".join(map(str, config.pair_batch))
            raise InputError(f"--data {config.data}, --pair_batch {named}: {error}") from None
    selection: Mixture | PerIdentity | Only | None = None
    if config.data_weights:
        sizes = source.sizes
        if len(sizes) != len(config.data_weights):
            raise InputError(
                f"--data_weights must have one number for each data set of --data, got {len(config.data_weights)} for "
                f"{len(sizes)}"
            )
        selection = Mixture(sizes, config.data_weights)
    elif config.images_per_identity or config.max_images_per_identity:
        selection = PerIdentity(
            source.labels,
            config.images_per_identity or config.max_images_per_identity,
            exactly=config.images_per_identity > 0,
        )
    elif isinstance(config, ConfidenceConfig) and config.validation:
        selection = Only(~held_out_images(config, source))
    size = len(source) if selection is None else selection.size
    if size < config.batch_size:
        raise InputError(
            f"--batch_size {config.batch_size} is more than the {size} images of an epoch of {config.data}"
        )
    return EpochSampler(
        len(source),
        config.batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        selection=selection,
        block_size=_BLOCK_IMAGES if config.shuffle == "block" else 0,
    )


def held_out_images(config: ConfidenceConfig, source: ImageSource) -> np.ndarray:
    """Returns which images are of people that ``--validation`` holds out, (N,) bool.

    Raises:
        InputError: there are too few people, or fewer than two of those held out have two images.
    """
    try:
        held_out = hold_out_people(source.labels, config.validation, config.seed)
    except InputError as error:
        raise InputError(f"--validation {config.validation:g}: {error}") from None
    _, counts = np.unique(source.labels[held_out], return_counts=True)
    if (counts > 1).sum() < 2:
        raise InputError(
            f"--validation {config.validation:g}: {(counts > 1).sum()} of the {len(counts)} people held out have two "
            "images; hold out more people"
        )
    return held_out


def held_out_sampler(
    config: ConfidenceConfig, source: ImageSource, rank: int, world_size: int
) -> EpochSampler | PairSampler:
    """Returns the sampler of this rank over the images that ``--validation`` holds out: each once and in order, or for
    pairs in the groups of one epoch.
    """
    chosen = held_out_images(config, source)
    if config.pair_batch is not None:
        return PairSampler(
            source.labels,
            *config.pair_batch,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            last_batch="partial",
            chosen=chosen,
        )
    return EpochSampler(
        len(source),
        config.batch_size,
        rank=rank,
        world_size=world_size,
        shuffle=False,
        last_batch="partial",
        selection=Only(chosen),
    )


def describe_groups(sampler: Sampler) -> str | None:
    """Returns what an epoch has of pairs of a person, in words; None where batches have no groups."""
    if not isinstance(sampler, PairSampler):
        return None
    return (
        f"groups of a person: {sampler.num_groups} of {sampler.num_shown} images an epoch; "
        f"{sampler.left_out} images are left out, the only ones of their person"
    )


def image_loader(config: Config, source: ImageSource, sampler: Sampler, runtime: Runtime, flip: bool) -> Loader:
    """Returns the loader of normalized float32 faces on this rank's device."""
    assert config.normalization is not None, "the stage settles it"
    preprocessing = Preprocessing(config.normalization, horizontal_flip=flip, augmentation=PRESETS[config.augmentation])
    return make_loader(
        source,
        sampler,
        preprocessing,
        device=runtime.device,
        dtype=torch.float32,
        backend=config.loader,
        num_workers=decoding_workers(config.num_workers),
        on_broken=config.on_broken,
        timeout=config.input_timeout,
    )
