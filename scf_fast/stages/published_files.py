"""Files that users of the published SCF code know by name (``hparams.json``, ``ckpts/ckpt_eN.pt``), and what its flags
do here.
"""

import json
from pathlib import Path
from typing import Any

import torch

from scf_fast.config import ConfidenceConfig, Config
from scf_fast.engine.engine import Engine
from scf_fast.objectives import Objective
from scf_fast.pipelines.formats.atomic_file import write_text
from scf_fast.stages.base import Progress
from scf_fast.weights.files import save_torch_file

_HPARAMS = (
    "dataset",
    "dataroot",
    "seed",
    "gpu_ids",
    "batch_size",
    "eval_batch_size",
    "output_dir",
    "saved_bkb",
    "saved_fc",
    "num_workers",
    "cuda",
    "epochs",
    "lr",
    "lr_scheduler",
    "step_size",
    "gamma",
    "convf_dim",
    "z_dim",
    "radius",
    "max_grad_clip",
    "max_grad_norm",
    "tensorboard",
    "finetune_bkb",
)


def flag_notes(config: Config, launched: bool) -> list[str]:
    """Returns what a user of the published command line should know about this run, one line each.

    Args:
        launched: whether a launcher started this process, so that it has chosen the GPU.
    """
    notes = []
    if config.gpu_ids:
        what = (
            "the launcher chooses the GPUs"
            if launched
            else f"plain python trains on one GPU, the first of {config.gpu_ids}"
        )
        notes.append(
            f"--gpu_ids {config.gpu_ids}: {what}; for these: deepspeed --include "
            f"localhost:{config.gpu_ids.replace(' ', '')} train.py ..."
        )
    if config.eval_batch_size is not None:
        notes.append("--eval_batch_size has no effect; evaluate with python -m scf_fast.evaluation")
    if isinstance(config, ConfidenceConfig):
        named = ", ".join(f"{objective.value} ({objective.title})" for objective in config.objectives)
        if config.objectives != (Objective.SCF,):
            notes.append(f"objective: {named}")
    if isinstance(config, ConfidenceConfig) and Objective.SCF in config.objectives:
        notes.append(
            {
                "exact": "normalizer: exact, the paper's objective. The published code's float32 formula holds d log "
                "I/d kappa at 1 up to kappa = 3000 (d = 512), so that its kappa tends to (d/2 - 1)/(1 - cos), never "
                "under 255; --normalizer published reproduces it",
                "published": "normalizer: published. This float32 formula holds d log I/d kappa at 1 up to kappa = "
                "3000 (d = 512), so that kappa tends to (d/2 - 1)/(1 - cos), never under 255; --normalizer exact is "
                "the paper's objective",
            }[config.normalizer]
        )
    if isinstance(config, ConfidenceConfig) and config.finetune_bkb:
        notes.append(
            "--finetune_bkb: the whole backbone trains, in train mode, with the confidence net's learning rate; the "
            "published code lists its output layer alone, under names that its backbone does not have"
        )
    return notes


def write_hparams(config: ConfidenceConfig, z_dim: int, convf_dim: int) -> None:
    """Writes ``hparams.json`` of the published code: its command line's values, sorted."""
    values = {
        **{key: getattr(config, key) for key in _HPARAMS},
        "z_dim": z_dim,
        "convf_dim": convf_dim,
        "eval_batch_size": config.eval_batch_size or 1,
    }
    write_text(Path(config.output_dir, "hparams.json"), json.dumps(values, sort_keys=True, indent=4))


def adam_state_dict(engine: Engine) -> dict[str, Any]:
    """Returns the state_dict that ``torch.optim.Adam`` over the engine's trained parameters would have, under any ZeRO
    stage; collective.

    On the main rank; the others get one without the moments.
    """
    step = torch.tensor(float(engine.applied_steps))
    state = {index: {"step": step, **moments} for index, moments in enumerate(engine.full_optimizer_state())}
    settings = {key: engine.optimizer.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    like = torch.optim.Adam([torch.empty(0) for _ in state], **settings)
    return {"state": state, "param_groups": like.state_dict()["param_groups"]}


def write_checkpoint(
    folder: Path,
    progress: Progress,
    net_state: dict[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    backbone_state: dict[str, torch.Tensor] | None,
) -> Path:
    """Writes ``ckpts/ckpt_eN.pt`` as the published code does after epoch N, counted from 1, and returns its path.

    Args:
        optimizer_state: of :func:`adam_state_dict`.
        backbone_state: where the backbone was trained too.
    """
    path = folder / "ckpts" / f"ckpt_e{progress.epoch + 1}.pt"
    path.parent.mkdir(exist_ok=True)
    backbone = {} if backbone_state is None else {"backbone_state_dict": backbone_state}
    state = {**progress.as_dict(), "uncer_net_state_dict": net_state, "opt_state": optimizer_state, **backbone}
    save_torch_file(state, path)
    return path
