"""The loader for machines without DALI: Pillow in PyTorch worker processes, a whole batch per task."""
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.images import decode_faces
from pipelines.loader import Loader


class TorchLoader(Loader):
    """See pipelines.loader.make_loader. Workers start with the first batch and live until close()."""

    backend = "torch"

    def __init__(self, source, sampler, preprocessing, device, dtype, num_workers, prefetch):
        super().__init__(source, sampler, preprocessing, device, dtype)
        self._requests = _Requests()
        self._decoded = DataLoader(
            _FaceBatches(source), batch_size=None, sampler=self._requests, num_workers=num_workers, pin_memory=device.type == "cuda",
            prefetch_factor=-(-prefetch // num_workers) if num_workers else None, persistent_workers=num_workers > 0)

    def close(self):
        super().close()
        self._decoded = None  # the last reference to the workers, which end with it

    def _faces(self, requests):
        self._requests.source = requests
        for decoded in self._decoded:
            if isinstance(decoded, ValueError):
                raise decoded
            yield decoded


class _Requests:
    """The sampler that DataLoader asks anew for each epoch."""

    source = ()

    def __iter__(self):
        return iter(self.source)


class _FaceBatches(Dataset):
    """Item (indices, flips): that batch of faces, or the ValueError that names its broken image.

    An error raised in a worker would reach the user as its traceback in text; returned, it stays one line.
    """

    def __init__(self, source):
        self._source = source

    def __getitem__(self, request):
        try:
            return torch.from_numpy(decode_faces(self._source, *request))
        except ValueError as error:
            return error
