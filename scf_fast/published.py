"""What users of the published SCF code know by name: its loss class, ``hparams.json``, ``ckpts/ckpt_eN.pt``, and what its flags do here."""
import json
import math
from pathlib import Path

import torch
from torch import nn

from kernels import log_bessel_i, log_vmf_normalizer
from scf_fast.checkpoints import save_file
from scf_fast.config import Config
from scf_fast.engine import full_optimizer_state

_EPSILON = 1e-6  # of the published code, in both of its logarithms; the first decides its result, see KLDiracVMF
_HPARAMS = ("dataset", "dataroot", "seed", "gpu_ids", "batch_size", "eval_batch_size", "output_dir", "saved_bkb", "saved_fc", "num_workers", "cuda", "epochs",
            "lr", "lr_scheduler", "step_size", "gamma", "convf_dim", "z_dim", "radius", "max_grad_clip", "max_grad_norm", "tensorboard", "finetune_bkb")


class KLDiracVMF(nn.Module):
    """KL divergence between a Dirac at the class center and the r-radius vMF; the published class of this name, call for call.

        losses = l1 + l2 + l3 + (d/2) log(2 pi) + d log r
        l1 = -kappa cos,  l2 = -(d/2 - 1) log kappa,  l3 = log I_(d/2-1)(kappa)

    Source: Li et al., CVPR 2021, and the class KLDiracVMF of its code.

    Args:
        z_dim: d.
        radius: r.
        normalizer: ``"exact"``; or ``"published"``, which has l3 = log(1e-6 + exp(log I - kappa)) + kappa and l2 = -(d/2 - 1) log(1e-6 + kappa)
            as that code does. At d = 512 its l3 is kappa - 13.8 up to kappa = 3000, so that no kappa below 255 is ever optimal.
    Raises:
        ValueError: unknown normalizer.
    """

    def __init__(self, z_dim: int, radius: float, normalizer: str = "exact"):
        super().__init__()
        if normalizer not in ("exact", "published"):
            raise ValueError(f"normalizer must be 'exact' or 'published', got {normalizer!r}")
        self.z_dim, self.radius, self.normalizer = z_dim, radius, normalizer

    def forward(self, mu: torch.Tensor, kappa: torch.Tensor, wc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            mu: (B, d) unit directions.
            kappa: (B, 1), positive.
            wc: (B, d) class centers of length r, the own one of each row.
        Returns:
            (losses, l1, l2, l3), each (B, 1), differentiable in all arguments.
        """
        d, order = self.z_dim, self.z_dim / 2 - 1
        l1 = -kappa * (mu * wc).sum(dim=1, keepdim=True) / self.radius
        log_bessel = log_bessel_i(order, kappa)
        if self.normalizer == "exact":
            losses = l1 - log_vmf_normalizer(kappa, d) + d * math.log(self.radius)
            return losses, l1, -order * torch.log(kappa), log_bessel
        l2 = -order * torch.log(_EPSILON + kappa)
        l3 = torch.log(_EPSILON + torch.exp(log_bessel - kappa)) + kappa
        return l1 + l2 + l3 + d / 2 * math.log(2 * math.pi) + d * math.log(self.radius), l1, l2, l3


def flag_notes(config: Config, launched: bool) -> list[str]:
    """What a user of the published command line should know about this run, one line each.

    Args:
        launched: whether a launcher started this process, so that it has chosen the GPU.
    """
    notes = []
    if config.gpu_ids:
        what = "the launcher chooses the GPUs" if launched else f"plain python trains on one GPU, the first of {config.gpu_ids}"
        notes.append(f"--gpu_ids {config.gpu_ids}: {what}; for these: deepspeed --include localhost:{config.gpu_ids.replace(' ', '')} train.py ...")
    if config.eval_batch_size is not None:
        notes.append("--eval_batch_size has no effect; evaluate with python -m scf_fast.evaluation")
    if config.stage == "confidence":
        notes.append({
            "exact": "normalizer: exact, the paper's objective. The published code's float32 formula holds d log I/d kappa at 1 up to kappa = 3000 "
                     "(d = 512), so that its kappa tends to (d/2 - 1)/(1 - cos), never under 255; --normalizer published reproduces it",
            "published": "normalizer: published. This float32 formula holds d log I/d kappa at 1 up to kappa = 3000 (d = 512), so that kappa tends to "
                         "(d/2 - 1)/(1 - cos), never under 255; --normalizer exact is the paper's objective"}[config.normalizer])
    if config.finetune_bkb:
        notes.append("--finetune_bkb: the whole backbone trains, in train mode, with the confidence net's learning rate; the published code lists its "
                     "output layer alone, under names that its backbone does not have")
    return notes


def write_hparams(config: Config, z_dim: int, convf_dim: int) -> None:
    """``hparams.json`` of the published code: its command line's values, sorted."""
    values = {**{key: getattr(config, key) for key in _HPARAMS}, "z_dim": z_dim, "convf_dim": convf_dim, "eval_batch_size": config.eval_batch_size or 1}
    Path(config.output_dir, "hparams.json").write_text(json.dumps(values, sort_keys=True, indent=4))


def adam_state_dict(engine) -> dict:
    """The state_dict that ``torch.optim.Adam`` over the engine's trained parameters would have, under any ZeRO stage; collective.

    On the main rank; the others get one without the moments.
    """
    step = torch.tensor(float(engine.global_steps - engine.skipped_steps))
    state = {index: {"step": step, **moments} for index, moments in enumerate(full_optimizer_state(engine))}
    settings = {key: engine.basic_optimizer.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    like = torch.optim.Adam([torch.empty(0) for _ in state], **settings)
    return {"state": state, "param_groups": like.state_dict()["param_groups"]}


def write_checkpoint(folder: Path, progress: dict, net_state: dict, optimizer_state: dict, backbone_state: dict | None) -> Path:
    """``ckpts/ckpt_eN.pt`` as the published code writes it after epoch N, counted from 1.

    Args:
        progress: epoch and global_step, counted from 0.
        optimizer_state: of :func:`adam_state_dict`.
        backbone_state: where the backbone was trained too.
    """
    path = folder / "ckpts" / f"ckpt_e{progress['epoch'] + 1}.pt"
    path.parent.mkdir(exist_ok=True)
    backbone = {} if backbone_state is None else {"backbone_state_dict": backbone_state}
    save_file({**progress, "uncer_net_state_dict": net_state, "opt_state": optimizer_state, **backbone}, path)
    return path
