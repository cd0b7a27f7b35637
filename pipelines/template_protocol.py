"""Template verification protocols in the column layouts of IJB-B and IJB-C.

    meta/<name>_face_tid_mid.txt           image, template id, media id         one row an image
    meta/<name>_name_5pts_score.txt        image, x1 y1 .. x5 y5, score         the same images in the same order
    meta/<name>_template_pair_label.txt    template id, template id, 0 or 1     one row a comparison (IJB-C: 15.7 million)
    loose_crop/                            the images

Columns are separated by blanks. Landmarks are in pixels of the crop: left eye, right eye, nose, left and right mouth corner.
"""
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.files import atomic_output
from pipelines.sources import ImageFiles

_IMAGES = "_face_tid_mid.txt"
_LANDMARKS = "_name_5pts_score.txt"
_PAIRS = "_template_pair_label.txt"
_CROPS = "loose_crop"


class TemplateProtocol(NamedTuple):
    """N images in templates, P template comparisons."""

    names: list  # N str, as in the meta files
    template_ids: np.ndarray  # (N,) int64
    media_ids: np.ndarray  # (N,) int64; images of one video share it
    landmarks: np.ndarray  # (N, 5, 2) float32, x and y in pixels of the crop
    detector_score: np.ndarray  # (N,) float32
    pair_template_ids: np.ndarray  # (P, 2) int64
    pair_labels: np.ndarray  # (P,) bool, whether both templates show one person
    source: ImageFiles  # the N crops


def write_template_protocol(root, name, *, names, images, template_ids, media_ids, landmarks, detector_score,
                            pair_template_ids, pair_labels):
    """Write crops and meta files; the file that read_template_protocol looks for comes last.

    Args:
        root: folder, made if missing.
        name: prefix of the meta files, e.g. 'ijbc'.
        names: N file names, without blanks or folders.
        images: N bytes-like in the same order, encoded; any iterable, taken one at a time.
        template_ids, media_ids, landmarks, detector_score, pair_template_ids, pair_labels: as in TemplateProtocol.
    """
    root = Path(root)
    for image_name, image in zip(names, images, strict=True):
        with atomic_output(root / _CROPS / image_name) as file:
            file.write(image)
    numbers = np.concatenate([np.reshape(landmarks, (len(names), 10)), np.reshape(detector_score, (len(names), 1))], axis=1)
    _write_rows(root, name + _LANDMARKS, ([image_name, *(f"{value:.6g}" for value in row)] for image_name, row in zip(names, numbers)))
    _write_rows(root, name + _PAIRS, ((*pair, int(label)) for pair, label in zip(pair_template_ids, pair_labels, strict=True)))
    _write_rows(root, name + _IMAGES, zip(names, template_ids, media_ids, strict=True))


def _write_rows(root, name, rows):
    with atomic_output(root / "meta" / name) as file:
        file.writelines(f"{' '.join(map(str, row))}\n".encode() for row in rows)


def read_template_protocol(root):
    """Read the protocol in folder `root`.

    Returns:
        TemplateProtocol.
    Raises:
        ValueError: a file is missing or malformed, the files disagree, or a pair names a template without images.
    """
    root = Path(root)
    found = sorted((root / "meta").glob("*" + _IMAGES))
    if len(found) != 1:
        raise ValueError(f"{root}/meta must hold exactly one '*{_IMAGES}', found {[path.name for path in found]}; "
                         "give the folder of one protocol")
    prefix = str(found[0])[:-len(_IMAGES)]
    names, ids = _read_named_rows(prefix + _IMAGES, 2, np.int64)
    landmark_names, numbers = _read_named_rows(prefix + _LANDMARKS, 11, np.float32)
    if landmark_names != names:
        row = next((row for row, (a, b) in enumerate(zip(names, landmark_names)) if a != b), min(len(names), len(landmark_names)))
        raise ValueError(f"{prefix}{_LANDMARKS} must list the images of {found[0].name} in the same order; they differ in row {row + 1}")
    template_ids, media_ids = np.ascontiguousarray(ids.T)
    pair_template_ids, pair_labels = _read_pairs(prefix + _PAIRS, template_ids)
    return TemplateProtocol(
        names, template_ids, media_ids, numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10], pair_template_ids, pair_labels,
        ImageFiles(_crop_paths(root / _CROPS, names)))


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {os.strerror(error.errno)}; the protocol is incomplete, restore the file") from error


def _read_named_rows(path, num_values, dtype):
    """(names, values): the first column as N str, the others as an (N, num_values) array."""
    rows = [line.split() for line in _read(path).decode().splitlines()]
    try:
        values = np.array([row[1:] for row in rows], dtype=dtype).reshape(len(rows), num_values)
    except ValueError as error:
        raise _bad_row(path, rows, 1, num_values, dtype) from error
    return [row[0] for row in rows], values


def _read_pairs(path, template_ids):
    """((P, 2) int64 template ids, (P,) bool labels)."""
    text = _read(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # NumPy's way to say that it met something else than a number
            values = np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 3)  # 15.7 million rows in 5 s; row by row, minutes
    except (ValueError, DeprecationWarning) as error:
        raise _bad_row(path, [line.split() for line in text.decode(errors="replace").splitlines()], 0, 3, np.int64) from error
    pairs, labels = np.ascontiguousarray(values[:, :2]), values[:, 2]
    unknown = ~np.isin(pairs, template_ids)
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise ValueError(f"{path} row {row + 1} names template {pairs[row, column]}, which has no image in '*{_IMAGES}'; "
                         "take both files from the same set")
    if not np.isin(labels, (0, 1)).all():
        row = np.flatnonzero(~np.isin(labels, (0, 1)))[0]
        raise ValueError(f"{path} row {row + 1} must end in label 0 or 1, got {labels[row]}; repair the row")
    return pairs, labels.astype(bool)


def _bad_row(path, rows, num_names, num_values, dtype):
    """The error that names the first malformed row."""
    def is_bad(row):
        try:
            np.array(row[num_names:], dtype=dtype).reshape(num_values)
        except ValueError:
            return True
        return False

    number, row = next((number, row) for number, row in enumerate(rows, start=1) if is_bad(row))
    return ValueError(f"{path} row {number} must hold {num_names + num_values} columns ({num_values} of them {np.dtype(dtype).name}), "
                      f"got {' '.join(row)[:80]!r}; repair the row")


def _crop_paths(folder, names):
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"cannot list the crops in {folder}: {os.strerror(error.errno)}; restore the folder") from error
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the {len(names)} images, the first is {missing[0]}; restore them")
    return [os.path.join(folder, name) for name in names]
