"""What a run resumes from: one folder a checkpoint, written by all ranks through DeepSpeed, complete or absent.

DeepSpeed's files resume the same number of ranks under the same ZeRO stage, bit for bit. Stage 1, whose class centers can be divided
anew, has a second copy of the engine's weights and optimiser state in its folders, whole, which any number of ranks and any ZeRO stage read.
"""
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from scf_fast.checkpoints import load_file, save_file
from scf_fast.class_centers import ClassCenters
from scf_fast.engine import full_optimizer_state, full_state_dict, set_full_optimizer_state

_WHOLE = "whole.pt"


def save_checkpoint(engine, folder: Path, state: dict, keep: int, centers: ClassCenters | None = None) -> None:
    """Write one checkpoint of all ranks, then move ``latest`` to it; collective.

    ``latest`` moves only when every rank is done, so it never names a half-written checkpoint. ``state`` must be the same on all ranks;
    each rank's random state is kept beside it, and with ``centers`` their rows and the engine's state as a whole.
    """
    tag = f"step{state['step']:08d}"
    rank = dist.get_rank()
    (folder / tag).mkdir(parents=True, exist_ok=True)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    save_file(random_state, folder / tag / f"random_rank{rank}.pt")
    if centers is not None:
        centers.save(folder / tag)
        whole = {"weights": full_state_dict(engine, engine.module), "optimizer": full_optimizer_state(engine)}
        if rank == 0:
            save_file(whole, folder / tag / _WHOLE)
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


def is_other_layout(state: dict, world_size: int, zero_stage: int) -> bool:
    """Whether DeepSpeed's own files of this checkpoint are of no use to a launch."""
    return (state["world_size"], state["zero_stage"]) != (world_size, zero_stage)


def load_weights(module: torch.nn.Module, folder: Path) -> None:
    """Weights and buffers of the newest checkpoint, into a module that no engine has divided yet."""
    tag = (folder / "latest").read_text().strip()
    module.load_state_dict(load_file(folder / tag / _WHOLE, "checkpoint")["weights"])


def load_checkpoint(engine, folder: Path, centers: ClassCenters | None = None) -> dict:
    """Load the newest checkpoint into the engine and the class centers and return its state; collective.

    Where another number of ranks or another ZeRO stage has written it, :func:`load_weights` must have come before the engine was made; the
    ranks' random states then begin anew.
    """
    tag = (folder / "latest").read_text().strip()
    state = load_file(folder / tag / "state.pt", "checkpoint")
    if is_other_layout(state, dist.get_world_size(), engine.zero_optimization_stage()):
        set_full_optimizer_state(engine, load_file(folder / tag / _WHOLE, "checkpoint")["optimizer"])
        engine.global_steps = state["step"]
        torch.manual_seed(torch.initial_seed() + state["step"])
    else:
        engine.load_checkpoint(str(folder), tag=tag)
        random_state = load_file(folder / tag / f"random_rank{dist.get_rank()}.pt", "checkpoint")
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])
    if centers is not None:
        centers.load(folder / tag, state["world_size"])
    return state
