import io

import numpy as np
import pytest
from PIL import Image

from scf_fast.pipelines.synthetic.degradations import (
    _PHOTONS,
    _READ_NOISE,
    _STRENGTHS,
    KINDS,
    _expose,
    _occlude,
    degrade,
    draw_amounts,
    strength,
)
from scf_fast.pipelines.synthetic.faces import Face
from scf_fast.pipelines.synthetic.rendering import render_face
from scf_fast.pipelines.synthetic.traits import Identity, Variation


def _rng(*seed):
    return np.random.default_rng(seed)


def _decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _mean(score, pictures, amounts_of):
    """Mean of score(degraded, picture) over pictures; both arguments are float64."""
    degraded = [
        _decode(degrade(picture, amounts_of(number), _rng(2, number))) for number, picture in enumerate(pictures)
    ]
    return np.mean([score(np.float64(after), np.float64(before)) for after, before in zip(degraded, pictures)])


def _psnr(after, before):
    return 10 * np.log10(255**2 / np.square(after - before).mean())


def _correlation(after, before):
    """Unlike PSNR it looks through a change of brightness."""
    return np.corrcoef(after.ravel(), before.ravel())[0, 1]


@pytest.fixture(scope="module")
def pictures():
    faces = [Face(Identity.draw(_rng(0, number)), _rng(0, number)) for number in range(4)]
    return [render_face(faces[number % 4], Variation.draw(_rng(1, number)))[0] for number in range(24)]


def test_amounts_have_the_length_of_the_severity():
    for number in range(300):
        severity = number / 299
        amounts = draw_amounts(severity, _rng(number))
        assert amounts.shape == (6,) and (amounts >= 0).all() and (amounts <= 1).all()
        assert np.linalg.norm(amounts) == pytest.approx(severity, abs=1e-12)
        assert amounts[KINDS.index("jpeg")] <= 0.5 * severity
    drawn = np.array([draw_amounts(1.0, _rng(number)) > 0 for number in range(300)])
    assert (drawn.mean(axis=0) > 0.25).all()  # every kind takes part
    assert 1 < drawn.sum(axis=1).mean() < 4


@pytest.mark.parametrize("severity", [-0.01, 1.01, float("nan")])
def test_severity_outside_the_unit_interval_is_refused(severity):
    with pytest.raises(ValueError, match="severity must lie in"):
        draw_amounts(severity, _rng(0))


def test_severity_zero_only_codes_the_picture(pictures):
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(file, "JPEG", quality=95)
    assert degrade(pictures[0], draw_amounts(0.0, _rng(0)), _rng(0)) == file.getvalue()


def test_less_of_the_picture_is_left_as_severity_grows(pictures):
    severities = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    psnr = [
        _mean(_psnr, pictures, lambda number, s=severity: draw_amounts(s, _rng(3, number))) for severity in severities
    ]
    assert (np.diff(psnr) < -0.5).all(), psnr
    assert psnr[0] > 32 and psnr[-1] < 13


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_each_kind_alone_takes_more_as_its_amount_grows(pictures, kind):
    amounts = (0.0, 0.1, 0.25, 0.5) if KINDS[kind] == "jpeg" else (0.0, 0.25, 0.5, 0.75, 1.0)
    left = [_mean(_correlation, pictures, lambda number, a=amount: a * np.eye(6)[kind]) for amount in amounts]
    assert left[0] > 0.99 and (np.diff(left) < 0).all(), left


def test_strengths_are_monotone():
    for kind in KINDS:
        steps = np.diff([strength(kind, amount) for amount in np.linspace(0, 1, 21)])
        assert (steps <= 0).all() if kind == "jpeg" else (steps > 0).all(), kind
    assert set(_STRENGTHS) == set(KINDS)


def test_the_occluder_covers_the_stated_share_of_the_face():
    y, x = np.mgrid[-1:1:112j, -1:1:112j]
    face = (x / 0.72) ** 2 + (y / 0.95) ** 2 < 1
    marked = np.full((112, 112, 3), 255, dtype=np.uint8)
    for number, share in enumerate((0.1, 0.4, 0.7, 0.9)):
        covered = (_occlude(marked, share, _rng(4, number)) < 250).any(axis=2)[face].mean()
        assert covered == pytest.approx(share, abs=0.05)


def test_noise_has_the_stated_deviation():
    gray = np.full((300, 300, 3), 128, dtype=np.uint8)
    result = _expose(gray, 0.1, 0.0, _rng(5)) / 255
    assert result.std() == pytest.approx(0.1, rel=0.02) and result.mean() == pytest.approx(128 / 255, rel=0.01)


def test_low_light_is_darker_and_shows_shot_and_read_noise():
    gray, stops = np.full((300, 300, 3), 128, dtype=np.uint8), 6.0
    result = _expose(gray, 0.0, stops, _rng(6)) / 255
    photons = 128 / 255 * _PHOTONS * 2**-stops
    expected = np.hypot(1 / np.sqrt(photons), _READ_NOISE * 2**stops / (128 / 255))
    assert result.mean() == pytest.approx(128 / 255 * 2 ** (-stops / 4), rel=0.02)
    assert result.std() / result.mean() == pytest.approx(expected, rel=0.05)


def test_the_same_seed_gives_the_same_file_in_any_size():
    picture = _rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    amounts = np.full(6, 0.4)
    encoded = degrade(picture, amounts, _rng(8))
    assert encoded == degrade(picture, amounts, _rng(8)) and encoded != degrade(picture, amounts, _rng(9))
    assert _decode(encoded).shape == picture.shape
