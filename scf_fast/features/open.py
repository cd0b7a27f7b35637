import dataclasses
import logging
from pathlib import Path

from scf_fast.config import FeatureConfig
from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.features.store import CacheLayout, FeatureCache, cache_key, encoding_error, read_meta
from scf_fast.features.stream import FeatureStream
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.networks.families import identify_backbone
from scf_fast.networks.frozen import CHECK_IMAGES, DTYPES, FrozenBackbone, frozen_precisions
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler

log = logging.getLogger(__name__)
import torch
import torch.distributed as dist

_CPU_COMPILE_IMAGES = (
    50_000  # compiling takes about 12 s on a CPU core, and saves a quarter of a millisecond an image of ir_small
)


def pixel_convention(config: FeatureConfig, network: str, facts: dict) -> tuple[str, str]:
    """The pixel convention of a backbone's images, a name that scf_fast.pipelines.loading.base.Preprocessing knows, and
    in words where it is from.

    Args:
        network: a key of BACKBONES.
        facts: what the class centers' file notes, see :class:`scf_fast.weights.reading.Weights`.
    """
    if config.normalization is not None:
        return config.normalization, "as --normalization says"
    if "normalization" in facts:
        return facts["normalization"], "as noted in --saved_fc"
    return BACKBONES[network].normalization, f"as the {BACKBONES[network].family} family is trained with"


def open_stream(
    config: FeatureConfig, backbone_state: dict[str, torch.Tensor], source, sampler: EpochSampler, runtime: Runtime
) -> FeatureStream:
    """The stream that a configuration describes: backbone from ``backbone_state``, with the cache of
    ``--feature_cache``; collective.

    Raises:
        ValueError: the cache folder belongs to another backbone or data set, or the disk is too small for it.
    """
    name, z_dim = identify_backbone(backbone_state)
    backbone = Backbone(name, z_dim)
    backbone.load_state_dict(backbone_state)
    passes = 2 if config.feature_cache else config.epochs
    pays = runtime.device.type == "cuda" or passes * len(source) / runtime.world_size > _CPU_COMPILE_IMAGES

    def calibration() -> torch.Tensor:  # the same on every rank and after a resume, so that all settle on one precision
        sample = EpochSampler(len(source), min(CHECK_IMAGES, len(source)))
        preprocessing = Preprocessing(config.normalization, horizontal_flip=False)
        with make_loader(source, sample, preprocessing, backend="torch", num_workers=0, on_broken="replace") as loader:
            return next(loader.batches(0)).images

    precisions, cache = frozen_precisions(config.precision, runtime.device), None
    if config.feature_cache:
        cache, precision = _open_cache(config, backbone, backbone_state, source, precisions, calibration, runtime)
        precisions = (precision,)  # what is still missing is computed as the rest was
    frozen = FrozenBackbone(
        backbone,
        runtime.device,
        precisions,
        compile=pays if config.compile is None else config.compile,
        calibration=calibration,
        batch_size=sampler.global_batch_size // sampler.world_size,
    )
    return FeatureStream(
        lambda sampler, flip: image_loader(config, source, sampler, runtime, flip),
        sampler,
        source.labels,
        frozen,
        flip=config.flip,
        device=runtime.device,
        cache=cache,
    )


def _open_cache(config, backbone, backbone_state, source, precisions, calibration, runtime) -> tuple[FeatureCache, str]:
    """The cache, new or as it was left, and the precision that its rows are computed in; collective."""
    folder, architecture = Path(config.feature_cache), backbone.architecture
    layout = CacheLayout(
        len(source),
        backbone.z_dim,
        (architecture.widths[-1], architecture.map_size, architecture.map_size),
        config.cache_dtype,
    )
    if config.cache_budget:
        layout = dataclasses.replace(
            layout, num_images=min(len(source), int(config.cache_budget * 1e9 / layout.image_bytes))
        )
    if runtime.is_main:
        error = 0.0
        if (folder / "meta.json").exists():
            held = read_meta(folder)["key"]["precision"]
            acceptable = (
                DTYPES if config.precision == "auto" else precisions
            )  # each was found accurate before it was taken
            precision = held if held in acceptable else " or ".join(acceptable)
        else:
            frozen, images = FrozenBackbone(backbone, runtime.device, precisions), calibration().to(runtime.device)
            precision, error = frozen.choose(images), encoding_error(layout, *frozen(images))
        FeatureCache.create_or_check(
            folder, cache_key(backbone_state, source, config.normalization, precision), layout, error
        )
        meta = read_meta(folder)
        log.info(
            "feature cache: %s has room for %d of %d images in %s, %.2f GB; computed in %s, of which the dtype loses "
            "%.1e",
            folder,
            layout.num_images,
            len(source),
            layout.dtype,
            layout.total_bytes / 1e9,
            meta["key"]["precision"],
            meta["convf_error"],
        )
    dist.barrier()
    return FeatureCache.open(folder, layout, runtime.rank), read_meta(folder)["key"]["precision"]
