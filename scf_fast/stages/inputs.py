"""Inputs of a run: the images, and the stage that its options describe."""

from dataclasses import dataclass

import torch

from scf_fast import distributed
from scf_fast.config import BackboneConfig, ConfidenceConfig, Config
from scf_fast.data import open_data
from scf_fast.engine.deepspeed_config import resolve_precision
from scf_fast.errors import InputError
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages.backbone import BackboneStage
from scf_fast.stages.base import Stage
from scf_fast.stages.confidence import ConfidenceStage
from scf_fast.stages.finetune import FinetuneStage
from scf_fast.stages.memory_forecast import MemoryForecast


@dataclass(frozen=True)
class Inputs:
    """The images to train on, the stage that will, and the memory it will take where that is known beforehand."""

    source: ImageSource
    stage: Stage
    memory: MemoryForecast | None


def open_inputs(config: Config) -> Inputs:
    """Opens the data and the stage that trains on them, and checks that the stage fits into memory.

    Raises:
        InputError: data or weights cannot be used, or would not fit.
    """
    source = open_data(config)
    stage: Stage
    if isinstance(config, BackboneConfig):
        stage = BackboneStage(config, source)
    else:
        assert isinstance(config, ConfidenceConfig), "the command line makes no other"
        stage = FinetuneStage(config, source) if config.finetune_bkb else ConfidenceStage(config, source)
    _, world_size = distributed.environment()
    precision = resolve_precision(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    memory = stage.forecast(world_size, precision)
    if memory is not None:
        memory.check()
    return Inputs(source, stage, memory)


def check_world(config: Config, world_size: int) -> None:
    """Checks that the ranks can divide a batch among them.

    Raises:
        InputError: they cannot.
    """
    parts = world_size * config.gradient_accumulation_steps
    if isinstance(config, ConfidenceConfig) and config.pair_batch is not None:
        people, images = config.pair_batch
        if people % parts or people == parts:
            raise InputError(
                f"--pair_batch {people},{images}: the people must be a multiple of ranks x "
                f"--gradient_accumulation_steps = {world_size} x {config.gradient_accumulation_steps}, at least twice "
                f"that, so that no batch is of one person; nearest: {max(2, round(people / parts)) * parts},{images}"
            )
        return
    if config.batch_size % parts:
        raise InputError(
            f"--batch_size {config.batch_size} must be divisible by ranks x --gradient_accumulation_steps = "
            f"{world_size} x {config.gradient_accumulation_steps}; nearest: "
            f"{max(1, round(config.batch_size / parts)) * parts}"
        )
    if config.batch_size == parts and config.trains_batchnorm:
        raise InputError(
            f"--batch_size must be at least {2 * parts}, two images a rank and micro-batch, got {parts}: the "
            "network's BatchNorm needs two"
        )
