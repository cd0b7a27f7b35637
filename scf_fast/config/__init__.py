"""One typed definition of every training option: defaults, ``--help``, YAML recipes and checks all come from here.

A field of one of the configuration classes is a flag (``batch_size`` -> ``--batch_size`` or ``--batch-size``) and a
recipe key. The options of both stages are in :class:`Config`, those of one stage in its subclass. Order of precedence:
default < recipe (``--config``) < command line.

    options     what an option says of itself
    base        Config, both stages
    backbone    BackboneConfig, stage 1
    confidence  FeatureConfig and ConfidenceConfig, stage 2
    saved       config.yaml of a run
    yaml_file   YAML that may come from anywhere
"""

from scf_fast.config.backbone import MARGIN_PRESETS, BackboneConfig
from scf_fast.config.base import Config
from scf_fast.config.confidence import PAIR_BATCH, ConfidenceConfig, FeatureConfig
from scf_fast.config.options import Option, PerStage, option, option_of, value_type
from scf_fast.config.saved import STAGES, load_saved, save

__all__ = [
    "MARGIN_PRESETS",
    "PAIR_BATCH",
    "STAGES",
    "BackboneConfig",
    "ConfidenceConfig",
    "Config",
    "FeatureConfig",
    "Option",
    "PerStage",
    "load_saved",
    "option",
    "option_of",
    "save",
    "value_type",
]
