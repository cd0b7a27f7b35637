"""Verification sets (`lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`) as insightface ships them.

A `.bin` is a pickle of (encoded images, is-same flags): images 2k and 2k + 1 are pair k. Files written by Python 2 and by
Python 3 exist, with flags and images as built-ins or as NumPy values. A pickle can run code, so only those types are built.
"""
import os
import pickle
from typing import NamedTuple

import numpy as np

from pipelines.files import atomic_output
from pipelines.sources import EncodedImages

# Everything that pickles of bytes, bool and NumPy arrays refer to, under the module names of Python 2 and 3, NumPy 1 and 2.
_ALLOWED = {
    ("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes"), ("__builtin__", "bytearray"), ("builtins", "bytearray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"), ("numpy", "dtype"),
}


class VerificationSet(NamedTuple):
    """Pairs of face images."""

    source: EncodedImages  # 2P images; 2k and 2k + 1 are pair k
    same: np.ndarray  # (P,) bool, whether both images of a pair show one person


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def write_verification_set(path, images, same):
    """Write a `.bin`.

    Args:
        path: str or Path, replaced if it exists.
        images: 2P bytes-like, encoded.
        same: (P,) bool.
    Raises:
        ValueError: the counts do not belong together.
    """
    images, same = [bytes(image) for image in images], [bool(flag) for flag in same]
    _check_counts(path, len(images), len(same))
    with atomic_output(path) as file:
        pickle.dump((images, same), file, protocol=4)


def read_verification_set(path):
    """Read a `.bin`.

    Returns:
        VerificationSet.
    Raises:
        ValueError: the file is missing, is not such a pickle, or its counts do not belong together.
    """
    try:
        with open(path, "rb") as file:
            images, same = _PlainUnpickler(file, encoding="bytes").load()
        images = [_as_bytes(image) for image in images]
        same = np.asarray(same)
        if same.ndim != 1 or same.dtype.kind not in "biu":
            raise ValueError(f"its flags are an array of {same.dtype} with shape {same.shape}")
    except OSError as error:
        raise ValueError(f"cannot read the verification set {path}: {os.strerror(error.errno)}; check the path") from error
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, IndexError, MemoryError, AttributeError ...
        raise ValueError(f"{path} must be a pickle of (encoded images, is-same flags): {error}; download it again") from error
    _check_counts(path, len(images), len(same))
    return VerificationSet(EncodedImages(images), same.astype(bool))


def _as_bytes(image):
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
        return image.tobytes()
    raise ValueError(f"an image is a {type(image).__name__} and not encoded bytes")


def _check_counts(path, num_images, num_pairs):
    if num_images != 2 * num_pairs or not num_pairs:
        raise ValueError(f"{path}: P flags need 2P images and P > 0, got {num_pairs} flags and {num_images} images")
