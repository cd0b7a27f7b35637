"""The loader for machines without DALI: Pillow in PyTorch worker processes, a whole batch per task."""

import gc

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scf_fast.pipelines.loading.base import Loader
from scf_fast.pipelines.loading.broken import BrokenImages
from scf_fast.pipelines.loading.decode import FACE_SIZE, load_face


class TorchLoader(Loader):
    """See scf_fast.pipelines.loader.make_loader. Workers start with the first batch and live until close()."""

    backend = "torch"

    def __init__(self, source, sampler, preprocessing, device, dtype, broken, num_workers, prefetch):
        super().__init__(source, sampler, preprocessing, device, dtype, broken)
        self._requests = _Requests()
        self._started = False
        self._decoded = DataLoader(
            _FaceBatches(source, broken.replaces),
            batch_size=None,
            sampler=self._requests,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=-(-prefetch // num_workers) if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),
        )  # else each epoch would draw from the generator of dropout

    def close(self):
        super().close()
        self._decoded = None  # the last reference to the workers, which end with it

    def _faces(self, requests):
        self._requests.source = requests
        if not self._started:
            # a forked worker that collected a DALI pipeline left over here would wait for its threads forever
            gc.collect()
            self._started = True
        for decoded in self._decoded:
            if isinstance(decoded, ValueError):
                raise decoded
            faces, shown, found = decoded
            self.broken.add(found)
            yield faces, shown.numpy()


class _Requests:
    """The sampler that DataLoader asks anew for each epoch."""

    source = ()

    def __iter__(self):
        return iter(self.source)


class _FaceBatches(Dataset):
    """Item Request: that batch of faces, what it shows and what was found broken; or the ValueError that names a broken
    image.

    An error raised in a worker would reach the user as its traceback in text; returned, it stays one line.
    """

    def __init__(self, source, replace):
        self._source, self._replace = source, replace
        self._broken = BrokenImages(source, replace, log=False)  # each worker finds out by itself; the loader tells

    def __getitem__(self, request):
        known = len(self._broken.found)
        faces = np.empty((len(request.indices), FACE_SIZE, FACE_SIZE, 3), dtype=np.uint8)
        shown = np.empty(len(request.indices), dtype=np.int64)
        try:
            for row, (i, flip) in enumerate(zip(request.indices.tolist(), request.flips.tolist())):
                shown[row], face = self._broken.load(i, lambda j: load_face(self._source, j))
                faces[row] = face[:, :: -1 if flip else 1]
        except ValueError as error:
            return error
        return torch.from_numpy(faces), torch.from_numpy(shown), dict(list(self._broken.found.items())[known:])
