"""Template verification protocols in the column layouts of IJB-B and IJB-C.

    meta/<name>_face_tid_mid.txt           image, template id, media id         one row for each image
    meta/<name>_name_5pts_score.txt        image, x1 y1 .. x5 y5, score         the same images in the same order
    meta/<name>_template_pair_label.txt    template id, template id, 0 or 1     one row for each comparison
    meta/<name>_1N_gallery_<G>.csv         template id, subject id, ...         enrolled templates
    meta/<name>_1N_probe_mixed.csv         template id, subject id, ...         templates to search for
    loose_crop/                            the images

IJB-C has 15.7 million comparisons. The galleries G are G1 and G2 in IJB-C, S1 and S2 in IJB-B. Columns of the text
files are separated by blanks; those of the CSV files, of which the 1:N protocol consists, have one header line and one
line for each image. Landmarks are in pixels of the crop: left eye, right eye, nose, left and right mouth corner.
"""

import csv
import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import BoolArray, ByteArray, IntArray, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output, write_bytes
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.formats.text_file import read_text_bytes
from scf_fast.pipelines.sources.base import ImageFiles, ImageSource, reason_of
from scf_fast.pipelines.sources.image_names import visible
from scf_fast.pipelines.text import shown

_IMAGES = "_face_tid_mid.txt"
_LANDMARKS = "_name_5pts_score.txt"
_PAIRS = "_template_pair_label.txt"
_GALLERY, _PROBES = "_1N_gallery_", "_1N_probe_mixed"
_CROPS = "loose_crop"


class TemplateProtocol(NamedTuple):
    """N images in templates, P template comparisons."""

    names: list[str]  # (N,) as in the meta files
    template_ids: IntArray  # (N,)
    media_ids: IntArray  # (N,) images of one video share it
    landmarks: npt.NDArray[np.float32]  # (N, 5, 2) x and y in pixels of the crop
    detector_score: npt.NDArray[np.float32]  # (N,)
    pair_template_ids: IntArray  # (P, 2)
    pair_labels: BoolArray  # (P,) whether both templates show one person
    source: ImageSource  # the N crops


@dataclass(frozen=True)
class Gallery:
    """A 1:N protocol over the templates of a TemplateProtocol: which are enrolled, and which are searched for."""

    name: str
    gallery_ids: IntArray  # (G,) template ids, one for each subject
    gallery_subjects: IntArray  # (G,) all different
    probe_ids: IntArray  # (Q,) template ids
    probe_subjects: IntArray  # (Q,)


def write_template_protocol(
    root: StrPath,
    name: str,
    *,
    names: Sequence[str],
    images: Iterable[bytes | ByteArray],
    template_ids: Iterable[int],
    media_ids: Iterable[int],
    landmarks: npt.ArrayLike,
    detector_score: npt.ArrayLike,
    pair_template_ids: Iterable[Sequence[int]],
    pair_labels: Iterable[bool],
    galleries: Sequence[Gallery] = (),
) -> None:
    """Writes crops and meta files; the file that read_template_protocol looks for comes last, after all others are on
    the disk.

    Args:
        root: folder, made if missing.
        name: prefix of the meta files, e.g. 'ijbc'.
        names: N file names, without blanks or folders.
        images: N image files in the same order, taken one at a time.
        template_ids, media_ids, landmarks, detector_score, pair_template_ids, pair_labels: as in TemplateProtocol.
        galleries: the 1:N protocol, all with the same probes; none leaves it out.
    """
    root = Path(root)
    for image_name, image in zip(names, images, strict=True):
        write_bytes(root / _CROPS / image_name, bytes(image), sync=False)
    os.sync()  # once for all crops; to wait for each would take a hundred times as long
    numbers = np.concatenate(
        [np.reshape(landmarks, (len(names), 10)), np.reshape(detector_score, (len(names), 1))], axis=1
    )
    _write_rows(
        root,
        name + _LANDMARKS,
        ([image_name, *(f"{value:.6g}" for value in row)] for image_name, row in zip(names, numbers)),
    )
    _write_rows(
        root, name + _PAIRS, ((*pair, int(label)) for pair, label in zip(pair_template_ids, pair_labels, strict=True))
    )
    images_of: dict[int, list[str]] = {}
    for image_name, template in zip(names, template_ids, strict=True):
        images_of.setdefault(int(template), []).append(image_name)
    for gallery in galleries[:1]:
        _write_subjects(root, f"{name}{_PROBES}.csv", gallery.probe_ids, gallery.probe_subjects, images_of)
    for gallery in galleries:
        _write_subjects(
            root, f"{name}{_GALLERY}{gallery.name}.csv", gallery.gallery_ids, gallery.gallery_subjects, images_of
        )
    _write_rows(root, name + _IMAGES, zip(names, template_ids, media_ids, strict=True))


def _write_subjects(
    root: Path, name: str, ids: IntArray, subjects: IntArray, images_of: Mapping[int, Sequence[str]]
) -> None:
    rows = (
        (template, subject, image)
        for template, subject in zip(ids, subjects, strict=True)
        for image in images_of[int(template)]
    )
    _write_rows(root, name, (("TEMPLATE_ID", "SUBJECT_ID", "FILENAME"), *rows), ",")


def _write_rows(root: Path, name: str, rows: Iterable[Iterable[Any]], separator: str = " ") -> None:
    with atomic_output(root / "meta" / name) as file:
        file.writelines(os.fsencode(separator.join(map(str, row))) + b"\n" for row in rows)


def read_template_protocol(root: StrPath) -> TemplateProtocol:
    """Reads the protocol in a folder.

    Raises:
        InputError: a file is missing, empty or malformed, the files disagree, a pair names a template without images,
            or a detector score is not finite and >= 0.
    """
    root = Path(root)
    if root.is_file():
        raise InputError(f"{root} must be a folder with meta/ and {_CROPS}/, and {refusal(root, Wanted.FOLDER)}")
    found = visible((root / "meta").glob("*" + _IMAGES))
    if len(found) != 1:
        raise InputError(
            f"{root}/meta must hold exactly one '*{_IMAGES}', found {[path.name for path in found]}; "
            "give the folder of one protocol"
        )
    prefix = str(found[0])[: -len(_IMAGES)]
    names, ids = _read_named_rows(prefix + _IMAGES, 2, np.int64)
    landmark_names, numbers = _read_named_rows(prefix + _LANDMARKS, 11, np.float32)
    if landmark_names != names:
        row = next(
            (row for row, (a, b) in enumerate(zip(names, landmark_names)) if a != b),
            min(len(names), len(landmark_names)),
        )
        raise InputError(
            f"{prefix}{_LANDMARKS} must list the images of {found[0].name} in the same order; they differ in row "
            f"{row + 1}"
        )
    score = numbers[:, 10]
    bad = np.flatnonzero(~(np.isfinite(score) & (score >= 0)))
    if len(bad):
        raise InputError(
            f"{prefix}{_LANDMARKS}: detector scores must be finite and >= 0, and {len(bad)} of {len(score)} are not, "
            f"the first in row {bad[0] + 1}: {score[bad[0]]}; repair the rows"
        )
    template_ids, media_ids = np.ascontiguousarray(ids.T)
    pair_template_ids, pair_labels = _read_pairs(prefix + _PAIRS, template_ids)
    return TemplateProtocol(
        names,
        template_ids,
        media_ids,
        numbers[:, :10].reshape(-1, 5, 2),
        score,
        pair_template_ids,
        pair_labels,
        ImageFiles(_crop_paths(root / _CROPS, names)),
    )


def _read(path: str) -> bytes:
    """Returns the text of a meta file."""
    try:
        return read_text_bytes(path)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {reason_of(error)}; the protocol is incomplete, restore the file"
        ) from error


def _read_named_rows(path: str, num_values: int, dtype: type[np.generic]) -> tuple[list[str], npt.NDArray[Any]]:
    """Returns (names, values): the first column, and the others as an (N, num_values) array; of lines that are not
    empty.
    """
    content = _read(path)
    # As bytes, which are split at the blanks of ASCII alone: names may hold others.
    rows = [line.split() for line in content.splitlines() if line.strip()]
    if not rows:
        raise InputError(f"{path} must list images, and is empty; restore the file")
    try:
        values = np.array([row[1:] for row in rows], dtype=dtype).reshape(len(rows), num_values)
    except (ValueError, OverflowError) as error:
        raise _bad_row(path, content, 1, num_values, dtype) from error
    return [os.fsdecode(row[0]) for row in rows], values


def _read_pairs(path: str, template_ids: IntArray) -> tuple[IntArray, BoolArray]:
    """Returns (template ids, labels) of the pairs, (P, 2) and (P,)."""
    text = _read(path)
    try:
        with warnings.catch_warnings():
            # NumPy warns where it meets something other than a number.
            warnings.simplefilter("error", DeprecationWarning)
            # 15.7 million rows in 5 s; row by row, minutes.
            values = np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 3)
    except (ValueError, DeprecationWarning) as error:
        raise _bad_row(path, text, 0, 3, np.int64) from error
    pairs, labels = np.ascontiguousarray(values[:, :2]), values[:, 2]
    unknown = ~np.isin(pairs, template_ids)
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise InputError(
            f"{path} names {len(np.unique(pairs[unknown]))} templates that have no image in '*{_IMAGES}', the first "
            f"in row {row + 1}: {pairs[row, column]}; take both files from the same set"
        )
    if not np.isin(labels, (0, 1)).all():
        row = int(np.argmin(np.isin(labels, (0, 1))))
        raise InputError(f"{path} row {row + 1} must end in label 0 or 1, got {labels[row]}; repair the row")
    return pairs, labels.astype(bool)


def _bad_row(path: str, content: bytes, num_names: int, num_values: int, dtype: type[np.generic]) -> InputError:
    """Returns the error that names the first malformed row."""

    def is_bad(row: Sequence[Any]) -> bool:
        try:
            np.array(row[num_names:], dtype=dtype).reshape(num_values)
        except (ValueError, OverflowError):
            return True
        return False

    rows = [line.split() for line in content.splitlines()]
    bad = [(number, row) for number, row in enumerate(rows, start=1) if row and is_bad(row)]
    if not bad:  # as with digits of another script, which only one of the two parsers accepts
        return InputError(
            f"{path} must hold {num_names + num_values} columns in every row, as plain text; repair the file"
        )
    number, row = bad[0]
    return InputError(
        f"{path} row {number} must hold {num_names + num_values} columns ({num_values} of them "
        f"{np.dtype(dtype).name}), got {shown(b' '.join(row), 80)}; repair the row"
    )


def _crop_paths(folder: Path, names: Sequence[str]) -> list[str]:
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot list the crops in {folder}: {reason_of(error)}; restore the folder") from error
    missing = [name for name in names if name not in present]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of the {len(names)} images, the first is {missing[0]}; restore them"
        )
    return [os.path.join(folder, name) for name in names]


def read_galleries(root: StrPath, protocol: TemplateProtocol) -> list[Gallery]:
    """Reads the 1:N files of a protocol's folder, of whose columns the first two count.

    Returns:
        by name; empty where there are no such files.
    Raises:
        InputError: there is a gallery without probes or the other way round, a file is malformed or names a template
            without images, a template has two subjects, or a subject two templates in the galleries.
    """
    meta = Path(root) / "meta"
    galleries, probes = visible(meta.glob(f"*{_GALLERY}*.csv")), visible(meta.glob(f"*{_PROBES}.csv"))
    if not galleries and not probes:
        return []
    if len(probes) != 1 or not galleries:
        raise InputError(
            f"{meta}: 1:N needs '*{_GALLERY}*.csv' and one '*{_PROBES}.csv', found {len(galleries)} and {len(probes)}; "
            "restore the files, or remove all of them to leave 1:N out"
        )
    known = np.unique(protocol.template_ids)
    probe_ids, probe_subjects = _read_subjects(probes[0], known)
    result = []
    for path in galleries:
        ids, subjects = _read_subjects(path, known)
        result.append(Gallery(path.stem.rpartition("_")[2], ids, subjects, probe_ids, probe_subjects))
    subjects, times = np.unique(np.concatenate([gallery.gallery_subjects for gallery in result]), return_counts=True)
    if (times > 1).any():
        raise InputError(
            f"{meta}: the galleries together must hold one template for each subject, got several of "
            f"{np.count_nonzero(times > 1)} subjects, the first {subjects[times > 1][0]}; repair the files"
        )
    return result


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the line at which it ends, row) for each row of a CSV file that is not empty."""
    reader = csv.reader(io.StringIO(_read(str(path)).decode(errors="surrogateescape"), newline=""))
    try:
        for row in reader:
            if any(map(str.strip, row)):
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{path} line {reader.line_num} is no line of a CSV file: {error}; restore the file"
        ) from error


def _read_subjects(path: Path, known: IntArray) -> tuple[IntArray, IntArray]:
    """Returns (template ids, subject ids), each template once."""
    rows: dict[int, int] = {}
    for line, row in itertools.islice(_csv_rows(path), 1, None):
        try:
            template, subject = np.array(row[:2], dtype=np.int64).tolist()
        except (ValueError, OverflowError):
            raise InputError(
                f"{path} line {line} must start with a template id and a subject id, got {shown(','.join(row), 80)}; "
                "repair the line"
            ) from None
        if rows.setdefault(template, subject) != subject:
            raise InputError(
                f"{path} line {line} gives template {template} to subject {subject}, an earlier one to "
                f"{rows[template]}; repair the lines"
            )
    if not rows:
        raise InputError(f"{path} must name templates, and is empty; restore the file")
    ids = np.array(list(rows), dtype=np.int64)
    unknown = ids[~np.isin(ids, known)]
    if len(unknown):
        raise InputError(
            f"{path} names {len(unknown)} templates without images, the first {unknown[0]}; take all meta files from "
            "the same set"
        )
    return ids, np.array(list(rows.values()), dtype=np.int64)
