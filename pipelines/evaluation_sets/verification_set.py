"""Verification sets (`lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`) as insightface ships them.

A `.bin` is a pickle of (encoded images, is-same flags): images 2k and 2k + 1 are pair k. Files written by Python 2 and
by Python 3 exist, with flags and images as built-ins or as NumPy values. A pickle can run code, so only those types are
built.
"""

import itertools
import os
import pickle
from typing import NamedTuple

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.sources.base import EncodedImages, ImageSource, SelectedImages


class VerificationSet(NamedTuple):
    """Pairs of face images."""

    source: ImageSource  # 2P images; 2k and 2k + 1 are pair k
    same: np.ndarray  # (P,) bool, whether both images of a pair show one person


class _Type:
    """Stands for a numpy.dtype of numbers."""

    __slots__ = ("_code", "_order")

    def __init__(self, code, *_):
        self._code, self._order = _text(code), "="
        if self._code not in _CODES:
            raise pickle.UnpicklingError(f"it holds an array of {self._code!r}")

    def __setstate__(self, state):
        self._order = {"|": "="}.get(_text(state[1]), _text(state[1]))

    def array(self, data, shape, order):
        """The array with these bytes."""
        return np.frombuffer(_bytes(data), dtype=np.dtype(self._code).newbyteorder(self._order)).reshape(
            shape, order=order
        )


class _Array:
    """Stands for a numpy.ndarray."""

    __slots__ = ("values",)

    def __init__(self, *_):
        self.values = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.values = _Type.array(dtype, data, shape, "F" if is_fortran else "C")


def _text(value):
    return value.decode("latin1") if isinstance(value, bytes) else value


def _bytes(content=b"", encoding="latin1"):
    """bytes() and codecs.encode() of what pickles give them: bytes, or text that stands for them. A number would be a
    request for memory.
    """
    if _text(encoding) not in ("latin1", "latin-1") or not isinstance(content, (bytes, bytearray, str)):
        raise pickle.UnpicklingError(f"it makes bytes of a {type(content).__name__}")
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _scalar(dtype, data):
    return _Type.array(dtype, data, (), "C")[()]


def _frombuffer(data, dtype, shape, order):
    array = _Array()
    array.values = _Type.array(dtype, data, shape, "F" if _text(order) == "F" else "C")
    return array


_CODES = frozenset(["b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))])
# What pickles of bytes, bool and NumPy arrays refer to, under the module names of Python 2 and 3, NumPy 1 and 2, and
# what is built instead: NumPy's own functions trust the file, and read any memory that it names.
_BUILDERS = {
    ("_codecs", "encode"): _bytes,
    **{(module, name): _bytes for module in ("__builtin__", "builtins") for name in ("bytes", "bytearray")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{
        (f"numpy.{core}.multiarray", name): builder
        for core in ("core", "_core")
        for name, builder in (("_reconstruct", _Array), ("scalar", _scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _PlainUnpickler(pickle._Unpickler):
    """Builds bytes, numbers, lists, tuples and arrays of numbers. In Python, because the one in C sets memory aside for
    whatever place in its memo a file names.
    """

    def find_class(self, module, name):
        if (module, name) not in _BUILDERS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _BUILDERS[module, name]

    def _build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Type, _Array)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _bytearray(self):
        self.append(
            self.read(int.from_bytes(self.read(8), "little"))
        )  # the original sets the memory aside before it reads

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build, pickle.BYTEARRAY8[0]: _bytearray}  # noqa: RUF012 -- as in its base


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
            images, same = map(_values, _PlainUnpickler(file, encoding="bytes").load())
        images = [_as_bytes(image) for image in images]
        if not all(isinstance(flag, (int, np.integer, np.bool_)) for flag in same):
            raise InputError("its flags are no list of booleans")
        same = np.asarray(same)
        if same.ndim != 1 or same.dtype.kind not in "biu":
            raise InputError(f"its flags are an array of {same.dtype} with shape {same.shape}")
    except OSError as error:
        raise InputError(
            f"cannot read the verification set {path}: {os.strerror(error.errno)}; check the path"
        ) from error
    except (
        Exception
    ) as error:  # a damaged pickle raises nearly anything: KeyError, IndexError, MemoryError, AttributeError ...
        raise InputError(
            f"{path} must be a pickle of (encoded images, is-same flags): {error}; download it again"
        ) from error
    _check_counts(path, len(images), len(same))
    return VerificationSet(EncodedImages(images), same.astype(bool))


def draw_pairs(source, num_pairs=6000, folds=10, seed=0):
    """A verification set from labeled images, such as open_source gives for a folder of identities.

    Half of the pairs of each fold show one person, half two. Folds are successive tenths of the pairs, as in a `.bin`,
    and no identity is in more than one of them.

    Args:
        source: ImageSource with labels.
        num_pairs: int, a multiple of 2 folds.
        folds: int.
        seed: int; another one, other pairs.
    Returns:
        VerificationSet.
    Raises:
        ValueError: a fold has too few identities or images to draw its pairs from.
    """
    if num_pairs < 1 or num_pairs % (2 * folds):
        raise InputError(f"the number of pairs must be a positive multiple of twice the {folds} folds, got {num_pairs}")
    rng = np.random.default_rng(seed)
    images = np.argsort(source.labels, kind="stable")
    images = images[source.labels[images] >= 0]
    first = np.flatnonzero(np.diff(source.labels[images], prepend=-1))
    members = np.split(images, first[1:])
    per_kind = num_pairs // (2 * folds)
    pairs = []
    for identities in np.array_split(rng.permutation(len(members)), folds):
        own = [_pairs_of(members[k], per_kind, rng) for k in identities.tolist()]
        possible = sum(map(len, own))
        if len(identities) < 2 or possible < per_kind:
            raise InputError(
                f"a fold needs two identities and {per_kind} pairs of images of one person, but one of {folds} folds "
                "has "
                f"{len(identities)} identities and {possible} such pairs; ask for fewer pairs, or give more images"
            )
        in_turn = (
            pair for turn in itertools.zip_longest(*own) for pair in turn if pair is not None
        )  # one of each identity, then one more ...
        impostors = [
            [rng.choice(members[k]) for k in rng.choice(identities, 2, replace=False)] for _ in range(per_kind)
        ]
        pairs += [*itertools.islice(in_turn, per_kind), *impostors]
    same = np.tile(np.repeat([True, False], per_kind), folds)
    return VerificationSet(SelectedImages(source, np.array(pairs, dtype=np.int64).ravel(), with_labels=False), same)


def _pairs_of(images, count, rng):
    """Up to `count` different pairs of images of one identity, in random order."""
    total = len(images) * (len(images) - 1) // 2
    number = rng.choice(total, min(count, total), replace=False) if total else np.empty(0, dtype=np.int64)
    second = ((1 + np.sqrt(1 + 8 * number)) // 2).astype(np.int64)  # pair number b (b - 1) / 2 + a is of images a < b
    return list(zip(images[number - second * (second - 1) // 2], images[second]))


def _values(content):
    return content.values if isinstance(content, _Array) else content


def _as_bytes(image):
    image = _values(image)
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
        return image.tobytes()
    raise InputError(f"an image is a {type(image).__name__} and not encoded bytes")


def _check_counts(path, num_images, num_pairs):
    if num_images != 2 * num_pairs or not num_pairs:
        raise InputError(f"{path}: P flags need 2P images and P > 0, got {num_pairs} flags and {num_images} images")
