"""What stage 2 trains on: a stream of features, computed from images by the frozen backbone or read from the cache."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from scf_fast.features.store import FeatureCache, decode
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.pipelines.loading.base import Loader
from scf_fast.pipelines.sampling.sampler import Sampler

log = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches


class FeatureBatch(NamedTuple):
    """One rank's share of a global batch, on the device."""

    features: torch.Tensor  # (B, z_dim), unnormalized
    convf: torch.Tensor  # (B, C, 7, 7)
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64 on the CPU, positions in the data of what is shown


def one_ahead(batches: Iterator[FeatureBatch], making: torch.cuda.Stream) -> Iterator[FeatureBatch]:
    """The same batches, each made on the stream ``making`` while its predecessor is trained on, on the current one.

    A batch is launched before its predecessor is handed out: where the optimizer step waits for the device, the
    backbone's work is under way already. The caller's stream waits for each batch, and memory of a batch is used again
    only after what the caller has launched on it.
    """
    training = torch.cuda.current_stream(making.device)
    making.wait_stream(training)  # for the backbone's weights

    def make():
        with torch.cuda.stream(making):
            return next(batches, None), making.record_event()

    batch, ready = make()
    while batch is not None:
        following = make()
        training.wait_event(ready)
        for tensor in batch:
            if tensor.is_cuda:
                tensor.record_stream(training)
        yield batch
        batch, ready = following


class _Missing(Sampler):
    """A sampler's requests without the images that are in the cache, and without flips: the stream makes both
    orientations itself.
    """

    def __init__(self, sampler: Sampler, present: np.ndarray):
        self._sampler, self._present = sampler, present
        self.num_samples, self.global_batch_size, self.world_size = (
            sampler.num_samples,
            sampler.global_batch_size,
            sampler.world_size,
        )
        self.batches_per_epoch = sampler.batches_per_epoch

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        indices = self._sampler.indices(epoch, batch)
        return indices[~self._present[indices]]


class FeatureStream:
    """Features of the sampler's images, batch by batch, in the orientation of the sampler's coin.

    Has the interface of :class:`scf_fast.pipelines.loading.base.Loader` and gives the same batches with and without a
    cache. With one, an image that is missing is computed in both orientations and stored. On CUDA the work on a batch
    overlaps the training on the one before.

    Args:
        make_images: ``make_images(sampler, flip)`` gives a loader of images; closed when the stream is.
        sampler: which images, in which batches.
        labels: (N,) int64 of all images.
        backbone: FrozenBackbone.
        flip: whether images are mirrored at random.
        device: where the batches go.
        cache: FeatureCache, or None; closed when the stream is. Also an attribute.
    """

    def __init__(
        self,
        make_images: Callable[..., Loader],
        sampler: Sampler,
        labels: np.ndarray,
        backbone: FrozenBackbone,
        *,
        flip: bool,
        device: torch.device,
        cache: FeatureCache | None = None,
    ):
        self._make_images, self._sampler, self._labels, self._backbone = make_images, sampler, labels, backbone
        self._flip, self._device, self.cache = flip, device, cache
        self._making = (
            torch.cuda.Stream(device) if device.type == "cuda" else None
        )  # one for all epochs: the backbone's graph has one memory
        self._images, self._loader = None, None
        self._seconds = {"data": 0.0, "backbone": 0.0}
        self._timed = deque()  # pairs of CUDA events around what the backbone did

    @property
    def broken(self):
        """The broken images that the newest loader met, see ``scf_fast.pipelines.loading.broken``; empty while no image
        was loaded.
        """
        return () if self._loader is None else self._loader.broken

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went so far: ``"data"``, the host waiting for images or for the cache; ``"backbone"``, the
        frozen backbone, on CUDA by its stream's own time, which overlaps the training's. Waits for that stream.
        """
        self._collect(wait=True)
        return dict(self._seconds)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[FeatureBatch]:
        """The batches of one epoch from ``start_batch`` on."""
        made = (self._computed if self.cache is None else self._cached)(epoch, start_batch)
        with contextlib.closing(made):
            yield from one_ahead(made, self._making) if self._making else made

    def _computed(self, epoch, start_batch):
        if self._images is None:
            self._images = self._loader = self._make_images(self._sampler, self._flip)
        with contextlib.closing(self._images.batches(epoch, start_batch)) as batches:
            while (batch := self._wait(lambda: next(batches, None))) is not None:
                yield FeatureBatch(*self._run(batch.images), batch.labels, batch.indices)

    def _wait(self, what):
        """What a call returns; its time is data's."""
        began = time.perf_counter()
        result = what()
        self._seconds["data"] += time.perf_counter() - began
        return result

    def _run(self, images):
        """features and convf, in memory of their own."""
        if self._device.type != "cuda":
            began = time.perf_counter()
            result = self._backbone(images)
            self._seconds["backbone"] += time.perf_counter() - began
            return result
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        result = tuple(
            value.clone() for value in self._backbone(images)
        )  # the graph's next run writes over its outputs
        ended.record()
        self._timed.append((began, ended))
        self._collect(wait=False)
        return result

    def _collect(self, wait):
        """Add up the events that have passed."""
        while self._timed and (wait or self._timed[0][1].query()):
            began, ended = self._timed.popleft()
            ended.synchronize()
            self._seconds["backbone"] += began.elapsed_time(ended) / 1000

    def _cached(self, epoch, start_batch):
        self.cache.refresh()
        present = np.zeros(self._sampler.num_samples, dtype=bool)
        present[: len(self.cache.present)] = self.cache.present
        wanted = range(start_batch, self._sampler.batches_per_epoch)
        complete = all(present[self._sampler.indices(epoch, batch)].all() for batch in wanted)
        with contextlib.ExitStack() as stack:
            images = None
            if not complete:
                self._loader = stack.enter_context(self._make_images(_Missing(self._sampler, present), False))
                images = stack.enter_context(contextlib.closing(self._loader.batches(epoch, start_batch)))
            reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="feature-reader"))
            ahead = deque()
            for batch in wanted:
                while len(ahead) < _READ_AHEAD and batch + len(ahead) in wanted:
                    ahead.append(reader.submit(self._read, epoch, batch + len(ahead), present))
                hits, packed = self._wait(ahead.popleft().result)
                found = (
                    None if packed is None else decode(self.cache.layout, packed.to(self._device, non_blocking=True))
                )
                missing = None if images is None else self._wait(lambda: next(images))
                made = self._assemble(epoch, batch, hits, found, missing)
                if batch == wanted[-1]:
                    # before a step that no rank finishes alone: the next epoch finds everything, whichever rank has
                    # made it
                    self.cache.flush()
                yield made

    def _read(self, epoch, batch, present):
        """Which images of a batch the cache has, and their rows."""
        indices = self._sampler.indices(epoch, batch)
        hits = present[indices]
        flips = self._sampler.flips(epoch, indices) & self._flip
        wanted = hits.any() or not len(hits)  # a rank's share of a last batch can be empty
        return hits, self.cache.read(
            indices[hits], flips[hits], pin_memory=self._device.type == "cuda"
        ) if wanted else None

    def _assemble(self, epoch, batch, hits, found, missing):
        """One batch in the sampler's order from what the cache had and from ``missing``, the images that it had not."""
        indices = self._sampler.indices(epoch, batch)
        labels = torch.from_numpy(self._labels[indices]).to(self._device, non_blocking=True)
        shown = torch.from_numpy(indices.copy())
        if hits.all():
            return FeatureBatch(*found, labels, shown)
        computed = self._compute(indices[~hits], (self._sampler.flips(epoch, indices) & self._flip)[~hits], missing)
        places = torch.from_numpy(np.flatnonzero(~hits))  # a mask on the device would make the host wait for it
        labels[places.to(self._device, non_blocking=True)] = (
            missing.labels
        )  # a broken image has been replaced, label and all
        shown[places] = missing.indices
        if not hits.any():
            return FeatureBatch(*computed, labels, shown)
        places = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(hits), np.flatnonzero(~hits)]))).to(
            self._device, non_blocking=True
        )
        return FeatureBatch(
            *(torch.cat([old.to(new.dtype), new])[places] for old, new in zip(found, computed)), labels, shown
        )

    def _compute(self, indices, flips, batch):
        """Features of images in the orientation that ``flips`` says; both orientations of those that the cache has room
        for go there.
        """
        images, shown = batch.images, batch.indices.numpy()
        mirror = torch.from_numpy(flips).to(images.device, non_blocking=True)[:, None, None, None]
        mirrored = images.flip(3)
        wanted = self._run(torch.where(mirror, mirrored, images))
        room = (indices < self.cache.layout.num_images) & (
            indices == shown
        )  # what stands in for a broken image is not that image
        if room.any():
            other = self._run(torch.where(mirror, images, mirrored))
            choose = mirror.flatten()
            plain, turned = (
                [torch.where(choose.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(first, second)]
                for first, second in ((wanted, other), (other, wanted))
            )
            keep = torch.from_numpy(np.flatnonzero(room)).to(images.device, non_blocking=True)
            self.cache.write(indices[room], [tuple(value[keep] for value in view) for view in (plain, turned)])
        return wanted

    def close(self) -> None:
        """Close the images and the cache."""
        if self._images is not None:
            self._images.close()
        if self.cache is not None:
            self.cache.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
