"""Files of tensors, in the formats of PyTorch and safetensors. Code in a file is never run.

A file is recognized by its first bytes, whatever it is called. What its tensors mean is the business of
:mod:`scf_fast.weights.reading` and :mod:`scf_fast.weights.writing`.
"""

import io
import json
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch

from scf_fast.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.atomic_file import atomic_output, atomic_path
from scf_fast.pipelines.formats.file_kinds import Wanted, recognize, refusal
from scf_fast.pipelines.text import one_line
from scf_fast.weights.integrity import (
    DamagedFileError,
    check_archive,
    check_checksum,
    check_claims,
    checksum_of,
)

# What the two stages call their files.
BACKBONE_FILE = "backbone.pth"
CENTERS_FILE = "fc.pth"
CONFIDENCE_FILE = "confidence.pth"
MODEL_FILE = "scf_model.pt"

_SYNC_BYTES = 1 << 28
# Of entries in a safetensors header: our facts, as JSON, and the checksum of facts and tensors.
_METADATA_KEY, _CHECKSUM_KEY = "scf_fast", "scf_fast_crc32"


def save_torch_file(value: Any, path: str | Path, wrote: Callable[[int], object] | None = None) -> None:
    """Writes a file with ``torch.save``, complete or not at all.

    Args:
        wrote: called with the number of bytes after each piece.
    Raises:
        OSError: it could not be written, for instance because the disk is full; names the file.
    """
    with atomic_output(path) as file:
        torch.save(_compact(value), file if wrote is None else cast(BinaryIO, _Watched(file, wrote)))


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


def _compact(value: Any) -> Any:
    """Returns a value with a copy of every tensor that is a part of a larger one, which would be written as a whole."""
    if isinstance(value, torch.Tensor):
        whole = value.untyped_storage().nbytes()
        return value if whole <= value.numel() * value.element_size() else value.clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _compact(entry)) for key, entry in value.items())
    return value


def save_safetensors_file(
    tensors: dict[str, torch.Tensor], path: str | Path, facts: dict[str, int | float | str]
) -> None:
    """Writes a safetensors file, complete or not at all, with ``facts`` as JSON in its header.

    Raises:
        OSError: it could not be written; names the file.
    """
    with atomic_path(path) as aside:
        own = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        noted = json.dumps(facts)
        metadata = {"format": "pt", _METADATA_KEY: noted, _CHECKSUM_KEY: str(checksum_of(own, noted))}
        safetensors.torch.save_file(own, aside, metadata)


def load_tensor_file(path: str | Path, flag: str) -> Any:
    """Returns the tensors and plain containers in a file of PyTorch or safetensors, on the CPU.

    Args:
        flag: what the user named the file with, for the message.
    Raises:
        InputError: the file is missing, unreadable or damaged, or it holds more than tensors and plain values.
    """
    try:
        if recognize(path) is file_kinds.SAFETENSORS:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            noted = metadata.get(_METADATA_KEY, "{}")
            check_checksum(tensors, noted, metadata.get(_CHECKSUM_KEY))
            return {**json.loads(noted), **tensors}
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would warn of pickle's protocol just before the error that says it all
            content = _load_tensors(path)
        check_claims(content)
        return content
    except DamagedFileError as error:
        what = refusal(path, Wanted.WEIGHTS, file_kinds.TORCH, file_kinds.SAFETENSORS) or str(error)
        raise InputError(f"{flag} {path}: {what}") from None
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot be read ({error.strerror or error}); give the path of a checkpoint file"
        ) from None
    except Exception as error:  # given bytes that are no checkpoint, the unpickler can raise anything
        what = refusal(path, Wanted.WEIGHTS, file_kinds.TORCH) or f"is no checkpoint of tensors ({_reason(error)})"
        raise InputError(f"{flag} {path}: {what}") from None


class _Placeholder:
    """Stands for an object that lies beside the tensors; nothing of it is run or kept."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict() if cls is _Mapping else object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping(_Placeholder):
    """Stands for a dict of another class, with its entries."""


# What training programs put into checkpoints beside the tensors: options, scores, dates, paths, callbacks.
_BESIDE_TENSORS = re.compile(
    r"(argparse|numpy|pathlib|datetime|collections|types|easydict|omegaconf|yacs|addict|mmengine|mmcv|mxnet|"
    r"pytorch_lightning|lightning|lightning_fabric|lightning_utilities|_codecs)\.|(int|float|complex|bool|str|bytes|list|tuple|"
    r"dict|set|frozenset|object|slice|range)$"
)
_MAPPINGS = re.compile(
    r"(collections\.defaultdict|easydict\.EasyDict|yacs\.config\.CfgNode|addict\..*Dict|mmengine.*Dict|dict)$"
)
_MOST_NAMES = 200  # of classes in a file


def _load_tensors(path: str | Path) -> Any:
    """Returns what :func:`torch.load` reads of a file, with placeholders for the usual objects beside tensors."""
    allowed: list[tuple[type, str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(list(allowed)):  # type: ignore[arg-type]  # pairs too, since 2.6
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
            names = {name for _, name in allowed}
            if not unknown or unknown[1] in names or len(names) >= _MOST_NAMES or not _BESIDE_TENSORS.match(unknown[1]):
                raise
            stand_in = _Mapping if _MAPPINGS.match(unknown[1]) else _Placeholder
            # Names of built-in types come without their module, which Python 2 called otherwise.
            prefixes = ("",) if "." in unknown[1] else ("", "builtins.", "__builtin__.")
            allowed += [(stand_in, prefix + unknown[1]) for prefix in prefixes]


def _reason(error: Exception) -> str:
    """Returns why a file could not be loaded, in one line; never PyTorch's advice to run the code that is in it."""
    text = str(error)
    code = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text)
    if code:
        return f"loading it would run {code[1]}, and code from a checkpoint is never run; save the state_dict alone"
    if not text or isinstance(error, KeyError):
        return f"it is damaged: {type(error).__name__}; {file_kinds.BINARY.advice(Wanted.WEIGHTS)}"
    if "weights_only" in text:
        return f"it is damaged, or no file of torch.save; {file_kinds.BINARY.advice(Wanted.WEIGHTS)}"
    return one_line(text.splitlines()[0])
