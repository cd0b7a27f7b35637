"""What a run resumes from: one folder a checkpoint, written by all ranks through DeepSpeed, complete or absent."""
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from scf_fast.checkpoints import load_file, save_file


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
