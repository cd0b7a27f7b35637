"""Embeddings kept on disk by model and data, computed by any number of ranks."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scf_fast.distributed import all_ranks_agree
from scf_fast.inference import DEFAULT_DECODING, Decoding, Embedder, Embeddings, embed_batches, load_batches
from scf_fast.networks.frozen import CHECK_IMAGES
from scf_fast.objectives import Density
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.sources.digest import content_digest

_PART = 4096  # images in a file of the store: what an interruption costs at most, and a rank's unit of work
_PREDICTION_KEYS = {Density.VMF: "log_kappa", Density.GAUSSIAN: "log_variance"}  # beside "features"
_PIXELS = 2  # counts the changes in how files become pixels; stored embeddings of an earlier count are not used


class EmbeddingStore:
    """Embeddings of one model on disk, by model and data: each is computed once, and a run that was cut off resumes.

    Args:
        embedder: the model.
        folder: made if missing. A data set takes 4 (D + 1) bytes an image, with a variance in each dimension 8 D and
            of a backbone alone 4 D, in a subfolder named by a digest of model, settings and data.
        batch_size: images at once.
        decoding: how they are read.
        rank, world_size: this process, and how many processes share the work.
    """

    def __init__(
        self,
        embedder: Embedder,
        folder: Path,
        *,
        batch_size: int = 256,
        decoding: Decoding = DEFAULT_DECODING,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.embedder, self._folder = embedder, folder
        self._batch_size, self._decoding = batch_size, decoding
        self._rank, self._world_size = rank, world_size

    def fill(self, source: ImageSource, description: str) -> None:
        """Computes this rank's share of what is missing, under a progress bar.

        Every rank must call it, and return, before one of them may load. The precision of the backbone is settled on
        the first images of the source: the same on every rank, and after an interruption.

        Raises:
            InputError: an image cannot be decoded, or gives unusable numbers; the message names it.
        """
        folder = self._data_folder(source)
        all_ranks_agree(True)  # a rank that is still at an earlier source may be writing parts of this one
        missing = [part for part in _parts(source) if not _path(folder, part).exists()]
        # No rank starts before all have seen what is missing: their shares would not add up to it.
        if all_ranks_agree(not missing):
            return
        if not self.embedder.is_settled:
            first = np.arange(min(len(source), CHECK_IMAGES))
            with contextlib.closing(load_batches(self.embedder, source, [first], self._decoding)) as batches:
                _, images = next(batches)
                self.embedder.settle(images, self._batch_size)
        self._compute(source, missing[self._rank :: self._world_size], folder, description)

    def _compute(self, source: ImageSource, parts: list[range], folder: Path, description: str) -> None:
        """Computes and writes parts of a source."""
        if not parts:
            return
        batches = [
            np.arange(start, min(start + self._batch_size, part.stop))
            for part in parts
            for start in range(part.start, part.stop, self._batch_size)
        ]
        stream = embed_batches(self.embedder, source, batches, self._decoding)
        bar = tqdm(total=sum(map(len, parts)), desc=description, unit=" images", mininterval=1, disable=self._rank > 0)
        with contextlib.closing(stream), bar as progress:
            for part in parts:
                embeddings = self._allocate(len(part))
                done = 0
                while done < len(part):
                    _, batch = next(stream)
                    embeddings.write_rows(slice(done, done + len(batch)), batch)
                    done += len(batch)
                    progress.update(len(batch))
                embeddings.check_usable(source, part.start)
                arrays = {"features": embeddings.features.numpy()}
                if embeddings.prediction is not None:
                    arrays[_PREDICTION_KEYS[embeddings.density]] = embeddings.prediction.numpy()
                with atomic_output(_path(folder, part)) as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy 2 types its own keywords there

    def load(self, source: ImageSource, description: str) -> Embeddings:
        """Reads all embeddings of a source; fills the store first where this process is the only one."""
        if self._world_size == 1:
            self.fill(source, description)
        folder = self._data_folder(source)
        embeddings = self._allocate(len(source))
        density = embeddings.density
        for part in _parts(source):
            with np.load(_path(folder, part)) as stored:
                prediction = torch.from_numpy(stored[_PREDICTION_KEYS[density]]) if self.embedder.outputs else None
                embeddings.write_rows(
                    slice(part.start, part.stop), Embeddings(torch.from_numpy(stored["features"]), prediction, density)
                )
        return embeddings

    def _allocate(self, count: int) -> Embeddings:
        embedder = self.embedder
        return Embeddings.allocate(count, embedder.embedding_dim, embedder.outputs, embedder.density)

    def _data_folder(self, source: ImageSource) -> Path:
        return self._folder / content_digest(source, f"{self.embedder.key} {_PIXELS}")[:24]


def _path(folder: Path, part: range) -> Path:
    return folder / f"{part.start:09d}.npz"


def _parts(source: ImageSource) -> list[range]:
    return [range(start, min(start + _PART, len(source))) for start in range(0, len(source), _PART)]
