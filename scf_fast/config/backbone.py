"""The options of stage 1: a backbone under a margin softmax."""

import math
from dataclasses import dataclass
from typing import ClassVar

from scf_fast.config.base import Config
from scf_fast.config.options import option
from scf_fast.networks.backbones import ALIASES, BACKBONES

MARGIN_PRESETS = {"arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4), "combined": (1.0, 0.3, 0.2)}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Options of stage 1: a backbone under a margin softmax."""

    stage: ClassVar[str] = "backbone"
    default_zero_stage: ClassVar[int] = 1

    network: str = option(
        "ir_100",
        "backbone architecture: ir_* of the published code, tface_*, or insightface's iresnet* (r50 for iresnet50 is "
        "accepted); stage 2 reads it off the checkpoint instead",
        choices=tuple(BACKBONES),
        group="model",
        identity=True,
    )
    z_dim: int = option(512, "embedding width d", group="model", identity=True)
    dropout: float | None = option(
        None,
        "dropout before the embedding layer, in [0, 1); default: 0.4, for iresnet* 0",
        group="model",
        identity=True,
    )
    loss: str = option(
        "arcface",
        "margin preset: " + ", ".join(f"{name} {m}" for name, m in MARGIN_PRESETS.items()),
        choices=tuple(MARGIN_PRESETS),
        group="model",
        identity=True,
    )
    margins: tuple[float, float, float] = option(
        None,
        "m1,m2,m3 of cos(m1 theta + m2) - m3 (radians for m2); overrides --loss",
        group="model",
        metavar="M1,M2,M3",
        identity=True,
    )
    margin_gradient: str = option(
        "exact",
        "gradient at the target: the derivative, or s (as arcface_torch has it)",
        choices=("exact", "straight_through"),
        group="model",
        identity=True,
    )
    scale: float = option(64.0, "multiplier s of the logits", group="model", identity=True)
    label_smoothing: float = option(
        0.0, "share of the target distribution spread over all identities, in [0, 1)", group="model", identity=True
    )
    sample_rate: float = option(
        1.0,
        "share of the other identities that each step's softmax is over, drawn for each step (Partial FC), in (0, 1]",
        group="model",
        identity=True,
    )
    momentum: float = option(0.9, "SGD momentum")
    centers_state: str = option(
        "fp32",
        "type of the class centers' momentum; bf16 halves it, with stochastic rounding",
        choices=("fp32", "bf16"),
        group="system",
    )
    skip_below: float = option(
        0.0,
        "on a GPU the backward pass over the class centers leaves out tiles whose gradient is below this share of the "
        "largest "
        "possible, in [0, 1); 0 is exact, 0.000244 (2^-12) is under bf16's rounding",
        group="system",
    )
    fused_center_update: bool | None = option(
        None,
        "update class centers inside the backward pass, without storing their gradient; default: unless "
        "there is accumulation or fp16",
        group="system",
    )

    def _resolve(self) -> None:
        super()._resolve()
        self._set("network", ALIASES.get(self.network, self.network))
        if self.margins is None and self.loss in MARGIN_PRESETS:
            self._set("margins", MARGIN_PRESETS[self.loss])
        if self.normalization is None and self.network in BACKBONES:
            self._set("normalization", BACKBONES[self.network].normalization)

    def _check(self) -> None:
        super()._check()
        require = self._require
        require(self.momentum >= 0, "momentum", "0 or more")
        require(self.scale > 0, "scale", "positive")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        require(self.z_dim >= 2, "z_dim", "at least 2")
        require(len(self.margins) == 3, "margins", "three numbers m1,m2,m3")
        require(all(map(math.isfinite, self.margins)), "margins", "finite")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        require(0 < self.sample_rate <= 1, "sample_rate", "in (0, 1]")
        require(0 <= self.skip_below < 1, "skip_below", "in [0, 1)")
        require(
            not self.fused_center_update or (self.gradient_accumulation_steps == 1 and self.precision != "fp16"),
            "fused_center_update",
            "off with --gradient_accumulation_steps or fp16: the gradient is not complete, or may not count, in the "
            "backward pass",
        )
