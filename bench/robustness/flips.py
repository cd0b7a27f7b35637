"""Single flipped bits in every kind of file that a run writes, and what whoever reads the file makes of them.

    detected    refused in one line that says so, or set aside: a checkpoint, or a part that is computed again
    harmless    what is read is what was written, perhaps computed again
    used        what is read is something else, and nobody is told: there must be none

Files for people, which no command reads (the log, its events, TensorBoard's files), are not in the list; of
metrics.jsonl counts what a resume takes from it, which lines there are. Its numbers are for people, without a checksum.
"""

import collections
import contextlib
import dataclasses
import io
import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scf_fast.command_line import parse
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.features.store import FeatureCache, read_meta
from scf_fast.inference import Decoding, Embedder
from scf_fast.model import SCF
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.base import SelectedImages
from scf_fast.run import folder as run_folder
from scf_fast.run import same_inputs
from scf_fast.run.checkpoints import newest_intact
from scf_fast.run.line_files import forget_after, read_steps
from scf_fast.run.reporting import METRICS_FILE
from scf_fast.run.run_state import STATE_FILE
from scf_fast.weights.reading import read_weights

DETECTED, HARMLESS, USED = "detected", "harmless", "used"
_EMBEDDED = 6  # images


@dataclasses.dataclass(frozen=True)
class Written:
    """A file that a run writes.

    Attributes:
        name: kind of file, for the report.
        path: the file.
        read: what a command makes of the files as they are. It may change them: they are put back afterwards.
        is_same: whether a damaged file has given what is acceptable in place of the whole one.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    is_same: Callable[[Any, Any], bool] = lambda found, whole: found == whole


def plain(value: Any) -> Any:
    """Returns a value that ``==`` compares bit by bit, of tensors, arrays, dataclasses and containers."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _checkpoint(folder: Path) -> Any:
    """Returns the state that a run would start from, and the bytes of its files."""
    point = newest_intact(folder)
    assert point is not None, "there are checkpoints"
    return plain(point.state), {path.name: path.read_bytes() for path in point.folder.glob("*.pt")}


def _is_older_or_same(found: Any, whole: Any) -> bool:
    """A run may start from the checkpoint before: it says so, and makes the steps since then again."""
    return found == whole or found[0]["step"] < whole[0]["step"]


def _resumed_metrics(path: Path, step: int) -> int:
    """Returns how many lines a run that goes on from a step keeps."""
    forget_after(path, step)
    return len(read_steps(path)[0])


def _lacks_two_lines(found: int, whole: int) -> bool:
    """The damaged line is left out, and counted in the log; a damaged line end takes both lines that it divides."""
    return found >= whole - 2


def _cached(folder: Path, key: Any, layout: Any) -> dict[int, bytes]:
    """Returns the records that a run takes from a cache after a crash, by image."""
    FeatureCache.create_or_check(folder, key, layout)
    cache = FeatureCache(folder, layout, 0)
    try:
        cache.verify(progress=False)
        rows = np.flatnonzero(cache.present)
        return {
            int(i): b"".join(cache.read(np.array([i]), np.array([flip])).numpy().tobytes() for flip in (False, True))
            for i in rows
        }
    finally:
        cache.close()


def _is_part_of(found: dict[int, bytes], whole: dict[int, bytes]) -> bool:
    """Records that are missing are computed again."""
    return all(whole[i] == record for i, record in found.items())


def _indexed(data: Path) -> Any:
    source = open_source(data)
    images = [bytes(source.encoded(i)) for i in range(0, len(source), 17)]
    return len(source), source.num_classes, plain(np.asarray(source.labels)), images


def _embedded(embedder: Embedder, data: Path, folder: Path) -> Any:
    source = open_source(data)
    store = EmbeddingStore(embedder, folder, batch_size=_EMBEDDED, decoding=Decoding("torch", num_workers=0))
    return plain(store.load(SelectedImages(source, np.arange(_EMBEDDED)), "embedding"))


def weight_files(run: Path) -> list[Written]:
    """Returns the weights that a run has exported."""
    return [
        Written(path.name, path, lambda path=path: plain(dataclasses.replace(read_weights(path), source="")))  # type: ignore[misc]
        for path in sorted([*run.glob("*.pth"), *run.glob("*.pt")])
    ]


def run_files(stage: str, run: Path, arguments: Iterable[str]) -> list[Written]:
    """Returns what else lies in a run's folder.

    Args:
        stage: its name, for the report.
        arguments: of its launch, without the folder.
    """
    checkpoints, metrics = run / run_folder.CHECKPOINTS, run / METRICS_FILE
    newest = newest_intact(checkpoints)
    assert newest is not None, "the run has ended"
    step = newest.state.step
    config = parse([*arguments, "--output_dir", str(run), "--resume"])

    def start() -> Any:
        point = run_folder.claim(config)
        source = open_source(Path(config.data))
        same_inputs.check(config, source)
        return None if point is None else plain(point.state)

    files = [
        Written(f"{stage}: {name}", newest.folder / name, lambda: _checkpoint(checkpoints), _is_older_or_same)
        for name in (STATE_FILE, *sorted(path.name for path in newest.folder.glob("*.pt")))
    ]
    return [
        *files,
        Written(f"{stage}: latest", checkpoints / "latest", lambda: _checkpoint(checkpoints), _is_older_or_same),
        Written(f"{stage}: metrics.jsonl", metrics, lambda: _resumed_metrics(metrics, step), _lacks_two_lines),
        Written(f"{stage}: config.yaml", run / run_folder.CONFIG_FILE, start),
        Written(f"{stage}: inputs.json", run / same_inputs.FILE, start),
    ]


def index_file(data: Path) -> list[Written]:
    """Returns the index that was made of the data."""
    return [Written("index", data / "train.rec.index", lambda: _indexed(data))]


def other_files(model: Path, data: Path, cache: Path, work: Path) -> list[Written]:
    """Returns the feature cache, the index of the data, and stored embeddings, which are made here."""
    meta = read_meta(cache)
    embedder, store = Embedder(SCF.from_checkpoint(model), "cpu"), work / "embeddings"
    _embedded(embedder, data, store)
    features = [
        Written(f"cache: {name}", cache / name, lambda: _cached(cache, meta.key, meta.layout), _is_part_of)
        for name in ("meta.json", "checksums.bin", "rows-00000.bin")
    ]
    return [
        *features,
        *index_file(data),
        Written("embeddings", next(store.rglob("*.npz")), lambda: _embedded(embedder, data, store)),
    ]


def try_flips(written: Written, tries: int, rng: random.Random) -> collections.Counter[str]:
    """Flips one bit after the other, and returns how often it was detected, harmless and used.

    Raises:
        Exception: a reader has failed in a way that a command would show as a traceback.
    """
    counts: collections.Counter[str] = collections.Counter()
    kept = _Kept(written.path.parent)
    whole, content = written.read(), written.path.read_bytes()
    kept.put_back()
    for _ in range(tries):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        written.path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            found = written.read()
            outcome = HARMLESS if found == whole else DETECTED if written.is_same(found, whole) else USED
        except (ValueError, OSError) as error:  # what a command shows as one line
            outcome = DETECTED
            if type(error) is ValueError:
                raise
        if outcome == USED:
            print(f"    used: bit {bit} of byte {place} of {written.path}", flush=True)
        counts[outcome] += 1
        kept.put_back()
    return counts


class _Kept:
    """The contents of a folder, to be put back after a reader has set aside or made again what is in it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def put_back(self) -> None:
        for path in self._folder.iterdir():
            if path not in self._files and path.is_file():
                path.unlink()
        for path, content in self._files.items():
            path.write_bytes(content)


def flip_all(files: Iterable[Written], tries: int, rng: random.Random) -> dict[str, dict[str, int]]:
    """Tries and prints all kinds of files; returns the counts by kind."""
    results: dict[str, dict[str, int]] = {}
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what is detected is logged by the thousand
    try:
        for written in files:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                counts = try_flips(written, tries, rng)
            found = {outcome: counts[outcome] for outcome in (DETECTED, HARMLESS, USED)}
            results[written.name] = found
            print(f"  {written.name:22s} {', '.join(f'{key} {n:4d}' for key, n in found.items())}", flush=True)
    finally:
        logging.disable(before)
    return results
