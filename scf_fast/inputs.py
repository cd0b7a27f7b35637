"""Images for a run, as its configuration wants them."""
from pathlib import Path

import torch

from pipelines.index import open_source
from pipelines.loader import Loader, Preprocessing, make_loader
from scf_fast.config import Config
from scf_fast.launch import Runtime


def open_data(config: Config):
    """The images at --data, or where --dataset has them.

    Raises:
        ValueError: nothing is there, or nothing that is known.
    """
    if config.dataset and not Path(config.data).exists():
        raise ValueError(f"--dataset {config.dataset}: there is no {config.data}; give --dataroot, the folder that holds list/{config.dataset}_list.txt, "
                         "or the data set itself as --data")
    return open_source(config.data, config.dataroot)


def image_loader(config: Config, source, sampler, runtime: Runtime, flip: bool) -> Loader:
    """Batches of normalised float32 faces on this rank's device."""
    return make_loader(source, sampler, Preprocessing(config.normalization, horizontal_flip=flip), device=runtime.device, dtype=torch.float32,
                       backend=config.loader, num_workers=config.num_workers)
