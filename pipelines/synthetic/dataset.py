"""The files of a synthetic data set, in the formats that real ones are shipped in.

OUT/train/            train.rec, train.idx and property as MS1M and Glint360K ship them;
                      severity.csv (record_id,label,severity)
OUT/verification/     clean.bin and mixed.bin as insightface ships lfw.bin;
                      clean.csv and mixed.csv (image,identity,severity)
OUT/templates/        meta/ and loose_crop/ as in IJB-C, 1:1 and 1:N; severity.csv (name,identity,severity)
OUT/contact_sheet.png a look at the pictures
OUT/manifest.json     parameters and counts, written last: where it lies, the set is complete
"""

import csv
import dataclasses
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, write_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.formats.atomic_file import atomic_output, write_json
from scf_fast.pipelines.formats.recordio import RecordWriter, write_property
from scf_fast.pipelines.synthetic import parts
from scf_fast.pipelines.synthetic.pictures import (
    FOLDS,
    TEMPLATE_MEDIA,
    TEMPLATES,
    VERIFICATION_IMAGES,
    Parameters,
    Stream,
    contact_sheet,
    stream_rng,
)
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT

FORMAT = 2  # of the folder and of the pictures: raise it with any change that alters either

_GENUINE_PER_IDENTITY = 7.5  # pairs; as many impostor pairs: 3000 pairs for 200 identities
_IMPOSTORS_PER_IDENTITY = 500  # template pairs: enough for a false accept rate of 1e-4 with 200 identities
_SHEET_ROWS = 7

_Pair = tuple[tuple[int, int], tuple[int, int]]  # (identity, index) of both pictures


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_output(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        text.flush()
        text.detach()


def _write_train(out: Path, parameters: Parameters) -> int:
    """Writes the training records and their severities. Returns the number of pictures."""
    folder = out / "train"
    images, total = parameters.images_per_identity, parameters.identities * parameters.images_per_identity
    severities = []
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        writer.write_header_record(total, parameters.identities)
        for record_id, picture in enumerate(parts.load_pictures(out, parameters, "train"), start=1):
            writer.write_image(record_id, int(picture.identity), picture.encoded)
            severities.append((record_id, picture.identity, f"{picture.severity:.6f}"))
        for identity in range(parameters.identities):
            first = 1 + identity * images
            writer.write_identity_record(total + 1 + identity, first, first + images - 1)
    write_property(folder, parameters.identities, FACE_SIZE, FACE_SIZE)
    _write_csv(folder / "severity.csv", ("record_id", "label", "severity"), severities)
    return total


def _fold_pairs(rng: np.random.Generator, identities: list[int], genuine: int) -> Iterator[_Pair]:
    """Yields ``genuine`` different pairs of one identity, then as many of two identities, all out of one fold."""
    own = list(itertools.combinations(range(VERIFICATION_IMAGES), 2))
    shares = np.bincount(np.resize(rng.permutation(len(identities)), genuine), minlength=len(identities))
    for identity, share in zip(identities, shares):
        for which in rng.choice(len(own), share, replace=False):
            yield (identity, own[which][0]), (identity, own[which][1])
    seen: set[_Pair] = set()
    while len(seen) < genuine:
        first, second = sorted(rng.choice(len(identities), 2, replace=False))
        index, other_index = rng.integers(VERIFICATION_IMAGES, size=2).tolist()
        pair = (identities[first], index), (identities[second], other_index)
        if pair not in seen:
            seen.add(pair)
            yield pair


def _write_verification(out: Path, parameters: Parameters, split: str) -> int:
    """Writes one verification set. Returns its number of pairs.

    Pairs come fold by fold, so that consecutive tenths of the file are its folds; no identity is in two of them.
    """
    pool = {
        identity: list(group)
        for identity, group in itertools.groupby(
            parts.load_pictures(out, parameters, split), lambda picture: int(picture.identity)
        )
    }
    rng = stream_rng(parameters.seed, Stream.CLEAN_PAIRS if split == "clean" else Stream.MIXED_PAIRS)
    genuine = int(_GENUINE_PER_IDENTITY * parameters.eval_identities / FOLDS)
    pairs: list[_Pair] = []
    for fold in np.array_split(rng.permutation(list(pool)), FOLDS):
        pairs += _fold_pairs(rng, fold.tolist(), genuine)
    pictures = [pool[identity][index] for pair in pairs for identity, index in pair]
    write_verification_set(
        out / "verification" / f"{split}.bin",
        [picture.encoded for picture in pictures],
        [a[0] == b[0] for a, b in pairs],
    )
    _write_csv(
        out / "verification" / f"{split}.csv",
        ("image", "identity", "severity"),
        ((position, picture.identity, f"{picture.severity:.6f}") for position, picture in enumerate(pictures)),
    )
    return len(pairs)


def _template_pairs(rng: np.random.Generator, eval_identities: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws pairs of templates: all genuine ones and a random choice of impostors, shuffled.

    Returns:
        pairs: (P, 2) template ids, which count from 1.
        same: (P,) bool, which pairs are genuine.
    """
    count = eval_identities * TEMPLATES
    first, second = np.triu_indices(count, 1)
    same = first // TEMPLATES == second // TEMPLATES
    impostors = np.flatnonzero(~same)
    chosen = rng.choice(impostors, min(len(impostors), _IMPOSTORS_PER_IDENTITY * eval_identities), replace=False)
    order = rng.permutation(np.concatenate([np.flatnonzero(same), chosen]))
    return np.stack([first[order], second[order]], axis=1) + 1, same[order]


def _galleries(eval_identities: int) -> list[Gallery]:
    """Returns two galleries for 1:N as in IJB-C.

    The first template of each identity is enrolled, in G1 or G2 in turn; the others are searched for in both.
    """
    ids = np.arange(eval_identities * TEMPLATES).reshape(eval_identities, TEMPLATES) + 1
    subjects = np.arange(eval_identities) + 1
    probes, probe_subjects = ids[:, 1:].ravel(), np.repeat(subjects, TEMPLATES - 1)
    return [
        Gallery(name, ids[start::2, 0], subjects[start::2], probes, probe_subjects)
        for start, name in enumerate(("G1", "G2"))
    ]


def _write_templates(out: Path, parameters: Parameters) -> dict[str, int]:
    """Writes the template protocol and returns its counts.

    Landmarks are the true ones; there is no detector, so every score is 1.
    """
    pictures = list(parts.load_pictures(out, parameters, "templates"))
    names = [f"{number}.jpg" for number in range(1, len(pictures) + 1)]
    identity, template, medium = np.array(
        [(picture.identity, picture.template, picture.medium) for picture in pictures]
    ).T
    template_ids = (identity - parameters.identities) * TEMPLATES + template + 1
    media_ids = np.unique(template_ids * (TEMPLATE_MEDIA[1] + 1) + medium, return_inverse=True)[1] + 1
    pairs, same = _template_pairs(stream_rng(parameters.seed, Stream.TEMPLATE_PAIRS), parameters.eval_identities)
    write_template_protocol(
        out / "templates",
        "synthetic",
        names=names,
        images=[picture.encoded for picture in pictures],
        template_ids=template_ids,
        media_ids=media_ids,
        landmarks=np.stack([picture.landmarks for picture in pictures]),
        detector_score=np.ones(len(names)),
        pair_template_ids=pairs,
        pair_labels=same,
        galleries=_galleries(parameters.eval_identities),
    )
    _write_csv(
        out / "templates" / "severity.csv",
        ("name", "identity", "severity"),
        ((name, picture.identity, f"{picture.severity:.6f}") for name, picture in zip(names, pictures)),
    )
    return {
        "images": len(names),
        "templates": int(template_ids.max()),
        "media": int(media_ids.max()),
        "pairs": len(same),
        "genuine_pairs": int(same.sum()),
    }


def _claim(out: Path, parameters: Parameters, overwrite: bool) -> bool:
    """Makes ``out`` ours to write for these parameters. Returns whether it already holds the complete set."""
    wanted = {"format": FORMAT, **dataclasses.asdict(parameters)}
    manifest, note = out / "manifest.json", out / parts.FOLDER / "parameters.json"
    if overwrite:
        for ours in ("manifest.json", parts.FOLDER, "train", "verification", "templates", "contact_sheet.png"):
            path = out / ours
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    held = next((path for path in (manifest, note) if path.exists()), None)
    if held is None:
        if not overwrite and out.exists() and any(out.iterdir()):
            raise InputError(
                f"{out} must be empty or hold a synthetic set, and holds other files: choose another folder, or pass "
                "--overwrite"
            )
        write_json(note, {"parameters": wanted})
        return False
    found = _read_parameters(held)
    if found != wanted:
        raise InputError(
            f"{out} holds another synthetic set ({_differences(found, wanted)}): choose another folder, or pass "
            "--overwrite"
        )
    return held == manifest


def _read_parameters(path: Path) -> dict[str, object]:
    """Returns the parameters that a manifest states, or the note that an interrupted run has left."""
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    parameters = content.get("parameters") if isinstance(content, dict) else None
    if not isinstance(parameters, dict):
        raise InputError(f"{path} is damaged: choose another folder, or pass --overwrite to write the set again")
    return parameters


def _differences(found: dict[str, object], wanted: dict[str, int]) -> str:
    return ", ".join(
        f"{name} is {found.get(name)} there and {value} here"
        for name, value in wanted.items()
        if found.get(name) != value
    )


def write_synthetic_set(
    out: str | os.PathLike[str],
    parameters: Parameters,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> dict:
    """Writes a set, or completes one that was interrupted, or leaves a complete one as it is.

    Args:
        out: folder, made if missing.
        parameters: which set.
        workers: processes; None takes one for each core that this process may use.
        overwrite: remove a set of other parameters, and write into a folder that holds other files.
        timeout: seconds in which no process has rendered a part, see :mod:`scf_fast.pipelines.waiting`.
    Returns:
        The manifest.
    Raises:
        InputError: the folder holds something else, and ``overwrite`` is not given; or a worker process has died.
    """
    out = Path(out)
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if not _claim(out, parameters, overwrite):
        parts.render_parts(out, parameters, workers or len(os.sched_getaffinity(0)), timeout)
        _write_files(out, parameters)
    shutil.rmtree(out / parts.FOLDER, ignore_errors=True)
    return json.loads((out / "manifest.json").read_text())


def _write_files(out: Path, parameters: Parameters) -> None:
    """Writes everything but the parts, the manifest last."""
    counts: dict[str, dict] = {"train": {"images": _write_train(out, parameters), "identities": parameters.identities}}
    if parameters.eval_identities:
        counts["verification"] = {
            split: {"pairs": _write_verification(out, parameters, split)} for split in ("clean", "mixed")
        }
        counts["templates"] = _write_templates(out, parameters)
    first_shown = parameters.identities if parameters.eval_identities else 0
    with atomic_output(out / "contact_sheet.png") as file:
        contact_sheet(parameters.seed, range(first_shown, first_shown + _SHEET_ROWS)).save(file, "PNG")
    manifest = {
        "parameters": {"format": FORMAT, **dataclasses.asdict(parameters)},
        "counts": counts,
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
    }
    write_json(out / "manifest.json", manifest, indent=2)
