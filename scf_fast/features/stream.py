"""The stream of features that stage 2 trains on, computed from images by the frozen backbone or read from the cache."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from scf_fast.features.records import decode
from scf_fast.features.store import FeatureCache, View
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.pipelines.loading.base import Batch, Loader
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads, Wait, result_of

log = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches
_Result = TypeVar("_Result")


class FeatureBatch(NamedTuple):
    """One rank's share of a global batch, on the device."""

    features: torch.Tensor  # (B, z_dim), unnormalized
    convf: torch.Tensor  # (B, C, 7, 7)
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64 on the CPU, positions in the data of what is shown


def one_ahead(batches: Iterator[FeatureBatch], making: torch.cuda.Stream) -> Iterator[FeatureBatch]:
    """Yields the same batches, each made on the stream ``making`` while its predecessor is trained on, on the current
    one.

    A batch is launched before its predecessor is handed out: by the time the optimizer step waits for the device, the
    backbone's work is under way already. The caller's stream waits for each batch, and memory of a batch is used again
    only after what the caller has launched on it.
    """
    training = torch.cuda.current_stream(making.device)
    making.wait_stream(training)  # for the backbone's weights

    def make() -> tuple[FeatureBatch | None, torch.cuda.Event]:
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
        self.num_samples, self.global_batch_size = sampler.num_samples, sampler.global_batch_size
        self.world_size, self.batches_per_epoch = sampler.world_size, sampler.batches_per_epoch

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        indices = self._sampler.indices(epoch, batch)
        return indices[~self._present[indices]]


class FeatureStream(BatchLoader[FeatureBatch]):
    """Features of the sampler's images, batch by batch, in the orientation that the sampler draws.

    The batches are the same with and without a cache. With one, an image that is missing is computed in both
    orientations and stored. On CUDA the work on a batch overlaps the training on the one before.

    Args:
        make_images: ``make_images(sampler, flip)`` returns a loader of images; closed when the stream is.
        labels: (N,) int64 of all images.
        flip: whether images are mirrored at random.
        device: where the batches go.
        cache: closed when the stream is, if it owns it. Also an attribute.
        timeout: seconds that reading the cache may take without progress, see :mod:`scf_fast.pipelines.waiting`.
    """

    def __init__(
        self,
        make_images: Callable[[Sampler, bool], Loader],
        sampler: Sampler,
        labels: np.ndarray,
        backbone: FrozenBackbone,
        *,
        flip: bool,
        device: torch.device,
        cache: FeatureCache | None = None,
        owns_cache: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ):
        self._make_images, self._sampler, self._labels, self._backbone = make_images, sampler, labels, backbone
        self._flip, self._device, self.cache, self._owns_cache = flip, device, cache, owns_cache
        self._timeout = timeout
        # One stream for all epochs: the backbone's graph has one memory.
        self._making = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._images: Loader | None = None  # of every image, when there is no cache
        self._loader: Loader | None = None  # the newest
        self._seconds = {"data": 0.0, "backbone": 0.0}
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # around the backbone's work

    def count_broken(self) -> int:
        """Returns how many broken images the newest loader met; 0 while no image was loaded."""
        return 0 if self._loader is None else self._loader.count_broken()

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went so far: ``"data"``, the host waiting for images or for the cache; ``"backbone"``, the
        frozen backbone, on CUDA by its stream's own time, which overlaps the training's. Waits for that stream.
        """
        self._collect(wait=True)
        return dict(self._seconds)

    def batches(self, epoch: int, start_batch: int = 0) -> Generator[FeatureBatch, None, None]:
        """Iterates over the batches of one epoch, from ``start_batch`` on."""
        if self.cache is None:
            made = self._computed(epoch, start_batch)
        else:
            made = self._cached(self.cache, epoch, start_batch)
        with contextlib.closing(made):
            yield from one_ahead(made, self._making) if self._making else made

    def _computed(self, epoch: int, start_batch: int) -> Generator[FeatureBatch, None, None]:
        if self._images is None:
            self._images = self._loader = self._make_images(self._sampler, self._flip)
        with contextlib.closing(self._images.batches(epoch, start_batch)) as batches:
            while (batch := self._wait(lambda: next(batches, None))) is not None:
                yield FeatureBatch(*self._run(batch.images), batch.labels, batch.indices)

    def _wait(self, action: Callable[[], _Result]) -> _Result:
        """Calls the action and returns its result; its time is data's."""
        began = time.perf_counter()
        result = action()
        self._seconds["data"] += time.perf_counter() - began
        return result

    def _run(self, images: torch.Tensor) -> View:
        """Returns features and convf, in memory of their own."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            result = self._backbone(images)
            self._seconds["backbone"] += time.perf_counter() - start
            return result
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        features, convf = self._backbone(images)
        features, convf = features.clone(), convf.clone()  # the graph's next run writes over its outputs
        ended.record()
        self._timed.append((began, ended))
        self._collect(wait=False)
        return features, convf

    def _collect(self, wait: bool) -> None:
        """Adds up the events that have passed; with ``wait``, waits for the others and adds them too."""
        while self._timed and (wait or self._timed[0][1].query()):
            began, ended = self._timed.popleft()
            ended.synchronize()
            self._seconds["backbone"] += began.elapsed_time(ended) / 1000

    def _cached(self, cache: FeatureCache, epoch: int, start_batch: int) -> Generator[FeatureBatch, None, None]:
        cache.refresh()
        present = np.zeros(self._sampler.num_samples, dtype=bool)
        present[: len(cache.present)] = cache.present
        wanted = range(start_batch, self._sampler.batches_per_epoch)
        complete = all(present[self._sampler.indices(epoch, batch)].all() for batch in wanted)
        with contextlib.ExitStack() as stack:
            images: Generator[Batch, None, None] | None = None
            if not complete:
                self._loader = stack.enter_context(self._make_images(_Missing(self._sampler, present), False))
                images = stack.enter_context(contextlib.closing(self._loader.batches(epoch, start_batch)))
            reader = stack.enter_context(DaemonThreads(1, "feature-reader"))
            ahead: deque[Future[tuple[np.ndarray, torch.Tensor | None]]] = deque()
            for batch in wanted:
                while len(ahead) < _READ_AHEAD and batch + len(ahead) in wanted:
                    ahead.append(reader.submit(self._read, cache, epoch, batch + len(ahead), present))
                wait = Wait(
                    "stage 2",
                    f"the reader of batch {batch} of the feature cache {cache.folder}",
                    self._timeout,
                    lambda: cache.records_moved,
                )
                hits, packed = self._wait(lambda: result_of(ahead.popleft(), wait))  # noqa: B023 -- called at once
                found = None if packed is None else decode(cache.layout, packed.to(self._device, non_blocking=True))
                missing = None if images is None else self._wait(lambda: next(images))
                made = self._assemble(cache, epoch, batch, hits, found, missing)
                if batch == wanted[-1]:
                    # Before a step that no rank finishes alone: the next epoch finds everything, whichever rank has
                    # made it.
                    cache.flush()
                yield made

    def _read(
        self, cache: FeatureCache, epoch: int, batch: int, present: np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor | None]:
        """Returns which images of a batch the cache has, (B,) bool, and their rows; None if it has none of them."""
        indices = self._sampler.indices(epoch, batch)
        hits = present[indices]
        if len(hits) and not hits.any():  # a rank's share of a last batch can be empty
            return hits, None
        flips = self._sampler.flips(epoch, indices) & self._flip
        return hits, cache.read(indices[hits], flips[hits], pin_memory=self._device.type == "cuda")

    def _assemble(
        self,
        cache: FeatureCache,
        epoch: int,
        batch: int,
        hits: np.ndarray,
        found: View | None,
        missing: Batch | None,
    ) -> FeatureBatch:
        """Returns one batch in the sampler's order.

        Args:
            hits: (B,) bool, which images the cache had.
            found: the features of those.
            missing: the images that it had not.
        """
        indices = self._sampler.indices(epoch, batch)
        labels = torch.from_numpy(self._labels[indices]).to(self._device, non_blocking=True)
        shown = torch.from_numpy(indices.copy())
        if hits.all():
            assert found is not None
            return FeatureBatch(*found, labels, shown)
        assert missing is not None
        flips = self._sampler.flips(epoch, indices) & self._flip
        computed = self._compute(cache, indices[~hits], flips[~hits], missing)
        places = torch.from_numpy(np.flatnonzero(~hits))  # a mask on the device would make the host wait for it
        # A broken image has been replaced, label and all.
        labels[places.to(self._device, non_blocking=True)] = missing.labels
        shown[places] = missing.indices
        if found is None:
            return FeatureBatch(*computed, labels, shown)
        places = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(hits), np.flatnonzero(~hits)]))).to(
            self._device, non_blocking=True
        )
        features, convf = (torch.cat([old.to(new.dtype), new])[places] for old, new in zip(found, computed))
        return FeatureBatch(features, convf, labels, shown)

    def _compute(self, cache: FeatureCache, indices: np.ndarray, flips: np.ndarray, batch: Batch) -> View:
        """Returns features of images in the orientation that ``flips`` says; both orientations of those that the cache
        has room for are stored.
        """
        images, shown = batch.images, batch.indices.numpy()
        mirror = torch.from_numpy(flips).to(images.device, non_blocking=True)[:, None, None, None]
        mirrored = images.flip(3)
        wanted = self._run(torch.where(mirror, mirrored, images))
        # The image that replaces a broken one is another image.
        room = (indices < cache.layout.num_images) & (indices == shown)
        if room.any():
            other = self._run(torch.where(mirror, images, mirrored))
            keep = torch.from_numpy(np.flatnonzero(room)).to(images.device, non_blocking=True)
            views = [_chosen(mirror.flatten(), *pair, keep) for pair in ((wanted, other), (other, wanted))]
            cache.write(indices[room], views)
        return wanted

    def close(self) -> None:
        """Closes the images and the cache."""
        if self._images is not None:
            self._images.close()
        if self.cache is not None and self._owns_cache:
            self.cache.close()

    def of(self, sampler: Sampler) -> "FeatureStream":
        """Returns a stream of other images of the same data, none of them mirrored, with the same backbone and cache;
        to be read while this one is not.
        """
        return FeatureStream(
            self._make_images,
            sampler,
            self._labels,
            self._backbone,
            flip=False,
            device=self._device,
            cache=self.cache,
            owns_cache=False,
            timeout=self._timeout,
        )


def _chosen(mirror: torch.Tensor, upright: View, turned: View, keep: torch.Tensor) -> View:
    """Returns the rows ``keep`` of ``turned`` where (B,) ``mirror`` is true, and of ``upright`` elsewhere."""
    features, convf = (torch.where(mirror.view(-1, *[1] * (a.ndim - 1)), b, a)[keep] for a, b in zip(upright, turned))
    return features, convf
