"""What a model says of images, kept on disk, and the scores of pairs."""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from scf_fast.distributed import on_every_rank
from scf_fast.inference import check_usable, embed_batches, load_batches, put, room_for
from scf_fast.kernels import vmf_similarity_from_cosine
from scf_fast.networks.frozen import CHECK_IMAGES
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.sources.digest import content_digest

_PART = 4096  # images in a file of the store: what an interruption costs at most, and a rank's unit of work
_PIXELS = 2  # counts the changes in how files become pixels, after which stored embeddings are made anew
_PAIRS_AT_ONCE = {
    "cpu": 1 << 11,
    "cuda": 1 << 17,
}  # 8 and 512 MiB for each of two float64 copies of 512-wide rows; IJB-C has 15.7 M pairs
_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64
_CELLS_PER_PAIR = (
    64  # of a matrix product, which cost less than to fetch the two rows of a pair (measured at d = 512: about 100)
)


@dataclass(frozen=True)
class Embeddings:
    """What a model says of N images, on the CPU."""

    features: torch.Tensor  # (N, D) float32, unnormalized
    log_kappa: torch.Tensor | None  # (N,) float32; None of a backbone alone

    @cached_property
    def mu(self) -> torch.Tensor:
        """(N, D) float32 unit directions."""
        return F.normalize(self.features)

    @cached_property
    def kappa(self) -> np.ndarray | None:
        """(N,) float64, or None."""
        return None if self.log_kappa is None else self.log_kappa.double().exp().numpy()

    @cached_property
    def feature_norm(self) -> np.ndarray:
        """(N,) float64."""
        return torch.linalg.vector_norm(self.features, dim=1).double().numpy()


class EmbeddingStore:
    """Embeddings of one model, on disk by model and data: computed once, by any number of ranks, and resumed where a
    run was cut off.

    Args:
        embedder: scf_fast.inference.Embedder.
        folder: made if missing. A data set takes 4 (D + 1) bytes an image, without kappa 4 D, under a name that digests
            model, settings and data.
        batch_size: images at once.
        loader, num_workers: see scf_fast.pipelines.loader.make_loader.
        rank, world_size: this process and how many share the work.
    """

    def __init__(
        self,
        embedder,
        folder: Path,
        *,
        batch_size: int = 256,
        loader: str = "auto",
        num_workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.embedder, self._folder = embedder, folder
        self._batch_size, self._loading = batch_size, {"loader": loader, "num_workers": num_workers}
        self._rank, self._world_size = rank, world_size

    def fill(self, source: ImageSource, description: str) -> None:
        """Compute this rank's share of what is missing, under a progress bar; every rank must do so before one of them
        may load.

        The precision of the backbone is settled on the first images of the source, the same on every rank and after an
        interruption.

        Raises:
            ValueError: an image cannot be decoded, or gives unusable numbers; the message names it.
        """
        folder = self._data_folder(source)
        on_every_rank(True)  # a rank that is still at an earlier source may be writing parts of this one
        missing = [part for part in _parts(source) if not _path(folder, part).exists()]
        if on_every_rank(
            not missing
        ):  # and no rank starts before all have seen what is missing: their shares would not add up to it
            return
        if not self.embedder.settled:
            first = np.arange(min(len(source), CHECK_IMAGES))
            with contextlib.closing(load_batches(self.embedder, source, [first], **self._loading)) as images:
                self.embedder.settle(next(images)[1], self._batch_size)
        mine = missing[self._rank :: self._world_size]
        batches = [
            np.arange(start, min(start + self._batch_size, part.stop))
            for part in mine
            for start in range(part.start, part.stop, self._batch_size)
        ]
        if not mine:
            return
        stream = embed_batches(self.embedder, source, batches, **self._loading)
        with (
            contextlib.closing(stream),
            tqdm(
                total=sum(map(len, mine)), desc=description, unit=" images", mininterval=1, disable=self._rank > 0
            ) as progress,
        ):
            for part in mine:
                features, log_kappa = embeddings = room_for(self.embedder, len(part))
                done = 0
                while done < len(part):
                    indices, *values = next(stream)
                    put(embeddings, slice(done, done + len(indices)), *values)
                    done += len(indices)
                    progress.update(len(indices))
                check_usable(features, log_kappa, source, np.arange(part.start, part.stop))
                with atomic_output(_path(folder, part)) as file:
                    np.savez(
                        file,
                        features=features.numpy(),
                        **({} if log_kappa is None else {"log_kappa": log_kappa.numpy()}),
                    )

    def load(self, source: ImageSource, description: str) -> Embeddings:
        """What the store has of a source, all of it; fills it first where this process is the only one."""
        if self._world_size == 1:
            self.fill(source, description)
        folder = self._data_folder(source)
        embeddings = room_for(self.embedder, len(source))
        for part in _parts(source):
            with np.load(_path(folder, part)) as stored:
                log_kappa = torch.from_numpy(stored["log_kappa"]) if self.embedder.gives_kappa else None
                put(embeddings, slice(part.start, part.stop), torch.from_numpy(stored["features"]), log_kappa)
        return Embeddings(*embeddings)

    def _data_folder(self, source):
        return self._folder / content_digest(source, f"{self.embedder.key} {_PIXELS}")[:24]


def _path(folder, part):
    return folder / f"{part.start:09d}.npz"


def _parts(source):
    return [range(start, min(start + _PART, len(source))) for start in range(0, len(source), _PART)]


class PairScores(NamedTuple):
    cosine: np.ndarray  # (P,) float64
    vmf: np.ndarray | None  # (P,) float64, Eqn (13), nats


def score_pairs(
    mu: torch.Tensor, kappa: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor, radius: float
) -> PairScores:
    """Cosine, and where there is a kappa Eqn (13), of rows first[k] and second[k], in float64.

    Args:
        mu: (N, D) floating point, of any length; the cosine with a zero row is 0.
        kappa: (N,) floating point, or None.
        first, second: (P,) int64.
        radius: of the sphere.
    """
    unit, first, second = F.normalize(mu.double()), first.to(mu.device), second.to(mu.device)
    rows, columns = _Present.of(first, len(unit)), _Present.of(second, len(unit))
    if len(rows.values) * len(columns.values) <= _CELLS_PER_PAIR * len(first):
        cosine = _cosines_of_bands(unit, rows, columns)
    else:
        cosine = _cosines_of_rows(unit, first, second)
    if kappa is None:
        return PairScores(cosine.cpu().numpy(), None)
    vmf = torch.empty_like(cosine)
    for start in range(0, len(first), _SCORES_AT_ONCE):
        piece = slice(start, start + _SCORES_AT_ONCE)
        vmf[piece] = vmf_similarity_from_cosine(
            cosine[piece], kappa[first[piece]], kappa[second[piece]], mu.shape[1], radius
        )
    return PairScores(cosine.cpu().numpy(), vmf.cpu().numpy())


class _Present(NamedTuple):
    """Row numbers that occur among (P,) row numbers."""

    values: torch.Tensor  # (U,) int64, rising
    places: torch.Tensor  # (P,) int64, where in values each is

    @classmethod
    def of(cls, numbers: torch.Tensor, count: int) -> "_Present":
        occurs = torch.zeros(count, dtype=torch.bool, device=numbers.device)
        occurs[numbers] = True
        return cls(occurs.nonzero()[:, 0], (occurs.cumsum(0) - 1)[numbers])


def _cosines_of_bands(unit: torch.Tensor, rows: _Present, columns: _Present) -> torch.Tensor:
    """(P,) cosines out of the matrix of all, some rows of it at a time: where a matrix product costs less than fetching
    two rows for each pair.
    """
    order = torch.argsort(rows.places)
    height = max(1, _SCORES_AT_ONCE // max(1, len(columns.values)))
    starts = torch.arange(0, len(rows.values) + height, height, device=unit.device)
    ends = torch.searchsorted(rows.places[order], starts).tolist()
    others, cosine = unit[columns.values].T.contiguous(), unit.new_empty(len(order))
    for start, begin, end in zip(starts.tolist(), ends, ends[1:]):
        pairs = order[begin:end]
        band = unit[rows.values[start : start + height]] @ others
        cosine[pairs] = band[rows.places[pairs] - start, columns.places[pairs]]
    return cosine


def _cosines_of_rows(unit: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(P,) cosines, some pairs at a time."""
    at_once = min(_PAIRS_AT_ONCE["cuda" if unit.is_cuda else "cpu"], len(first))
    a, b = unit.new_empty(
        2, at_once, unit.shape[1]
    )  # used again and again: new ones of this size cost more than the sums
    cosine = unit.new_empty(len(first))
    for start in range(0, len(first), at_once or 1):
        i, j = first[start : start + at_once], second[start : start + at_once]
        torch.index_select(unit, 0, i, out=a[: len(i)])
        torch.index_select(unit, 0, j, out=b[: len(j)])
        torch.sum(a[: len(i)].mul_(b[: len(j)]), dim=1, out=cosine[start : start + at_once])
    return cosine
