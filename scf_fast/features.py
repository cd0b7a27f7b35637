"""What stage 2 trains on: a stream of features from the frozen backbone, computed from images or read from a cache."""
import contextlib
from typing import NamedTuple

import torch

from pipelines.loader import Loader
from scf_fast.frozen import FrozenBackbone


class FeatureBatch(NamedTuple):
    """One rank's share of a global batch, on the device."""
    features: torch.Tensor  # (B, z_dim), unnormalised, in the frozen backbone's dtype
    convf: torch.Tensor  # (B, C, 7, 7), in the same
    labels: torch.Tensor  # (B,) int64


class FeatureStream:
    """Images through the frozen backbone. Has the interface of :class:`pipelines.loader.Loader`; it closes the loader it was given."""

    def __init__(self, images: Loader, backbone: FrozenBackbone):
        self._images, self._backbone = images, backbone

    def batches(self, epoch: int, start_batch: int = 0):
        """The batches of one epoch from ``start_batch`` on, as :class:`FeatureBatch`."""
        with contextlib.closing(self._images.batches(epoch, start_batch)) as batches:
            for images, labels, _ in batches:
                yield FeatureBatch(*self._backbone(images), labels)

    def close(self) -> None:
        self._images.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
