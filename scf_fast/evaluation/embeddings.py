"""Embeddings kept on disk by model and data, computed by any number of ranks."""

import contextlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scf_fast.distributed import all_ranks_agree
from scf_fast.errors import InputError, UnreadableError
from scf_fast.inference import DEFAULT_DECODING, Decoding, Embedder, Embeddings, load_batches
from scf_fast.networks.frozen import CHECK_IMAGES
from scf_fast.objectives import Density
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.loading.decode import load_face
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.sources.digest import content_digest
from scf_fast.pipelines.text import printable

log = logging.getLogger(__name__)

_PART = 4096  # images in a file of the store: what an interruption costs at most, and a rank's unit of work
_PREDICTION_KEYS = {Density.VMF: "log_kappa", Density.GAUSSIAN: "log_variance"}  # beside "features"
_LEFT_OUT, _REASONS = "left_out", "reasons"  # rows without an embedding, and why; where there are any
_PIXELS = 3  # counts the changes in how files become pixels; stored embeddings of an earlier count are not used


class EmbeddingStore:
    """Embeddings of one model on disk, by model and data: each is computed once, and a run that was cut off resumes.
    What is damaged on the disk is computed again.

    Args:
        embedder: the model.
        folder: made if missing. A data set takes 4 (D + 1) bytes an image, with a variance in each dimension 8 D and
            of a backbone alone 4 D, in a subfolder named by a digest of model, settings and data.
        batch_size: images at once.
        decoding: how they are read.
        rank, world_size: this process, and how many processes share the work.
        strict: an image that cannot be decoded is an error. Otherwise it is marked as such and has no embedding; an
            image that cannot even be read is an error in any case, since it may be good.
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
        strict: bool = False,
    ):
        self.embedder, self._folder = embedder, folder
        self._batch_size, self._decoding = batch_size, decoding
        self._rank, self._world_size = rank, world_size
        self._strict = strict
        self._intact: set[Path] = set()

    def fill(self, source: ImageSource, description: str, others: "Sequence[EmbeddingStore]" = ()) -> None:
        """Computes this rank's share of what is missing, under a progress bar.

        Every rank must call it, and return, before one of them may load. The precision of the backbone is settled on
        the first images of the source: the same on every rank, and after an interruption.

        Args:
            others: stores to fill with it, of models that share its backbone as :meth:`Embedder.embed_with` has it.
        Raises:
            InputError: an image cannot be decoded, or gives unusable numbers; the message names it.
        """
        folders = {store: store._data_folder(source) for store in (self, *others)}
        all_ranks_agree(True)  # a rank that is still at an earlier source may be writing parts of this one
        lacking = {
            part: {
                store: path
                for store, folder in folders.items()
                if not store._is_intact(path := _path(folder, part), len(part))
            }
            for part in _parts(source)
        }
        missing = {part: paths for part, paths in lacking.items() if paths}
        # No rank starts before all have seen what is missing: their shares would not add up to it.
        if all_ranks_agree(not missing):
            return
        if not self.embedder.is_settled:
            first = np.arange(min(len(source), CHECK_IMAGES))
            stream = load_batches(self.embedder, source, [first], self._decoding, self._left_out())
            with contextlib.closing(stream) as batches:
                _, images = next(batches)
                self.embedder.settle(images, self._batch_size)
        mine = list(missing)[self._rank :: self._world_size]
        self._compute(source, {part: missing[part] for part in mine}, description)

    def _compute(self, source: ImageSource, parts: "dict[range, dict[EmbeddingStore, Path]]", description: str) -> None:
        """Computes parts of a source, and writes each to the files that the stores lack."""
        if not parts:
            return
        batches = [
            np.arange(start, min(start + self._batch_size, part.stop))
            for part in parts
            for start in range(part.start, part.stop, self._batch_size)
        ]
        left_out = self._left_out()
        stream = load_batches(self.embedder, source, batches, self._decoding, left_out)
        bar = tqdm(
            total=sum(map(len, parts)),
            desc=printable(description),
            unit=" images",
            mininterval=1,
            disable=self._rank > 0,
        )
        with contextlib.closing(stream), bar as progress:
            for part, paths in parts.items():
                whole = [store._allocate(len(part)) for store in paths]
                done = 0
                while done < len(part):
                    _, images = next(stream)
                    for embeddings, batch in zip(whole, self._embed(list(paths), images)):
                        embeddings.write_rows(slice(done, done + len(images)), batch.cpu())
                    done += len(images)
                    progress.update(len(images))
                reasons = {i - part.start: _confirmed(source, i) for i in left_out or () if i in part}
                for path, embeddings in zip(paths.values(), whole):
                    embeddings.leave_out(reasons)
                    embeddings.check_usable(source, part.start)
                    _write(path, embeddings)

    def _left_out(self) -> dict[int, str] | None:
        """Returns what load_batches may put images in that cannot be decoded."""
        return None if self._strict else {}

    def _embed(self, stores: "list[EmbeddingStore]", images: torch.Tensor) -> list[Embeddings]:
        """Embeds images by the models of stores; this one's backbone runs once for all."""
        if stores == [self]:
            return [self.embedder(images)]
        return self.embedder.embed_with([store.embedder for store in stores], images)

    def load(self, source: ImageSource, description: str) -> Embeddings:
        """Reads all embeddings of a source; fills the store first where this process is the only one.

        Returns:
            Embeddings whose ``left_out`` says which images cannot be decoded.
        Raises:
            InputError: with ``strict`` there is one; or as for :meth:`fill`.
        """
        if self._world_size == 1:
            self.fill(source, description)
        folder = self._data_folder(source)
        embeddings = self._allocate(len(source))
        for part in _parts(source):
            path = _path(folder, part)
            try:
                stored = _read(path, self._allocate(len(part)))
            except _DamagedError as error:
                raise InputError(f"{path}: {error}; start again, and it is computed anew") from None
            embeddings.write_rows(slice(part.start, part.stop), stored)
            embeddings.leave_out({row + part.start: reason for row, reason in stored.left_out.items()})
        if self._strict and embeddings.left_out:
            raise InputError(
                f"{len(embeddings.left_out)} images are broken: {next(iter(embeddings.left_out.values()))}"
            )
        return embeddings

    def _is_intact(self, path: Path, count: int) -> bool:
        """Tells whether a part is there as it was written; every byte is read, once in a process."""
        if path in self._intact:
            return True
        if not path.exists():
            return False
        try:
            _read(path, self._allocate(count))
        except _DamagedError as error:
            log.warning("%s: %s; it is computed again", path, error)
            return False
        self._intact.add(path)
        return True

    def _allocate(self, count: int) -> Embeddings:
        embedder = self.embedder
        return Embeddings.allocate(count, embedder.embedding_dim, embedder.outputs, embedder.density)

    def _data_folder(self, source: ImageSource) -> Path:
        return self._folder / content_digest(source, f"{self.embedder.key} {_PIXELS}")[:24]


def _confirmed(source: ImageSource, i: int) -> str:
    """Returns the reason why image i cannot be decoded, which is kept with the embeddings.

    Raises:
        UnreadableError: it cannot even be read.
        InputError: it can be decoded now.
    """
    try:
        load_face(source, i)
    except UnreadableError:
        raise
    except InputError as error:
        return str(error)
    raise InputError(
        f"{source.name(i)} could not be decoded, and can be now: it changed, or the disk fails; start again"
    )


def _write(path: Path, embeddings: Embeddings) -> None:
    """Writes a part, complete or not at all."""
    arrays = {"features": embeddings.features.numpy()}
    if embeddings.prediction is not None:
        arrays[_PREDICTION_KEYS[embeddings.density]] = embeddings.prediction.numpy()
    if embeddings.left_out:
        arrays[_LEFT_OUT] = np.array(list(embeddings.left_out), dtype=np.int64)
        arrays[_REASONS] = np.array(list(embeddings.left_out.values()))
    with atomic_output(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy 2 types its own keywords there


class _DamagedError(ValueError):
    """A part that is not as it was written; the message says in what."""


def _read(path: Path, into: Embeddings) -> Embeddings:
    """Returns a part, checked by the checksums in it.

    Args:
        into: embeddings of its size, which it is read into.
    Raises:
        OSError: it cannot be read.
        _DamagedError: it is not as it was written.
    """
    content = io.BytesIO(path.read_bytes())  # a damaged offset must not look like an error of the disk
    try:
        with zipfile.ZipFile(content) as archive:
            arrays = {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _DamagedError(f"is damaged ({error})") from None
    wanted = {"features": into.features}
    if into.prediction is not None:
        wanted[_PREDICTION_KEYS[into.density]] = into.prediction
    for name, tensor in wanted.items():
        array = arrays.pop(name, None)
        if array is None or array.shape != tuple(tensor.shape) or array.dtype != np.float32:
            raise _DamagedError(f"has no {name} of {list(tensor.shape)}")
        tensor.copy_(torch.from_numpy(array))
    rows, reasons = arrays.pop(_LEFT_OUT, np.empty(0, np.int64)), arrays.pop(_REASONS, np.empty(0, np.str_))
    is_list = rows.dtype == np.int64 and reasons.dtype.kind == "U" and rows.shape == reasons.shape == (len(rows),)
    if arrays or not is_list or not np.isin(rows, np.arange(len(into))).all():
        raise _DamagedError("has other arrays than are written")
    into.leave_out(dict(zip(rows.tolist(), reasons.tolist(), strict=True)))
    return into


def _array(content: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _path(folder: Path, part: range) -> Path:
    return folder / f"{part.start:09d}.npz"


def _parts(source: ImageSource) -> list[range]:
    return [range(start, min(start + _PART, len(source))) for start in range(0, len(source), _PART)]
