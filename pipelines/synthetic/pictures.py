"""The pictures of a synthetic data set: which faces, variations and degradations each identity has.

Picture number ``index`` of an identity is a pure function of (seed, split, identity, index): neither the number of
identities, of pictures or of processes, nor the place where a run was interrupted changes it. The same versions of
NumPy and Pillow on the same kind of processor give the same bytes.

Training identities are 0..N-1, their class labels; evaluation identities are N..N+E-1. Severities are those of
``degradations``: uniform in [0, 0.1] for 40 % of the training pictures and in [0, 1] for the others, 0 in ``clean``,
uniform in [0, 1] in ``mixed`` and in the templates.
"""

import dataclasses
import enum
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.synthetic.degradations import KINDS, degrade, draw_amounts
from scf_fast.pipelines.synthetic.faces import Face
from scf_fast.pipelines.synthetic.rendering import render_face
from scf_fast.pipelines.synthetic.traits import Identity, Variation

FOLDS = 10  # of a verification set
VERIFICATION_IMAGES = 12  # pictures of an identity that the pairs of one verification set draw on
TEMPLATES = 4  # of an identity
TEMPLATE_IMAGES = (3, 8)  # fewest and most in a template
TEMPLATE_MEDIA = (1, 3)  # fewest and most in a template
_NEAR_CLEAN_SHARE, _NEAR_CLEAN_SEVERITY = 0.4, 0.1
# Common to all frames of a medium.
_SCENE = (
    "light_azimuth",
    "light_elevation",
    "light_strength",
    "gain",
    "warmth",
    "tint",
    "saturation",
    "background",
)


class Stream(enum.IntEnum):
    """First word of a random stream after the seed; the numbers are part of the format.

    So is the order of the draws from a stream.
    """

    FACE = 0
    TRAIN = 1
    CLEAN = 2
    MIXED = 3
    TEMPLATE_PLAN = 4
    TEMPLATE = 5
    CLEAN_PAIRS = 6
    MIXED_PAIRS = 7
    TEMPLATE_PAIRS = 8
    SHEET = 9


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters that determine a set."""

    identities: int = 1000  # for training
    images_per_identity: int = 20  # for training
    eval_identities: int = 200  # never trained on; 0 leaves the evaluation sets out
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("identities", 1), ("images_per_identity", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.eval_identities and self.eval_identities < 2 * FOLDS:
            raise InputError(
                f"eval_identities must be 0 or at least {2 * FOLDS}, two for each of the {FOLDS} folds, got "
                f"{self.eval_identities}"
            )


class Picture(NamedTuple):
    """One picture of a set."""

    encoded: bytes  # JPEG
    split: str  # train, clean, mixed or templates
    identity: int
    severity: float
    landmarks: np.ndarray  # (5, 2) pixels (x, y)
    template: int = 0  # of the identity
    medium: int = 0  # of the template


def stream_rng(seed: int, stream: Stream, *words: int) -> np.random.Generator:
    """Returns the generator of a random stream, told apart from others of its kind by ``words``."""
    return np.random.default_rng([seed, stream, *words])


def make_face(seed: int, identity: int) -> Face:
    """Returns the face of an identity number; any number from 0 on."""
    rng = stream_rng(seed, Stream.FACE, identity)
    return Face(Identity.draw(rng), rng)


def train_pictures(parameters: Parameters, identity: int) -> Iterator[Picture]:
    """Yields the training pictures of an identity."""
    face = make_face(parameters.seed, identity)
    for index in range(parameters.images_per_identity):
        rng = stream_rng(parameters.seed, Stream.TRAIN, identity, index)
        near_clean, severity = rng.random() < _NEAR_CLEAN_SHARE, rng.random()
        if near_clean:
            severity *= _NEAR_CLEAN_SEVERITY
        encoded, landmarks = _take(face, Variation.draw(rng), severity, rng)
        yield Picture(encoded, "train", identity, severity, landmarks)


def evaluation_pictures(parameters: Parameters, identity: int) -> Iterator[Picture]:
    """Yields the evaluation pictures of an identity: those for pairs (clean.bin, mixed.bin), then its templates.

    The frames of one medium share light and background, not pose, expression or severity.
    """
    face = make_face(parameters.seed, identity)
    for split, stream in (("clean", Stream.CLEAN), ("mixed", Stream.MIXED)):
        for index in range(VERIFICATION_IMAGES):
            rng = stream_rng(parameters.seed, stream, identity, index)
            severity = rng.random() if split == "mixed" else 0.0
            encoded, landmarks = _take(face, Variation.draw(rng), severity, rng)
            yield Picture(encoded, split, identity, severity, landmarks)
    for template in range(TEMPLATES):
        plan = stream_rng(parameters.seed, Stream.TEMPLATE_PLAN, identity, template)
        images = int(plan.integers(*TEMPLATE_IMAGES, endpoint=True))
        media = int(plan.integers(*TEMPLATE_MEDIA, endpoint=True))
        scenes = [Variation.draw(plan) for _ in range(media)]
        for index in range(images):
            rng = stream_rng(parameters.seed, Stream.TEMPLATE, identity, template, index)
            medium, severity = index * media // images, rng.random()
            scene = {name: getattr(scenes[medium], name) for name in _SCENE}
            variation = dataclasses.replace(Variation.draw(rng), **scene)
            encoded, landmarks = _take(face, variation, severity, rng)
            yield Picture(encoded, "templates", identity, severity, landmarks, template, medium)


def _take(face: Face, variation: Variation, severity: float, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Returns the JPEG file of a degraded picture, and its landmarks."""
    pixels, landmarks = render_face(face, variation)
    return degrade(pixels, draw_amounts(severity, rng), rng), landmarks


def contact_sheet(
    seed: int,
    identities: Sequence[int],
    variations: int = 4,
    severities: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
) -> Image.Image:
    """Draws one row for each identity: clean pictures, then the first of them under one mixture of rising severity."""
    gap, head = 6, 40
    width = variations * FACE_SIZE + 2 * gap + len(severities) * FACE_SIZE
    sheet = Image.new("RGB", (width + gap, head + len(identities) * FACE_SIZE + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    draw.text((gap, 12), "one identity a row: pose, expression and light vary", "black", font)
    lefts = [gap + column * FACE_SIZE for column in range(variations)]
    for severity in severities:
        lefts.append(lefts[-1] + FACE_SIZE + (gap if len(lefts) == variations else 0))
        draw.text((lefts[-1] + 10, 12), f"severity {severity:g}", "black", font)
    for row, identity in enumerate(identities):
        face = make_face(seed, identity)
        rngs = [stream_rng(seed, Stream.SHEET, identity, column) for column in range(variations)]
        clean = [render_face(face, Variation.draw(rng))[0] for rng in rngs]
        mixture = draw_amounts(1.0, rngs[0])
        cells = [degrade(pixels, np.zeros(len(KINDS)), rngs[0]) for pixels in clean]
        cells += [degrade(clean[0], severity * mixture, rngs[0]) for severity in severities]
        for left, cell in zip(lefts, cells):
            sheet.paste(Image.open(io.BytesIO(cell)), (left, head + row * FACE_SIZE))
    return sheet
