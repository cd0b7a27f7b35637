import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from scf_fast.errors import InputError


def save_file(value, path: Path) -> None:
    """``torch.save``, complete or not at all."""
    write_whole(path, lambda file: torch.save(value, file))


def write_whole(path: Path, write: Callable) -> None:
    """Let ``write(file)`` fill a file that takes its name when its bytes are on the disk; on an exception nothing is
    left of it.

    Raises:
        OSError: it could not be written, for want of room for instance; names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch.save ends its archive even then, and fails of that
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the name may be lost with the power, and an older file come back
    finally:
        os.close(folder)


def load_file(path: str | Path, flag: str):
    """Tensors and plain containers from a checkpoint of PyTorch or safetensors, whatever its name; code in it is
    refused.

    Args:
        flag: what the user named the file with, for the message.
    Raises:
        ValueError: missing, unreadable, no checkpoint, or holding more than tensors.
    """
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {
                    **json.loads((file.metadata() or {}).get("scf_fast", "{}")),
                    **{key: file.get_tensor(key) for key in file.keys()},
                }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocol, beside the error that says it all
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot be read ({error.strerror or error}); give the path of a checkpoint file"
        ) from None
    except Exception as error:  # on bytes that are no checkpoint the unpickler fails in any way there is
        foreign = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if foreign:
            reason = (
                f"loading it would run {foreign[1]}, and code from a checkpoint is never run; save the state_dict alone"
            )
        else:
            reason = (
                str(error).splitlines()[0] if str(error) and not isinstance(error, KeyError) else type(error).__name__
            )
        raise InputError(f"{flag} {path}: is no checkpoint of tensors ({reason})") from None


def _is_safetensors(path: str | Path) -> bool:
    """Whether the file starts as that format does: the length of a JSON header, which fits in the file, then the
    header.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= os.path.getsize(path) - 8 and start[8:] == b"{"
