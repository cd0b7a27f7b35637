"""Each change against another implementation of it: Pillow's resize, DALI's formulas written out, SciPy's filters."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d

from scf_fast.pipelines.loading.augmentation import _UNIFORMS, PRESETS, Augmentation

SIZE = 112


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    smooth = [
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for _ in range(3)
    ]
    return torch.from_numpy(
        np.stack(
            [np.clip(np.asarray(face) + rng.normal(0, 9, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8) for face in smooth]
        )
    )


def draws(count=3, **values):
    """Uniforms that make every change happen, 0.5 unless given."""
    u = np.full((count, len(_UNIFORMS)), 0.5)
    for name, value in values.items():
        u[:, _UNIFORMS.index(name.replace("_", " "))] = value
    return u


def changed(faces, augmentation, **values):
    before = faces.clone()
    result = augmentation.apply(faces, draws(**values))
    assert result.dtype == torch.uint8 and result.shape == faces.shape and torch.equal(faces, before)
    return result.numpy().astype(float)


def assert_close(result, expected, tolerance=0.51):
    np.testing.assert_allclose(result, np.clip(expected, 0, 255), atol=tolerance)


def test_crop_is_a_crop_resized(faces):
    result = changed(faces, Augmentation(crop=1.0, crop_area=(0.25, 0.25)), crop_top=0.25, crop_left=1 - 2**-53)
    for face, out in zip(faces.numpy(), result):  # side 56, 14 pixels from the top, at the right
        whole = Image.fromarray(face).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(56, 14, 112, 70))
        inner = np.asarray(whole).astype(float)
        np.testing.assert_allclose(
            out[2:-2, 2:-2], inner[2:-2, 2:-2], atol=1.01
        )  # Pillow's border is the crop's, ours the face's


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_resample_is_down_and_up(faces, share):
    result = changed(faces, Augmentation(resample=1.0, resample_size=(share, share)))
    small = int(SIZE * share)
    for face, out in zip(faces.numpy(), result):
        planes = [
            Image.fromarray(face[..., c].astype(np.float32))
            .resize((small, small), Image.Resampling.BILINEAR)
            .resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            for c in range(3)
        ]
        assert_close(out, np.stack([np.asarray(plane) for plane in planes], axis=-1))


@pytest.mark.parametrize(("number", "window", "sigma"), [(0.0, 3, 0.8), (0.99, 5, 1.1)])
def test_blur_is_dalis_gaussian(faces, number, window, sigma):
    result = changed(faces, Augmentation(blur=1.0), blur_window=number)
    kernel = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    expected = faces.numpy().astype(float)
    for axis in (1, 2):
        expected = correlate1d(expected, kernel, axis=axis, mode="mirror")
    assert_close(result, expected)


def test_hue_and_saturation_are_dalis(faces):
    """Coefficients measured from nvidia.dali.fn.hsv(hue=20, saturation=1.2, dtype=FLOAT) by least squares."""
    measured = [
        [1.02044748, -0.21039787, 0.18934586],
        [0.09664865, 1.03837407, -0.13459736],
        [-0.55128552, 0.35424025, 1.19644071],
    ]
    result = changed(faces, Augmentation(hue_saturation=1.0, hue=(20, 20), saturation=(1.2, 1.2)))
    assert_close(result, faces.numpy() @ np.array(measured).T)


def test_gray_is_luma(faces):
    result = changed(faces, Augmentation(gray=1.0))
    assert_close(result, np.repeat(faces.numpy() @ np.array([[0.299], [0.587], [0.114]]), 3, axis=-1))


def test_occlusion_is_a_rectangle(faces):
    result = changed(
        faces,
        Augmentation(occlusion=1.0, occlusion_area=(0.25, 0.25), occlusion_aspect=(1.0, 1.0)),
        occlusion_top=0.0,
        occlusion_left=0.5,
        occlusion_red=0.0,
        occlusion_green=0.4,
        occlusion_blue=0.999,
    )
    expected = faces.numpy().astype(float)
    expected[:, :56, 28:84] = (0, 102, 255)
    assert_close(result, expected)


def test_each_change_falls_on_its_share_of_the_faces(faces):
    many = faces[:1, :40, :40].repeat(400, 1, 1, 1)
    uniforms = np.random.default_rng(1).random((400, Augmentation.NUM_UNIFORMS))
    for name in ("crop", "resample", "blur", "hue_saturation", "gray", "occlusion"):
        result = Augmentation(**{name: 0.25}).apply(many, uniforms)
        share = (result != many).flatten(1).any(dim=1).float().mean().item()
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_a_face_does_not_depend_on_its_batch(faces):
    uniforms = np.random.default_rng(2).random((3, Augmentation.NUM_UNIFORMS)) * 0.5
    strong = Augmentation(crop=0.5, resample=0.5, blur=0.5, hue_saturation=0.5, gray=0.2, occlusion=0.5)
    whole = strong.apply(faces, uniforms)
    for i in range(3):
        assert (strong.apply(faces[i : i + 1], uniforms[i : i + 1]).int() - whole[i : i + 1].int()).abs().max() <= 1
    assert not torch.equal(whole, faces)


def test_nothing_is_done_for_free(faces):
    assert not PRESETS["none"].does_something and PRESETS["arcface_torch"].does_something
    assert PRESETS["arcface_torch"].apply(faces, np.full((3, Augmentation.NUM_UNIFORMS), 0.9)) is faces


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blur": 1.5}, r"blur must be a probability in \[0, 1\], got 1.5"),
        ({"crop_area": (0.0, 1.0)}, "crop_area must be a range"),
        ({"resample_size": (0.9, 0.5)}, "resample_size must be a range"),
        ({"blur_windows": (4,)}, "blur_windows must be odd"),
        ({"occlusion_aspect": (0, 1)}, "occlusion_aspect must be a range"),
        ({"gray": float("nan")}, "gray must be a probability"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)
