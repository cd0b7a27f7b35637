"""Data sets of the evaluation: pairs, templates and subjects, opened and checked before the first image is embedded."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scf_fast.errors import InputError
from scf_fast.evaluation.alignment import AlignedFaces
from scf_fast.evaluation.quality import read_severity
from scf_fast.inference_arguments import find_images
from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.evaluation_sets.template_protocol import (
    Gallery,
    TemplateProtocol,
    read_galleries,
    read_template_protocol,
)
from scf_fast.pipelines.evaluation_sets.verification_set import draw_pairs, read_verification_set
from scf_fast.pipelines.formats.file_kinds import Wanted
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.index import holds_shards_alone, open_source
from scf_fast.pipelines.sources.base import ImageFiles, ImageSource
from scf_fast.pipelines.sources.image_names import visible
from scf_fast.pipelines.text import shown

_BLANKS = " \t\f\v"  # those of ASCII: names may hold others


_LFW_HEADER = re.compile(r"\s*\d+(\s+\d+)?\s*")  # folds and pairs of a kind in each; without folds in pairsDevTest.txt


@dataclass(frozen=True)
class PairSet:
    """Verification pairs of aligned faces."""

    name: str
    source: ImageSource  # images 2k and 2k + 1 are pair k
    same: np.ndarray  # (P,) bool
    severity: np.ndarray | None  # (2P,) known degradation in [0, 1]
    drawn: str = ""  # how the pairs were drawn, where no file names them
    skipped: Mapping[str, int] = field(default_factory=dict)  # files that are no images, by reason

    def as_list(self) -> str:
        """Returns the pairs as text that read_pair_list reads, with absolute paths."""
        path = [os.path.abspath(self.source.name(i)) for i in range(len(self.source))]
        return "".join(f"{path[2 * k]}\t{path[2 * k + 1]}\t{int(same)}\n" for k, same in enumerate(self.same))


@dataclass(frozen=True)
class TemplateSet:
    """A template protocol in IJB's layout, its faces aligned when they are read."""

    name: str
    protocol: TemplateProtocol
    source: ImageSource
    galleries: list[Gallery]
    severity: np.ndarray | None  # (N,) known degradation of the images in [0, 1]


class Subjects(NamedTuple):
    """Aligned faces of named subjects."""

    source: ImageSource
    names: np.ndarray  # (N,) str
    skipped: Mapping[str, int]  # files and folders that are no images, by reason


def open_pair_sets(paths: list[Path], num_pairs: int = 6000, seed: int = 0) -> dict[str, PairSet]:
    """Opens verification sets; returns them by name.

    A path is a ``.bin`` file, a text file of pairs, a folder of ``.bin`` files (or one that holds such a folder,
    ``verification``), or a folder with one folder of images for each identity, from which pairs are drawn. Known
    severities are in a CSV beside a ``.bin``, under its name (columns image and severity).

    Args:
        num_pairs, seed: for pairs that are drawn, see scf_fast.pipelines.evaluation_sets.verification_set.draw_pairs.
    Raises:
        InputError: nothing is there, a file is malformed or measures nothing, or two sets have the same name.
    """
    sets: dict[str, PairSet] = {}
    for path in paths:
        bins = [*path.glob("*.bin"), *(path / "verification").glob("*.bin")]
        found = visible(bins) if path.is_dir() else [path]
        for pairs in map(_open_pair_set, found) if found else [_draw_pair_set(path, num_pairs, seed)]:
            if pairs.name in sets:
                raise InputError(
                    f"two verification sets are named {pairs.name}, the second in {path}; rename one of them"
                )
            sets[pairs.name] = pairs
    return sets


def _draw_pair_set(path: Path, num_pairs: int, seed: int) -> PairSet:
    if not any(child.is_dir() for child in path.iterdir()):
        raise InputError(
            f"{path} must hold verification sets (*.bin or verification/*.bin) or one folder of images for each "
            "identity; give the folder or the file that has them (python -m scf_fast.embed scores pictures without "
            "identities)"
        )
    source, names, skipped = open_subjects(path)
    labeled = ImageFiles(list(map(source.name, range(len(source)))), np.unique(names, return_inverse=True)[1])
    try:
        pairs = draw_pairs(labeled, num_pairs, seed=seed)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    images = ImageFiles([pairs.source.name(i) for i in range(len(pairs.source))])
    drawn = f"{num_pairs} pairs of {path} drawn with seed {seed}"
    return PairSet(path.resolve().name, images, pairs.same, None, drawn, skipped)


def _open_pair_set(path: Path) -> PairSet:
    source, same = read_verification_set(path) if path.suffix == ".bin" else read_pair_list(path)
    check_pairs(path, same)
    severity = path.with_suffix(".csv")
    known = (
        read_severity(severity, "image", list(map(str, range(len(source)))))
        if path.suffix == ".bin" and severity.exists()
        else None
    )
    return PairSet(path.stem, source, same, known)


def read_pair_list(path: Path) -> tuple[ImageFiles, np.ndarray]:
    """Reads pairs from a text file with lines ``path path label``, label 1 for one person and 0 for two.

    Blanks separate the columns, or tabs where paths hold blanks; relative paths start from the file's folder.
    Consecutive tenths of the lines are the folds. LFW's own ``pairs.txt`` is read too: a line with the numbers of folds
    and pairs, then ``name i j`` for one person and ``name i name j`` for two; images are ``name/name_000i.jpg``, or
    ``.png``.

    Returns:
        Images, 2k and 2k + 1 of line k, and (P,) bool.
    Raises:
        InputError: the file cannot be read, a line is malformed, or an image is not there.
    """
    try:
        lines = read_text(path, Wanted.PAIRS).split("\n")
    except OSError as error:
        raise InputError(f"cannot read the pairs {path}: {error.strerror}; check the path") from error
    if _LFW_HEADER.fullmatch(lines[0]):
        lines = _lfw_pairs(path, lines)
    images, same = [], []
    for number, line in enumerate(lines, 1):
        line = line.strip(_BLANKS)
        words = line.split("\t") if "\t" in line else re.split(f"[{_BLANKS}]+", line)
        if not any(words):
            continue
        if len(words) != 3 or words[2] not in ("0", "1"):
            raise InputError(
                f"{path} line {number} must be `path path label` with label 0 or 1, got {shown(line, 80)}; repair the "
                "line"
            )
        for word in words[:2]:
            image = path.parent / word
            if not image.exists():
                raise InputError(
                    f"{path} line {number} names {image}, and there is no such file; check the folder that the paths "
                    "start from"
                )
            images.append(image)
        same.append(words[2] == "1")
    return ImageFiles(images), np.array(same, dtype=bool)


def _lfw_pairs(path: Path, lines: list[str]) -> list[str]:
    """Returns the lines of LFW's ``pairs.txt`` as ``path path label`` with tabs between, under the same numbers.

    Raises:
        InputError: a line is malformed.
    """
    suffix = ".jpg"
    pairs = [""]
    for number, line in enumerate(lines[1:], 2):
        words = line.strip(_BLANKS).split("\t" if "\t" in line else None)
        if not any(words):
            pairs.append("")
            continue
        if len(words) == 3:
            words = [words[0], words[1], words[0], words[2]]
        if len(words) != 4 or not (words[1].isdecimal() and words[3].isdecimal()):
            raise InputError(
                f"{path} line {number} must be `name i j` or `name i name j`, as in LFW's pairs.txt, got "
                f"{shown(line, 80)}; repair the line"
            )
        names = [f"{name}/{name}_{int(i):04d}" for name, i in (words[:2], words[2:])]
        if len(pairs) == 1 and not (path.parent / f"{names[0]}{suffix}").exists():
            suffix = ".png"
        pairs.append(f"{names[0]}{suffix}\t{names[1]}{suffix}\t{int(words[0] == words[2])}")
    return pairs


def check_pairs(path: StrPath, same: np.ndarray) -> None:
    """Checks that the pairs read from a path can measure something.

    Raises:
        InputError: there are too few pairs, or only genuine or only impostor ones.
    """
    genuine = np.count_nonzero(same)
    if len(same) < 10 or genuine in (0, len(same)):
        raise InputError(
            f"{path} must have at least 10 pairs, genuine and impostor ones among them, got {len(same)} with "
            f"{genuine} genuine; leave it out"
        )


def is_template_set(path: Path) -> bool:
    """Returns True for a folder in IJB's layout."""
    return (path / "meta").is_dir()


def open_template_set(path: Path, align: bool = True) -> TemplateSet:
    """Opens a protocol folder (meta, loose_crop), with its 1:N files and severity.csv (columns name and severity) if
    it has them.

    Args:
        align: False says that the crops are aligned faces already, and leaves the landmarks unused.
    Raises:
        InputError: as in read_template_protocol, read_galleries and AlignedFaces, or the pairs measure nothing.
    """
    protocol = read_template_protocol(path)
    check_pairs(path, protocol.pair_labels)
    severity = path / "severity.csv"
    return TemplateSet(
        _protocol_name(path),
        protocol,
        AlignedFaces(protocol.source, protocol.landmarks) if align else protocol.source,
        read_galleries(path, protocol),
        read_severity(severity, "name", protocol.names) if severity.exists() else None,
    )


def _protocol_name(path: Path) -> str:
    """Returns the prefix of the meta files; for IJB's own two protocols in its usual spelling."""
    prefix = visible((path / "meta").glob("*_face_tid_mid.txt"))[0].name.removesuffix("_face_tid_mid.txt")
    return {"ijbb": "IJB-B", "ijbc": "IJB-C"}.get(prefix.lower(), prefix)


def open_subjects(path: Path) -> Subjects:
    """Opens faces by subject: a folder with one folder for each subject, or any other data set of
    scf_fast.pipelines.index.open_source, such as a list of lines ``path label``, whose subjects are its labels.

    Raises:
        InputError: nothing is there, it is damaged, or it holds no image.
    """
    if not path.is_dir() or holds_shards_alone(path):
        source = open_source(path)
        return Subjects(source, source.labels.astype(str), source.skipped)
    images, skipped = find_images([path])
    loose = next((image for image in images if image.parent == path), None)
    if loose is not None:
        raise InputError(
            f"{path} must hold one folder for each subject, and holds the image {loose.name}; put it in its subject's "
            "folder"
        )
    names = np.array([image.relative_to(path).parts[0] for image in images])
    return Subjects(ImageFiles(images), names, skipped)
