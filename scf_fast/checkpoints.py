"""Weight files: read with nothing but tensors let in, recognised by their keys, written complete or not at all.

A backbone is a bare state_dict, class centers are ``{"arc_face_state_dict": {"weight": (C, z_dim)}}``, both as the published code loads
them; a whole model is what :mod:`scf_fast.model` reads. The folders that a run resumes from belong to :mod:`scf_fast.run_state`.
"""
import os
from pathlib import Path

import torch


def save_file(value, path: Path) -> None:
    """``torch.save``, complete or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_file(path: str | Path, flag: str):
    """Tensors and plain containers from a checkpoint file; code in it is refused.

    Args:
        flag: what the user named the file with, for the message.
    Raises:
        ValueError: missing, unreadable, no PyTorch checkpoint, or holding more than tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error.strerror or error}); give the path of a checkpoint file") from None
    except Exception as error:  # on bytes that are no checkpoint the unpickler fails in any way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{flag} {path}: is no checkpoint of tensors ({reason})") from None


def backbone_state(path: str | Path, flag: str = "--saved_bkb") -> dict[str, torch.Tensor]:
    """The state_dict of a backbone file: bare, nested under a usual key, or with the ``module.`` prefix of DataParallel."""
    state = load_file(path, flag)
    for key in ("state_dict", "backbone_state_dict", "backbone"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{flag} {path}: must hold a state_dict of tensors, got {type(state).__name__}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def class_centers(path: str | Path, flag: str = "--saved_fc") -> torch.Tensor:
    """(C, z_dim) float32 class centers, unnormalised: the published file or a bare tensor.

    Raises:
        ValueError: the file holds neither, or values that are not finite or rows that are zero.
    """
    value = load_file(path, flag)
    if isinstance(value, dict):
        value = value.get("arc_face_state_dict", {}).get("weight") if isinstance(value.get("arc_face_state_dict", {}), dict) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        raise ValueError(f"{flag} {path}: must hold ['arc_face_state_dict']['weight'] or one (classes, width) tensor; is it a backbone file?")
    value = value.float()
    if not torch.isfinite(value).all() or not value.any(dim=1).all():
        raise ValueError(f"{flag} {path}: class centers must be finite and no row zero; the file is damaged or its training diverged")
    return value
