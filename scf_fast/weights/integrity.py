"""Whether a weight file is as it was written, asks for no more memory than it holds, and has finite numbers.

One flipped bit can turn a weight into 7e37, and nothing in the file's form shows it: torch.load does not look at the
checksums that torch.save writes. So they are verified here: the CRC-32 of every record of PyTorch's archives, and for
safetensors, which have none, the one that our own files note in their header.
"""

import errno
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

_ARCHIVE = b"PK\3\4"
_READ_BYTES = 1 << 22
_FREE_BYTES = 1 << 26  # that a file may expand to, or a tensor claim, whatever its size
_MOST_EXPANSION = 8  # times its size, of a compressed file


class DamagedFileError(ValueError):
    """A file that is not as it was written, or asks for more than it holds; the message follows "it"."""


def check_archive(path: str | Path) -> None:
    """Compares every record of an archive of torch.save with its CRC-32; older files, which are no archives, have none.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: a record differs, or they expand to far more than the file.
    """
    with open(path, "rb") as file:
        if file.read(len(_ARCHIVE)) != _ARCHIVE:  # what torch.load goes by; zipfile.is_zipfile looks at its end
            return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _check_expansion(sum(record.file_size for record in records), Path(path).stat().st_size)
            if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
                return
            for record in records:
                with archive.open(record) as stream:
                    while stream.read(_READ_BYTES):
                        pass  # at its end the record is compared with its checksum
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, OSError) as error:
        # RuntimeError: a record that would be encrypted, or packed in an unknown way. EINVAL: a place before the file.
        if isinstance(error, DamagedFileError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise DamagedFileError(f"is damaged: {error}; copy or download it again") from None


def _check_expansion(expanded: int, size: int) -> None:
    if expanded > max(_FREE_BYTES, _MOST_EXPANSION * size):
        raise DamagedFileError(
            f"has {size / 1e6:.1f} MB but expands to {expanded / 1e6:.0f} MB, which no weights do; save it again with "
            "torch.save"
        )


def checksum_of(tensors: dict[str, torch.Tensor], facts: str = "") -> int:
    """Returns the CRC-32 of a text and of the names and bytes of tensors, in the order of their names."""
    checksum = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(errors="replace"), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def check_checksum(tensors: dict[str, torch.Tensor], facts: str, noted: str | None) -> None:
    """
    Args:
        noted: the checksum in the file; None in those of other programs and of older versions.
    Raises:
        DamagedFileError: tensors and facts are not those of the checksum.
    """
    if noted is not None and str(checksum_of(tensors, facts)) != noted:
        raise DamagedFileError("is damaged: its tensors have other bytes than were written; copy or download it again")


def check_claims(value: Any) -> None:
    """Checks, in a file that has been loaded, that no tensor claims more numbers than are stored: an expanded one would
    take that memory with the first copy.

    Raises:
        DamagedFileError: one does.
    """
    for name, tensor in _tensors(value):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise DamagedFileError(f"has {name!r} as a tensor of layout {tensor.layout}; save it as a dense one")
        claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if claimed > max(stored, _FREE_BYTES // 64):
            raise DamagedFileError(
                f"has {name!r} of {list(tensor.shape)}, {claimed / 1e6:.0f} MB, of which {stored / 1e6:.3f} MB are "
                "stored; save it with .contiguous()"
            )


def _tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors in dicts, lists and tuples, however deep, with their keys."""
    waiting: list[tuple[str, Any]] = [("the tensor", value)]
    seen: set[int] = set()
    while waiting:
        name, entry = waiting.pop()
        if isinstance(entry, torch.Tensor):
            yield name, entry
        elif isinstance(entry, (dict, list, tuple)) and id(entry) not in seen:
            seen.add(id(entry))
            pairs: Iterable[tuple[Any, Any]] = entry.items() if isinstance(entry, dict) else enumerate(entry)
            waiting += [(str(key), inner) for key, inner in pairs]


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns which tensor has a value that is not finite, in words; None where all are."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no comparison
        low, high = torch.aminmax(wide)
        if not math.isfinite(low.item()) or not math.isfinite(high.item()):
            count = int((~wide.isfinite()).sum())
            return f"{count} of the {tensor.numel()} values of {name} are NaN or infinite"
    return None
