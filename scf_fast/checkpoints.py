"""Checkpoints of a run (DeepSpeed folders, complete or absent) and weight files in the published formats.

Weight files: a backbone is a bare state_dict, class centers are ``{"arc_face_state_dict": {"weight": (C, z_dim)}}``, both as the
published code loads them; a whole model is what :mod:`scf_fast.model` reads.
"""
import logging
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


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


def save_checkpoint(engine, folder: Path, state: dict, keep: int) -> None:
    """Write one checkpoint of all ranks, then move ``latest`` to it; collective.

    ``latest`` moves only when every rank is done, so it never names a half-written checkpoint. ``state`` must be the same on all ranks;
    each rank's random state is kept beside it.
    """
    tag = f"step{state['step']:08d}"
    rank = dist.get_rank()
    (folder / tag).mkdir(parents=True, exist_ok=True)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    save_file(random_state, folder / tag / f"random_rank{rank}.pt")
    client_state = {"scf_fast": {**state, "world_size": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}}
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    dist.barrier()
    if rank == 0:
        save_file(client_state["scf_fast"], folder / tag / "state.pt")
        part = folder / "latest.part"
        part.write_text(tag)
        os.replace(part, folder / "latest")
        for old in sorted(path for path in folder.glob("step*") if path.name < tag)[:-(keep - 1) or None]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def peek_checkpoint(folder: Path) -> dict | None:
    """The state that the newest checkpoint was saved with, without loading it; None where there is none.

    Raises:
        ValueError: ``latest`` names a checkpoint that is not there.
    """
    latest = folder / "latest"
    if not latest.exists():
        return None
    state_file = folder / latest.read_text().strip() / "state.pt"
    if not state_file.exists():
        raise ValueError(f"{latest} names {state_file.parent}, which is not complete; write the name of an intact step folder into it, or use --overwrite")
    return load_file(state_file, "checkpoint")


def load_checkpoint(engine, folder: Path) -> dict:
    """Load the newest checkpoint into the engine and return its state; collective."""
    tag = (folder / "latest").read_text().strip()
    engine.load_checkpoint(str(folder), tag=tag)
    random_state = load_file(folder / tag / f"random_rank{dist.get_rank()}.pt", "checkpoint")
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and torch.cuda.is_available():
        torch.cuda.set_rng_state(random_state["cuda"])
    return load_file(folder / tag / "state.pt", "checkpoint")
