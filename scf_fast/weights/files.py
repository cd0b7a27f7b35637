"""Files of tensors, in the formats of PyTorch and safetensors. Code in a file is never run.

A file is recognized by its first bytes, whatever it is called. What its tensors mean is the business of
:mod:`scf_fast.weights.reading` and :mod:`scf_fast.weights.writing`.
"""

import io
import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch

from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output, atomic_path

# What the two stages call their files.
BACKBONE_FILE = "backbone.pth"
CENTERS_FILE = "fc.pth"
CONFIDENCE_FILE = "confidence.pth"
MODEL_FILE = "scf_model.pt"

_SYNC_BYTES = 1 << 28
_METADATA_KEY = "scf_fast"  # of the entry in a safetensors header that holds our facts, as JSON


def save_torch_file(value: Any, path: str | Path, wrote: Callable[[int], object] | None = None) -> None:
    """Writes a file with ``torch.save``, complete or not at all.

    Args:
        wrote: called with the number of bytes after each piece.
    Raises:
        OSError: it could not be written, for instance because the disk is full; names the file.
    """
    with atomic_output(path) as file:
        torch.save(value, file if wrote is None else cast(BinaryIO, _Watched(file, wrote)))


class _Watched(io.BufferedIOBase):
    """A file whose bytes reach the disk step by step as they are written, so that a slow disk is seen to move; the
    sync of a whole checkpoint would be silent for as long as that takes.
    """

    def __init__(self, file: BinaryIO, wrote: Callable[[int], object]):
        self._file, self._wrote, self._unsynced = file, wrote, 0

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._unsynced += count
        if self._unsynced >= _SYNC_BYTES:
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._unsynced = 0
        self._wrote(count)
        return count

    def flush(self) -> None:
        self._file.flush()


def save_safetensors_file(
    tensors: dict[str, torch.Tensor], path: str | Path, facts: dict[str, int | float | str]
) -> None:
    """Writes a safetensors file, complete or not at all, with ``facts`` as JSON in its header.

    Raises:
        OSError: it could not be written; names the file.
    """
    with atomic_path(path) as aside:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, aside, {"format": "pt", _METADATA_KEY: json.dumps(facts)})


def load_tensor_file(path: str | Path, flag: str) -> Any:
    """Returns the tensors and plain containers in a file of PyTorch or safetensors, on the CPU.

    Args:
        flag: what the user named the file with, for the message.
    Raises:
        InputError: the file is missing, unreadable or damaged, or it holds more than tensors and plain values.
    """
    try:
        if _is_safetensors(path):
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                return {**facts, **{key: file.get_tensor(key) for key in file.keys()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would warn of pickle's protocol just before the error that says it all
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot be read ({error.strerror or error}); give the path of a checkpoint file"
        ) from None
    except Exception as error:  # given bytes that are no checkpoint, the unpickler can raise anything
        raise InputError(f"{flag} {path}: is no checkpoint of tensors ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Returns why a file could not be loaded, in one line."""
    code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if code:
        return f"loading it would run {code[1]}, and code from a checkpoint is never run; save the state_dict alone"
    if str(error) and not isinstance(error, KeyError):
        return str(error).splitlines()[0]
    return type(error).__name__


def _is_safetensors(path: str | Path) -> bool:
    """Tells whether a file starts like that format: with the length of a JSON header that fits into the file, then
    the header.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= os.path.getsize(path) - 8 and start[8:] == b"{"
