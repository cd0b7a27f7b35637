"""What users of the published SCF code know by name: its loss class, ``hparams.json``, ``ckpts/ckpt_eN.pt``, and what
its flags do here.
"""

import json
from pathlib import Path

import torch

from scf_fast.config import Config
from scf_fast.engine.engine import full_optimizer_state
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
    """What a user of the published command line should know about this run, one line each.

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
    if config.stage == "confidence":
        notes.append(
            {
                "exact": "normalizer: exact, the paper's objective. The published code's float32 formula holds d log "
                "I/d kappa at 1 up to kappa = 3000 "
                "(d = 512), so that its kappa tends to (d/2 - 1)/(1 - cos), never under 255; --normalizer published "
                "reproduces it",
                "published": "normalizer: published. This float32 formula holds d log I/d kappa at 1 up to kappa = "
                "3000 (d = 512), so that kappa tends to "
                "(d/2 - 1)/(1 - cos), never under 255; --normalizer exact is the paper's objective",
            }[config.normalizer]
        )
    if config.finetune_bkb:
        notes.append(
            "--finetune_bkb: the whole backbone trains, in train mode, with the confidence net's learning rate; the "
            "published code lists its "
            "output layer alone, under names that its backbone does not have"
        )
    return notes


def write_hparams(config: Config, z_dim: int, convf_dim: int) -> None:
    """``hparams.json`` of the published code: its command line's values, sorted."""
    values = {
        **{key: getattr(config, key) for key in _HPARAMS},
        "z_dim": z_dim,
        "convf_dim": convf_dim,
        "eval_batch_size": config.eval_batch_size or 1,
    }
    Path(config.output_dir, "hparams.json").write_text(json.dumps(values, sort_keys=True, indent=4))


def adam_state_dict(engine) -> dict:
    """The state_dict that ``torch.optim.Adam`` over the engine's trained parameters would have, under any ZeRO stage;
    collective.

    On the main rank; the others get one without the moments.
    """
    step = torch.tensor(float(engine.global_steps - engine.skipped_steps))
    state = {index: {"step": step, **moments} for index, moments in enumerate(full_optimizer_state(engine))}
    settings = {key: engine.basic_optimizer.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    like = torch.optim.Adam([torch.empty(0) for _ in state], **settings)
    return {"state": state, "param_groups": like.state_dict()["param_groups"]}


def write_checkpoint(
    folder: Path, progress: dict, net_state: dict, optimizer_state: dict, backbone_state: dict | None
) -> Path:
    """``ckpts/ckpt_eN.pt`` as the published code writes it after epoch N, counted from 1.

    Args:
        progress: epoch and global_step, counted from 0.
        optimizer_state: of :func:`adam_state_dict`.
        backbone_state: where the backbone was trained too.
    """
    path = folder / "ckpts" / f"ckpt_e{progress['epoch'] + 1}.pt"
    path.parent.mkdir(exist_ok=True)
    backbone = {} if backbone_state is None else {"backbone_state_dict": backbone_state}
    save_torch_file({**progress, "uncer_net_state_dict": net_state, "opt_state": optimizer_state, **backbone}, path)
    return path
