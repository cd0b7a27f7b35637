"""Five-point alignment on the fly: turns a loose crop and its landmarks into a 112 x 112 face as models are trained on.

    z -> a z + b in complex numbers,  a = sum conj(z_k - zc) (w_k - wc) / sum |z_k - zc|^2,  b = wc - a zc

is the similarity transform that brings landmarks z_k closest to the template's w_k in the sense of least squares (zc,
wc: their means).
"""

import hashlib

import numpy as np
from PIL import Image

from scf_fast.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE, TEMPLATE
from scf_fast.pipelines.loading.decode import decode_rgb, read_header, with_name
from scf_fast.pipelines.sources.base import ImageSource, ReadFiles

_STILL = 0.05  # pixels: a transform that moves no corner further is left out, since resampling would only blur
_CORNERS = np.array([0, FACE_SIZE - 1, 1j * (FACE_SIZE - 1), (1 + 1j) * (FACE_SIZE - 1)])


def similarity_transform(landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (a, b), each (N,) complex128, of landmarks (N, 5, 2); where all five are one point, a is not finite."""
    points, target = landmarks.astype(np.float64) @ [1, 1j], TEMPLATE @ [1, 1j]
    center, target_center = points.mean(axis=1), target.mean()
    offsets = points - center[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (offsets.conj() * (target - target_center)).sum(axis=1) / (np.abs(offsets) ** 2).sum(axis=1)
        return a, target_center - a * center


class AlignedFaces(ImageSource):
    """A source whose images are brought to the template by their landmarks when they are asked for: bilinear, black
    outside the picture.

    The file of a 112 x 112 image whose landmarks already lie on the template is passed on as it is; of other images the
    source gives the pixels.

    Args:
        source: N images.
        landmarks: (N, 5, 2) x and y in pixels of the upright image: left eye, right eye, nose, left and right mouth
            corner.
    Raises:
        InputError: the landmarks of an image are not finite, or all in one point.
    """

    def __init__(self, source: ImageSource, landmarks: np.ndarray):
        self.source, self.landmarks = source, landmarks
        self.labels, self.num_classes = source.labels, source.num_classes
        self._a, self._b = similarity_transform(landmarks)
        bad = np.flatnonzero(~(np.isfinite(self._a) & (self._a != 0)))
        if len(bad):
            raise InputError(
                f"landmarks must be finite and not all in one point; those of {len(bad)} of {len(source)} images are "
                f"not, the first {source.name(int(bad[0]))}: {landmarks[bad[0]].tolist()}; detect them again"
            )
        moved = np.abs(self._a[:, None] * _CORNERS + self._b[:, None] - _CORNERS).max(axis=1)
        self._in_place = moved < _STILL

    def name(self, i: int) -> str:
        return self.source.name(i)

    def will_need(self, indices: np.ndarray) -> None:
        self.source.will_need(indices)

    def update_digest(self, digest: "hashlib._Hash") -> None:
        self.source.update_digest(digest)
        digest.update(np.ascontiguousarray(self.landmarks).data)

    def read(self, indices: np.ndarray) -> ReadFiles:
        none = np.zeros(len(indices), dtype=np.int64)  # each image has to be asked for on its own
        return ReadFiles(np.empty(0, dtype=np.uint8), none, none)

    def encoded(self, i: int) -> np.ndarray:
        """Returns the image file, which shows the aligned face only where ``pixels(i)`` is None."""
        return self.source.encoded(i)

    def pixels(self, i: int) -> np.ndarray | None:
        def align(encoded: np.ndarray) -> np.ndarray | None:
            header = read_header(encoded)
            if self._in_place[i] and (header.height, header.width) == (FACE_SIZE, FACE_SIZE):
                return None
            return self._warp(decode_rgb(encoded), i)

        return with_name(self, i, align, self.source.encoded(i))

    def _warp(self, image: Image.Image, i: int) -> np.ndarray:
        """Returns the aligned face, (112, 112, 3) uint8.

        It is computed in float32: for bytes Pillow cuts the fraction off, which makes faces darker by half a gray
        level.
        """
        # Pillow asks for the inverse transform, and has pixel centers at 1/2.
        a = 1 / self._a[i]
        b = -self._b[i] * a + (0.5 + 0.5j) * (1 - a)
        inverse = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
        size = (FACE_SIZE, FACE_SIZE)
        colors = [
            np.asarray(color.convert("F").transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR))
            for color in image.split()
        ]
        return np.stack(colors, axis=-1).round().astype(np.uint8)
