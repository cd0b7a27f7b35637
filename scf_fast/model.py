"""A trained SCF model: image -> direction mu and concentration kappa."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net, identify_confidence_net
from scf_fast.weights import reading, writing
from scf_fast.weights.reading import CENTERS_FILE, MODEL_FILE, Weights

__all__ = ["MODEL_FILE", "SCF", "load_model", "save_model"]


class SCF(nn.Module):
    """Backbone and confidence net, or a backbone alone, in evaluation mode.

        model = SCF.from_checkpoint("run/scf_model.pt")
        mu, kappa = model(images)  # images: (B, 3, 112, 112) RGB, scaled as model.normalization says

    Without a confidence net there is no kappa: None stands in its place wherever it would come out.

    Attributes:
        radius: r of the sphere that the confidence net was trained for.
        normalization: pixel convention, ``"insightface"`` or ``"published"`` (see
            ``scf_fast.pipelines.loading.base.Preprocessing``).
        embedding_dim: width d of the features.
    """

    def __init__(
        self,
        backbone: nn.Module,
        confidence_net: nn.Module | None,
        radius: float = 64.0,
        normalization: str = "insightface",
    ):
        super().__init__()
        self.backbone, self.confidence_net = backbone, confidence_net
        self.radius, self.normalization, self.embedding_dim = radius, normalization, backbone.z_dim
        self.eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        radius: float | None = None,
        normalization: str | None = None,
        device: torch.device | str = "cpu",
        backbone_alone: bool = False,
    ) -> "SCF":
        """The model in weight files of any family.

        Args:
            path: a file with backbone and confidence net, such as the one stage 2 writes, or its output folder; or the
                files that hold them, with commas between: ``"backbone.pth,ckpts/ckpt_e30.pt"`` is a model of the
                published code.
            radius: of the sphere, where the file does not say it; else 64.
            normalization: of the pixels, where the file does not say it; else as the ``fc.pth`` that stage 1 leaves
                beside a backbone notes it, else what the backbone's family takes.
            backbone_alone: whether files without a confidence net will do, such as those of stage 1 or of insightface.
        Raises:
            ValueError: backbone or confidence net is missing or does not fit the other, an argument contradicts the
                file, or the ``fc.pth`` beside it cannot be read.
        """
        weights = reading.read(path, "model")
        given = {
            key: value for key, value in (("radius", radius), ("normalization", normalization)) if value is not None
        }
        for key, value in given.items():
            if weights.facts.get(key, value) != value:
                raise InputError(
                    f"model {path}: was trained with {key} {weights.facts[key]!r}, got {value!r}; leave the argument "
                    "out"
                )
        name, z_dim = weights.network()
        if normalization is None:
            weights.facts = noted_facts(weights, path)
        facts = {**reading.model_facts(weights), **given}
        backbone = Backbone(name, z_dim)
        backbone.load_state_dict(weights.backbone)
        if backbone_alone and weights.confidence_net is None:
            return cls(backbone, None, facts["radius"], facts["normalization"]).to(device)
        net_state = weights.only("confidence_net").confidence_net
        net = build_confidence_net(
            identify_confidence_net(net_state), backbone.architecture.widths[-1], backbone.architecture.map_size
        )
        try:
            net.load_state_dict(net_state)
        except RuntimeError as error:
            raise InputError(
                f"model {path}: the confidence net does not fit the {name}: {str(error).splitlines()[-1].strip()}"
            ) from None
        return cls(backbone, net, facts["radius"], facts["normalization"]).to(device)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unnormalized features (B, d) and log kappa (B,), both float32."""
        features, convf = self.backbone(images)
        return features.float(), None if self.confidence_net is None else self.confidence_net(convf).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unit directions mu (B, d) and kappa (B,), both float32."""
        features, log_kappa = self.embed(images)
        return F.normalize(features), None if log_kappa is None else log_kappa.exp()


def noted_facts(weights: Weights, spec: str | Path) -> dict:
    """The facts of the weights in ``spec``. Where these do not tell the pixel convention, the class centers do that
    stage 1 writes beside its backbone.

    Raises:
        ValueError: there is a file of that name, and it cannot be read.
    """
    first = Path(str(spec).split(",")[0])
    beside = first.with_name(CENTERS_FILE)
    if "normalization" in weights.facts or not first.is_file() or not beside.is_file():
        return weights.facts
    noted = reading.read(beside, "class centers").facts
    return {**{key: noted[key] for key in ("normalization",) if key in noted}, **weights.facts}


def save_model(
    path: Path, backbone_state: dict, confidence_state: dict, *, radius: float, normalization: str, **provenance
) -> None:
    """One file with everything that :meth:`SCF.from_checkpoint` needs."""
    facts = {"radius": radius, "normalization": normalization, **provenance}
    writing.write(
        reading.Weights(str(path), backbone=backbone_state, confidence_net=confidence_state, facts=facts), path
    )


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SCF:
    """The model in a file that stage 2 wrote, or in the output folder of a stage-2 run; see :meth:`SCF.from_checkpoint`
    for what else.
    """
    return SCF.from_checkpoint(path, device=device)
