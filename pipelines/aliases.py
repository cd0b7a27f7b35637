"""Names for the types that signatures of this package repeat."""

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

StrPath = str | os.PathLike[str]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Progress = Callable[[int], object]  # called with what was done since its last call
