"""Images for a run, as its configuration wants them."""
import torch

from pipelines.loader import Loader, Preprocessing, make_loader
from scf_fast.config import Config
from scf_fast.launch import Runtime


def image_loader(config: Config, source, sampler, runtime: Runtime) -> Loader:
    """Batches of normalised float32 faces on this rank's device."""
    return make_loader(source, sampler, Preprocessing(config.normalization, horizontal_flip=config.flip), device=runtime.device, dtype=torch.float32,
                       backend=config.loader, num_workers=config.num_workers)
