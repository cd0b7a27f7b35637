"""Verification sets (``lfw.bin``, ``cfp_fp.bin``, ``agedb_30.bin``) as insightface ships them.

A ``.bin`` is a pickle of (encoded images, is-same flags): images 2k and 2k + 1 are pair k. Files written by Python 2
and by Python 3 exist, with flags and images as built-ins or as NumPy values. A pickle can run code, so only those types
are built.
"""

import itertools
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from scf_fast.pipelines.aliases import BoolArray, ByteArray, IntArray, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.array_file import Array
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.sources.base import EncodedImages, ImageSource, SelectedImages, reason_of
from scf_fast.pipelines.text import one_line


class VerificationSet(NamedTuple):
    """Pairs of face images."""

    source: ImageSource  # 2P images; 2k and 2k + 1 are pair k
    same: BoolArray  # (P,) whether both images of a pair show one person


class _Type:
    """Stands for a numpy.dtype of numbers."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any):
        self._code, self._order = _text(code), "="
        if self._code not in _CODES:
            raise pickle.UnpicklingError(f"it holds an array of {self._code!r}")

    def __setstate__(self, state: Any) -> None:
        self._order = {"|": "="}.get(_text(state[1]), _text(state[1]))

    def array(self, data: Any, shape: Any, order: Any) -> Array:
        """Returns the array with these bytes."""
        dtype = np.dtype(self._code).newbyteorder(self._order)  # type: ignore[call-overload]  # any text; NumPy refuses
        return np.frombuffer(_bytes(data), dtype=dtype).reshape(shape, order=order)


class _Array:
    """Stands for a numpy.ndarray."""

    __slots__ = ("values",)

    def __init__(self, *_: Any):
        self.values: Array | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.values = _Type.array(dtype, data, shape, "F" if is_fortran else "C")


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _bytes(content: Any = b"", encoding: Any = "latin1") -> bytes:
    """Stands for bytes() and codecs.encode(): takes what pickles give these, bytes, or text that stands for bytes. A
    number would be a request for memory.
    """
    if _text(encoding) not in ("latin1", "latin-1") or not isinstance(content, (bytes, bytearray, str)):
        raise pickle.UnpicklingError(f"it makes bytes of a {type(content).__name__}")
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _scalar(dtype: Any, data: Any) -> Any:
    return _Type.array(dtype, data, (), "C")[()]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.values = _Type.array(dtype, data, shape, "F" if _text(order) == "F" else "C")
    return array


_CODES = frozenset(["b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))])
# The names to which pickles of bytes, bool and NumPy arrays refer, with the modules of Python 2 and 3, NumPy 1 and 2;
# and what is built instead: NumPy's own functions trust the file, and read any memory that it names.
_BUILDERS: dict[tuple[str, str], Any] = {
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


class _PlainUnpickler(pickle._Unpickler):  # the pure Python one, which is private; read in Python 3.10 to 3.13
    """Builds bytes, numbers, lists, tuples and arrays of numbers. In Python, because the one in C allocates memory for
    whatever place in its memo a file names.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _BUILDERS[module, name]

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Type, _Array)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _bytearray(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # the original allocates before it reads

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


def write_verification_set(path: StrPath, images: Iterable[bytes | ByteArray], same: Iterable[bool]) -> None:
    """Writes a ``.bin`` of 2P images and P flags."""
    encoded, flags = [bytes(image) for image in images], [bool(flag) for flag in same]
    if len(encoded) != 2 * len(flags) or not flags:
        raise ValueError(f"P flags need 2P images and P > 0, got {len(flags)} flags and {len(encoded)} images")
    with atomic_output(path) as file:
        pickle.dump((encoded, flags), file, protocol=4)


def read_verification_set(path: StrPath) -> VerificationSet:
    """Reads a ``.bin``.

    Raises:
        InputError: the file is missing, is not such a pickle, or its counts do not belong together.
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
        raise InputError(f"cannot read the verification set {path}: {reason_of(error)}; check the path") from error
    # A damaged pickle raises nearly anything: KeyError, IndexError, MemoryError, AttributeError ...
    except Exception as error:
        what = refusal(path, Wanted.PAIRS, file_kinds.PICKLE, file_kinds.EMPTY)
        raise InputError(
            f"{path} must be a pickle of (encoded images, is-same flags)"
            + (f", and {what}" if what else f": {one_line(error)}; download it again")
        ) from error
    if len(images) != 2 * len(same) or not len(same):
        raise InputError(
            f"{path}: P flags need 2P images and P > 0, got {len(same)} flags and {len(images)} images; download it "
            "again"
        )
    return VerificationSet(EncodedImages(images), same.astype(bool))


def draw_pairs(source: ImageSource, num_pairs: int = 6000, folds: int = 10, seed: int = 0) -> VerificationSet:
    """Draws a verification set from labeled images, such as open_source gives for a folder of identities.

    Half of the pairs of each fold show one person, half two. Folds are successive tenths of the pairs, as in a
    ``.bin``, and no identity is in more than one of them.

    Args:
        source: has labels.
        num_pairs: a multiple of 2 folds.
        folds: of the pairs.
        seed: another one gives other pairs.
    Raises:
        InputError: a fold has too few identities or images to draw its pairs from.
    """
    if num_pairs < 1 or num_pairs % (2 * folds):
        raise InputError(f"the number of pairs must be a positive multiple of twice the {folds} folds, got {num_pairs}")
    rng = np.random.default_rng(seed)
    images = np.argsort(source.labels, kind="stable")
    images = images[source.labels[images] >= 0]
    first = np.flatnonzero(np.diff(source.labels[images], prepend=-1))
    members = np.split(images, first[1:])
    per_kind = num_pairs // (2 * folds)
    pairs: list[Iterable[int]] = []
    for identities in np.array_split(rng.permutation(len(members)), folds):
        own = [_pairs_of(members[k], per_kind, rng) for k in identities.tolist()]
        possible = sum(map(len, own))
        if len(identities) < 2 or possible < per_kind:
            raise InputError(
                f"a fold needs two identities and {per_kind} pairs of images of one person, but one of {folds} folds "
                f"has {len(identities)} identities and {possible} such pairs; ask for fewer pairs "
                "(verify --pairs N), or give more images"
            )
        # One of each identity, then one more ...
        in_turn = (pair for turn in itertools.zip_longest(*own) for pair in turn if pair is not None)
        impostors = [
            [rng.choice(members[k]) for k in rng.choice(identities, 2, replace=False)] for _ in range(per_kind)
        ]
        pairs += [*itertools.islice(in_turn, per_kind), *impostors]
    same = np.tile(np.repeat([True, False], per_kind), folds)
    return VerificationSet(SelectedImages(source, np.array(pairs, dtype=np.int64).ravel(), with_labels=False), same)


def _pairs_of(images: IntArray, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draws up to ``count`` different pairs of images of one identity, in random order."""
    total = len(images) * (len(images) - 1) // 2
    number = rng.choice(total, min(count, total), replace=False) if total else np.empty(0, dtype=np.int64)
    second = ((1 + np.sqrt(1 + 8 * number)) // 2).astype(np.int64)  # pair number b (b - 1) / 2 + a is of images a < b
    return list(zip(images[number - second * (second - 1) // 2], images[second]))


def _values(content: Any) -> Any:
    return content.values if isinstance(content, _Array) else content


def _as_bytes(image: Any) -> bytes:
    image = _values(image)
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
        return image.tobytes()
    raise InputError(f"an image is a {type(image).__name__} and not encoded bytes")
