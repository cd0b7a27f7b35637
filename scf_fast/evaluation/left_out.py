"""What becomes of an evaluation whose data set has images that cannot be decoded.

They are met after hours of work, so they do not end it: the pairs, templates and searches that need them are left out,
and the report says how many and which. No score is ever made up for them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scf_fast.errors import InputError
from scf_fast.evaluation.datasets import PairSet, Subjects, TemplateSet, check_pairs
from scf_fast.inference import Embeddings
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery
from scf_fast.pipelines.sources.base import SelectedImages

_LISTED = 10  # images that a note names


class UsablePairs(NamedTuple):
    """A pair set without the pairs that have an image left out."""

    data: PairSet
    embeddings: Embeddings
    notes: list[str]


class UsableTemplates(NamedTuple):
    """A template set without the images left out, and without what consists of them alone."""

    data: TemplateSet
    embeddings: Embeddings
    notes: list[str]


class UsableSubjects(NamedTuple):
    """Faces of subjects without the images left out."""

    data: Subjects
    embeddings: Embeddings
    notes: list[str]


def usable_pairs(pairs: PairSet, embeddings: Embeddings) -> UsablePairs:
    """Leaves out the pairs with an image that has no embedding.

    Raises:
        InputError: what is left measures nothing.
    """
    notes = skipped_notes(pairs.name, pairs.skipped)
    if not embeddings.left_out:
        return UsablePairs(pairs, embeddings, notes)
    keep = ~_is_left_out(embeddings).reshape(-1, 2).any(axis=1)
    rows = np.flatnonzero(keep.repeat(2))
    data = PairSet(
        pairs.name,
        SelectedImages(pairs.source, rows, with_labels=False),
        pairs.same[keep],
        None if pairs.severity is None else pairs.severity[rows],
        pairs.drawn,
        pairs.skipped,
    )
    what = [f"{len(pairs.same) - len(data.same):,} of {len(pairs.same):,} pairs"]
    _check_pairs(pairs.name, data.same, embeddings)
    return UsablePairs(data, embeddings.select(rows), [_note(pairs.name, what, embeddings), *notes])


def usable_templates(templates: TemplateSet, embeddings: Embeddings) -> UsableTemplates:
    """Leaves out the images without an embedding, the templates that consist of such images alone, and the pairs,
    enrolled subjects and searches of these templates.

    Raises:
        InputError: what is left measures nothing.
    """
    if not embeddings.left_out:
        return UsableTemplates(templates, embeddings, [])
    protocol = templates.protocol
    rows = np.flatnonzero(~_is_left_out(embeddings))
    source = SelectedImages(templates.source, rows, with_labels=False)
    there = np.unique(protocol.template_ids[rows])
    pairs_kept = np.isin(protocol.pair_template_ids, there).all(axis=1)
    galleries = [_without(gallery, there) for gallery in templates.galleries]
    data = TemplateSet(
        templates.name,
        protocol._replace(
            names=[protocol.names[row] for row in rows.tolist()],
            template_ids=protocol.template_ids[rows],
            media_ids=protocol.media_ids[rows],
            landmarks=protocol.landmarks[rows],
            detector_score=protocol.detector_score[rows],
            pair_template_ids=protocol.pair_template_ids[pairs_kept],
            pair_labels=protocol.pair_labels[pairs_kept],
            source=source,
        ),
        source,
        galleries,
        None if templates.severity is None else templates.severity[rows],
    )
    lost = {
        "templates": len(np.unique(protocol.template_ids)) - len(there),
        "pairs": np.count_nonzero(~pairs_kept),
        "enrolled templates": _count(templates.galleries, "gallery_ids") - _count(galleries, "gallery_ids"),
        "searches": _count(templates.galleries[:1], "probe_ids") - _count(galleries[:1], "probe_ids"),
    }
    _check_pairs(templates.name, data.protocol.pair_labels, embeddings)
    if any(not len(gallery.gallery_ids) or not len(gallery.probe_ids) for gallery in galleries):
        raise _nothing_left(templates.name, embeddings)
    what = [f"{count:,} {kind}" for kind, count in lost.items() if count]
    return UsableTemplates(data, embeddings.select(rows), [_note(templates.name, what, embeddings)])


def usable_subjects(name: str, subjects: Subjects, embeddings: Embeddings) -> UsableSubjects:
    """Leaves out the images without an embedding, and the subjects that have no other.

    Raises:
        InputError: nothing is left.
    """
    notes = skipped_notes(name, subjects.skipped)
    if not embeddings.left_out:
        return UsableSubjects(subjects, embeddings, notes)
    rows = np.flatnonzero(~_is_left_out(embeddings))
    if not len(rows):
        raise _nothing_left(name, embeddings)
    data = Subjects(SelectedImages(subjects.source, rows), subjects.names[rows], subjects.skipped)
    lost = len(np.unique(subjects.names)) - len(np.unique(data.names))
    what = [f"{len(embeddings.left_out):,} of {len(embeddings):,} images"]
    what += [f"{lost:,} subjects that have no other"] if lost else []
    return UsableSubjects(data, embeddings.select(rows), [_note(name, what, embeddings), *notes])


def skipped_notes(name: str, skipped: Mapping[str, int]) -> list[str]:
    """Returns a note on the files of a data set that were skipped because they are no images, where there are any."""
    counted = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count)
    return [f"{name}: skipped {counted}."] if counted else []


def _is_left_out(embeddings: Embeddings) -> np.ndarray:
    return np.isin(np.arange(len(embeddings)), list(embeddings.left_out))


def _without(gallery: Gallery, there: np.ndarray) -> Gallery:
    enrolled, probes = np.isin(gallery.gallery_ids, there), np.isin(gallery.probe_ids, there)
    return Gallery(
        gallery.name,
        gallery.gallery_ids[enrolled],
        gallery.gallery_subjects[enrolled],
        gallery.probe_ids[probes],
        gallery.probe_subjects[probes],
    )


def _count(galleries: Sequence[Gallery], field: str) -> int:
    return sum(len(getattr(gallery, field)) for gallery in galleries)


def _note(name: str, what: list[str], embeddings: Embeddings) -> str:
    reasons = list(dict.fromkeys(embeddings.left_out.values()))  # a pair set may have an image many times
    listed = "; ".join(reasons[:_LISTED])
    if len(reasons) > _LISTED:
        listed += f"; and {len(reasons) - _LISTED:,} more, which the log names"
    parts = f"; {', '.join(what)} are left out" if what else ""
    return f"{name}: {len(embeddings.left_out):,} images cannot be decoded{parts}: {listed}."


def _check_pairs(name: str, same: np.ndarray, embeddings: Embeddings) -> None:
    try:
        check_pairs(name, same)
    except InputError:
        raise _nothing_left(name, embeddings) from None


def _nothing_left(name: str, embeddings: Embeddings) -> InputError:
    first = next(iter(embeddings.left_out.values()))
    return InputError(
        f"{name}: {len(embeddings.left_out)} of {len(embeddings)} images cannot be decoded, and the others measure "
        f"nothing; the first: {first}"
    )
