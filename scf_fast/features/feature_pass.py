"""A pass over a data set that computes features and trains nothing: what the programs beside training share."""

import dataclasses
from pathlib import Path

from scf_fast import distributed
from scf_fast.command_line import make_config_of, parse_values
from scf_fast.config import FeatureConfig
from scf_fast.data import open_data
from scf_fast.features.open import pixel_convention
from scf_fast.model import noted_facts
from scf_fast.weights import reading


class FeaturePass:
    """The inputs of a pass: everything that can be wrong with them is found before :meth:`start` forms the group of
    ranks.

    Args:
        flags: of train.py, ``--data`` and ``--saved_bkb`` among them.
        folder: ``--output_dir``, where they do not give another.
    Attributes:
        config, source: as a training run of stage 2 has them; the pixel convention is settled.
        backbone: Weights of ``--saved_bkb``.
    Raises:
        ValueError: bad flags, data or weights.
    """

    def __init__(self, flags: list[str], folder: Path):
        values = {"output_dir": str(folder), "batch_size": 256, **parse_values(flags)}
        config = make_config_of(FeatureConfig, {name: value for name, value in values.items() if name != "stage"})
        self.source, self.backbone = open_data(config), reading.read(config.saved_bkb, "--saved_bkb")
        facts = {}
        if config.saved_fc:
            facts = reading.read(config.saved_fc, "--saved_fc").facts
        elif config.normalization is None:
            facts = noted_facts(self.backbone, config.saved_bkb)
        normalization, self._origin = pixel_convention(config, self.backbone.network()[0], facts)
        self.config = dataclasses.replace(config, normalization=normalization)

    def start(self) -> tuple[distributed.Runtime, int]:
        """Join the group; (runtime, images of a global batch, of which each rank has as many)."""
        runtime = distributed.start()
        if runtime.is_main:
            print(f"pixels: {self.config.normalization}, {self._origin}", flush=True)
        return runtime, max(min(self.config.batch_size, len(self.source)) // runtime.world_size, 1) * runtime.world_size
