"""Opens the stream of features that a configuration describes, with its backbone and its cache."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from scf_fast import distributed
from scf_fast.config import FeatureConfig
from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.features.records import CacheLayout, encoding_error
from scf_fast.features.store import CacheKey, FeatureCache, read_meta
from scf_fast.features.stream import FeatureStream
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.networks.frozen import CHECK_IMAGES, FrozenBackbone, frozen_precisions
from scf_fast.networks.precision import PRECISION_DTYPES
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.sources.digest import sampled_digest
from scf_fast.weights.contents import Facts
from scf_fast.weights.digest import digest_weights
from scf_fast.weights.family_names import StateDict, identify_backbone

log = logging.getLogger(__name__)

# Compiling takes about 12 s on a CPU core, and saves a quarter of a millisecond for each image of ir_small.
_CPU_COMPILE_IMAGES = 50_000
_DIGEST_IMAGES = 64
_DIGEST_DIGITS = 16


def pixel_convention(config: FeatureConfig, network: str, facts: Facts) -> tuple[str, str]:
    """Returns the pixel convention of a backbone's images, a name that
    scf_fast.pipelines.loading.base.Preprocessing knows, and in words where it comes from.

    Args:
        network: a key of BACKBONES.
        facts: noted in the class centers' file, or beside the backbone.
    """
    if config.normalization is not None:
        return config.normalization, "as --normalization says"
    if facts.normalization is not None:
        return facts.normalization, f"as noted {'in --saved_fc' if config.saved_fc else 'with --saved_bkb'}"
    return BACKBONES[network].normalization, f"as the {BACKBONES[network].family} family is trained with"


def open_stream(
    config: FeatureConfig, backbone_state: StateDict, source: ImageSource, sampler: Sampler, runtime: Runtime
) -> FeatureStream:
    """Opens the stream that a configuration describes, with the cache of ``--feature_cache``; collective.

    Args:
        config: its pixel convention is settled.
    Raises:
        InputError: the cache folder belongs to another backbone or data set, or the disk is too small for it.
    """
    name, z_dim = identify_backbone(backbone_state)
    backbone = Backbone(name, z_dim)
    backbone.load_state_dict(backbone_state)
    passes = 2 if config.feature_cache else config.epochs
    pays = runtime.device.type == "cuda" or passes * len(source) / runtime.world_size > _CPU_COMPILE_IMAGES
    preprocessing = Preprocessing(_normalization(config), horizontal_flip=False)

    def calibration() -> torch.Tensor:  # the same on every rank and after a resume, so that all settle on one precision
        sample = EpochSampler(len(source), min(CHECK_IMAGES, len(source)))
        with make_loader(
            source,
            sample,
            preprocessing,
            backend="torch",
            num_workers=0,
            on_broken="replace",
            timeout=config.input_timeout,
        ) as loader:
            return next(loader.batches(0)).images

    precisions, cache = frozen_precisions(config.precision, runtime.device), None
    if config.feature_cache:
        cache, precision = _open_cache(config, backbone_state, backbone, source, precisions, calibration, runtime)
        precisions = (precision,)  # images that are still missing are computed as the others were
    frozen = FrozenBackbone(
        backbone,
        runtime.device,
        precisions,
        compile=pays if config.compile is None else config.compile,
        calibration=calibration,
        batch_size=sampler.global_batch_size // sampler.world_size,
        batch_sizes=8 if isinstance(sampler, PairSampler) else 4,  # no batch of groups is full, as a rule
    )
    return FeatureStream(
        lambda sampler, flip: image_loader(config, source, sampler, runtime, flip),
        sampler,
        source.labels,
        frozen,
        flip=config.flip,
        device=runtime.device,
        cache=cache,
        timeout=config.input_timeout,
    )


def cache_key(backbone_state: StateDict, source: ImageSource, normalization: str, precision: str) -> CacheKey:
    """Returns everything that decides the cached values: digests of the backbone's weights and of the data, pixel
    convention and arithmetic.

    The data are known by all labels and by the bytes of 64 images, spread evenly.
    """
    data = sampled_digest(source, images=_DIGEST_IMAGES)[:_DIGEST_DIGITS]
    return CacheKey(digest_weights(backbone_state)[:_DIGEST_DIGITS], data, normalization, precision)


def _open_cache(
    config: FeatureConfig,
    backbone_state: StateDict,
    backbone: Backbone,
    source: ImageSource,
    precisions: tuple[str, ...],
    calibration: Callable[[], torch.Tensor],
    runtime: Runtime,
) -> tuple[FeatureCache, str]:
    """Opens the cache, new or as it was left; returns it and the precision of its rows; collective."""
    folder, architecture = Path(str(config.feature_cache)), backbone.architecture
    shape = (architecture.widths[-1], architecture.map_size, architecture.map_size)
    layout = CacheLayout(len(source), backbone.z_dim, shape, config.cache_dtype)
    if config.cache_budget:
        affordable = int(config.cache_budget * 1e9 / layout.image_bytes)
        layout = dataclasses.replace(layout, num_images=min(len(source), affordable))
    meeting = distributed.current_meeting()
    makes_it = runtime.is_main if not config.feature_cache_local or meeting is None else meeting.is_first_on_node
    made: tuple[CacheKey, float] | None = None
    with distributed.shared_input_errors(runtime):
        if runtime.is_main:
            made = _make_cache(
                config, folder, layout, backbone_state, backbone, source, precisions, calibration, runtime
            )
    made = distributed.broadcast_from_main(made)  # all nodes compute in one precision
    assert made is not None, "the main rank has made it"
    with distributed.shared_input_errors(runtime):
        if makes_it and not runtime.is_main:
            FeatureCache.create_or_check(folder, made[0], layout, made[1])
    with distributed.shared_input_errors(runtime):
        return FeatureCache.open(folder, layout, runtime.rank, config.input_timeout), made[0].precision
    raise AssertionError("an error of any rank is every rank's")


def _make_cache(
    config: FeatureConfig,
    folder: Path,
    layout: CacheLayout,
    backbone_state: StateDict,
    backbone: Backbone,
    source: ImageSource,
    precisions: tuple[str, ...],
    calibration: Callable[[], torch.Tensor],
    runtime: Runtime,
) -> tuple[CacheKey, float]:
    """Makes the cache, or checks the one that is there, on the main rank; returns its key, with the precision of its
    rows, and what its dtype loses.
    """
    error = 0.0
    if (folder / "meta.json").exists():
        held = read_meta(folder).key.precision
        # Each of them was found accurate before it was taken.
        acceptable = PRECISION_DTYPES if config.precision == "auto" else precisions
        precision = held if held in acceptable else " or ".join(acceptable)
    else:
        frozen, images = FrozenBackbone(backbone, runtime.device, precisions), calibration().to(runtime.device)
        precision, error = frozen.choose(images), encoding_error(layout, *frozen(images))
    key = cache_key(backbone_state, source, _normalization(config), precision)
    FeatureCache.create_or_check(folder, key, layout, error)
    meta = read_meta(folder)
    log.info(
        "feature cache: %s%s has room for %d of %d images in %s, %.2f GB; computed in %s, of which the dtype loses "
        "%.1e",
        folder,
        ", on each node," if config.feature_cache_local else "",
        layout.num_images,
        len(source),
        layout.dtype,
        layout.total_bytes / 1e9,
        meta.key.precision,
        meta.convf_error,
    )
    return meta.key, meta.convf_error


def _normalization(config: FeatureConfig) -> str:
    assert config.normalization is not None, "the pixel convention is settled before the stream is opened"
    return config.normalization
