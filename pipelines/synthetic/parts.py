"""Rendering of a set's pictures in parts, by several processes; an interrupted run keeps the parts that are done."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.synthetic.pictures import (
    TEMPLATE_IMAGES,
    TEMPLATES,
    VERIFICATION_IMAGES,
    Parameters,
    Picture,
    evaluation_pictures,
    train_pictures,
)
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, in_processes

FOLDER = ".parts"  # in the folder of the set, until that is complete
_IDENTITIES_PER_PART = 10
_RENDERERS = {"train": train_pictures, "evaluation": evaluation_pictures}


class Part(NamedTuple):
    """A few identities for training or for evaluation: the unit of work, and of what survives an interruption."""

    group: str  # a key of _RENDERERS
    identities: range

    def path(self, out: Path) -> Path:
        """Returns the file of the part."""
        return out / FOLDER / f"{self.group}-{self.identities.start:09d}.npz"

    def render(self, out: Path, parameters: Parameters) -> int:
        """Writes the part and returns its number of pictures."""
        pictures = [picture for identity in self.identities for picture in _RENDERERS[self.group](parameters, identity)]
        encoded, *columns = zip(*pictures)
        arrays: dict[str, Any] = dict(zip(Picture._fields[1:], map(np.array, columns)))  # savez has a flag of type bool
        arrays["encoded"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays["sizes"] = np.array([len(image) for image in encoded])
        with atomic_output(self.path(out)) as file:
            np.savez(file, **arrays)
        return len(pictures)

    def load(self, out: Path) -> Iterator[Picture]:
        """Yields the part's pictures."""
        with np.load(self.path(out)) as stored:
            columns = {name: stored[name] for name in (*Picture._fields, "sizes")}
        ends = np.cumsum(columns.pop("sizes"))
        encoded = columns.pop("encoded").tobytes()
        for row, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            yield Picture(encoded[start:end], *(columns[name][row] for name in Picture._fields[1:]))

    def count(self, out: Path) -> int:
        """Returns the number of pictures in the part's file."""
        with np.load(self.path(out)) as stored:
            return len(stored["sizes"])


def parts_of(parameters: Parameters) -> Iterator[Part]:
    """Yields every part of a set, in the order of identities."""
    train, evaluation = parameters.identities, parameters.identities + parameters.eval_identities
    for group, first, last in (("train", 0, train), ("evaluation", train, evaluation)):
        for start in range(first, last, _IDENTITIES_PER_PART):
            yield Part(group, range(start, min(start + _IDENTITIES_PER_PART, last)))


def load_pictures(out: Path, parameters: Parameters, split: str) -> Iterator[Picture]:
    """Yields all pictures of a split, in the order of identities."""
    group = "train" if split == "train" else "evaluation"
    for part in parts_of(parameters):
        if part.group == group:
            yield from (picture for picture in part.load(out) if picture.split == split)


def render_parts(out: Path, parameters: Parameters, workers: int, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Renders the parts that are missing, and shows the progress.

    Raises:
        InputError: a worker process has died, or none of them makes progress.
    """
    parts = list(parts_of(parameters))
    finished = [part for part in parts if part.path(out).exists()]
    missing = [part for part in parts if not part.path(out).exists()]
    per_template_identity = TEMPLATES * sum(TEMPLATE_IMAGES) / 2
    expected = round(
        parameters.identities * parameters.images_per_identity
        + parameters.eval_identities * (2 * VERIFICATION_IMAGES + per_template_identity)
    )
    reused = sum(part.count(out) for part in finished)
    with tqdm(total=expected, initial=reused, unit=" images", desc="rendering", smoothing=0.1) as progress:
        for count in _render(missing, out, parameters, min(workers, len(missing)), timeout):
            progress.update(count)
        progress.total = progress.n  # the sizes of templates are random, so the total was an expectation
        progress.refresh()


def _render(parts: list[Part], out: Path, parameters: Parameters, workers: int, timeout: float) -> Iterator[int]:
    """Renders parts, yielding the number of pictures in each as it is done."""
    if workers <= 1:
        for part in parts:
            yield part.render(out, parameters)
        return
    tasks = [(part, out, parameters) for part in parts]
    try:
        yield from in_processes(
            _render_part, tasks, workers, who="the synthetic set", doing="render pictures", timeout=timeout
        )
    except InputError as error:
        raise type(error)(f"{error}; the same command goes on with what lies in {out}") from error


def _render_part(task: tuple[Part, Path, Parameters]) -> int:
    part, out, parameters = task
    return part.render(out, parameters)
