"""Passes over a data set that compute features and train nothing, for the commands beside training."""

import dataclasses

from tqdm import tqdm

from scf_fast import distributed
from scf_fast.command import print_lines
from scf_fast.config import FeatureConfig
from scf_fast.data import open_data
from scf_fast.distributed import Runtime
from scf_fast.errors import InputError
from scf_fast.features.open import open_stream, pixel_convention
from scf_fast.features.stream import FeatureStream
from scf_fast.pipelines.sampling.sampler import EpochSampler, Sampler
from scf_fast.weights.contents import Facts
from scf_fast.weights.reading import read_noted_facts, read_weights


class FeaturePass:
    """The inputs of a pass, checked before :meth:`start` forms the group of ranks.

    Args:
        config: of a pass over ``data`` with the backbone in ``saved_bkb``.
    Attributes:
        config: the same, with the pixel convention settled.
        source: the images.
        backbone: Weights of ``saved_bkb``.
        network: name and embedding width of the backbone.
    Raises:
        InputError: data or weights that cannot be used.
    """

    def __init__(self, config: FeatureConfig):
        self.source, self.backbone = open_data(config), read_weights(config.saved_bkb, "--saved_bkb")
        self.network = self.backbone.network()
        facts = Facts()
        if config.saved_fc:
            facts = read_weights(config.saved_fc, "--saved_fc").facts
        elif config.normalization is None:
            facts = read_noted_facts(self.backbone, config.saved_bkb)
        normalization, self._origin = pixel_convention(config, self.network[0], facts)
        self.config = dataclasses.replace(config, normalization=normalization)

    def start(self) -> tuple[Runtime, int]:
        """Joins the group; returns the runtime and the images of a global batch, of which each rank has as many."""
        runtime = distributed.start()
        if runtime.is_main:
            print_lines(f"pixels: {self.config.normalization}, {self._origin}")
        return runtime, max(min(self.config.batch_size, len(self.source)) // runtime.world_size, 1) * runtime.world_size

    def open_stream(self, sampler: Sampler, runtime: Runtime) -> FeatureStream:
        """Opens the features of the sampler's images, with the cache of the configuration; collective."""
        return open_stream(self.config, self.backbone.require_backbone(), self.source, sampler, runtime)


def fill_cache(inputs: FeaturePass) -> None:
    """Computes the features of all images into the feature cache of the configuration; collective, and joins the group.

    Raises:
        InputError: the cache belongs to something else, or cannot be written.
    """
    source = inputs.source
    runtime, size = inputs.start()
    sampler = EpochSampler(
        len(source), size, rank=runtime.rank, world_size=runtime.world_size, shuffle=False, last_batch="partial"
    )
    with (
        inputs.open_stream(sampler, runtime) as stream,
        tqdm(total=len(source), unit="img", unit_scale=True, desc="features", disable=not runtime.is_main) as bar,
    ):
        for batch, _ in enumerate(stream.batches(0)):
            bar.update(min(size, len(source) - batch * size))
    problem = None if stream.cache is None else stream.cache.problem
    if problem is not None:
        raise InputError(
            f"--feature_cache {inputs.config.feature_cache}: cannot be written ({problem.strerror}); what is there is "
            "good, the same command goes on"
        )
