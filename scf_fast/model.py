"""A trained SCF model: image -> direction mu and concentration kappa."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import DEFAULT_RADIUS, ConfidenceNet, build_confidence_net, identify_confidence_net
from scf_fast.objectives import Objective
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.family_names import StateDict
from scf_fast.weights.reading import read_noted_facts, read_weights
from scf_fast.weights.writing import write_weights


class SCF(nn.Module):
    """Backbone and confidence net, or a backbone alone, in evaluation mode.

        model = SCF.from_checkpoint("run/scf_model.pt")
        mu, kappa = model(images)  # images: (B, 3, 112, 112) RGB, scaled as model.normalization says

    Without a confidence net there is no kappa: methods return None in its place.

    Attributes:
        radius: r of the sphere that the confidence net was trained for.
        normalization: pixel convention, ``"insightface"`` or ``"published"`` (see
            ``scf_fast.pipelines.loading.base.Preprocessing``).
        embedding_dim: width d of the features.
    """

    def __init__(
        self,
        backbone: Backbone,
        confidence_net: ConfidenceNet | None,
        radius: float = DEFAULT_RADIUS,
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
        """Returns the model in weight files of any family.

        Args:
            path: a file with backbone and confidence net, such as the one stage 2 writes, or its output folder; or the
                files that hold them, with commas between: ``"backbone.pth,ckpts/ckpt_e30.pt"`` is a model of the
                published code.
            radius: of the sphere, if the file does not say it; else 64.
            normalization: of the pixels, if the file does not say it; else as the ``fc.pth`` that stage 1 leaves
                beside a backbone notes it, else the convention of the backbone's family.
            backbone_alone: whether to accept files without a confidence net, such as those of stage 1 or of
                insightface.
        Raises:
            InputError: backbone or confidence net is missing or does not fit the other, an argument contradicts the
                file, or the ``fc.pth`` beside it cannot be read.
        """
        weights = read_weights(path, "model")
        given = Facts(radius=radius, normalization=normalization)
        noted = weights.facts.known()
        for name, value in given.known().items():
            if noted.get(name, value) != value:
                raise InputError(
                    f"model {path}: was trained with {name} {noted[name]!r}, got {value!r}; leave the argument out"
                )
        name, z_dim = weights.network()
        if normalization is None:
            weights.facts = read_noted_facts(weights, path)
        weights.facts = given.completed_by(weights.facts)
        backbone = Backbone(name, z_dim)
        backbone.load_state_dict(weights.require_backbone())
        net = None
        if not backbone_alone or weights.confidence_net is not None:
            net = _load_confidence_net(weights.require_confidence_net(), backbone, f"model {path}")
        return cls(backbone, net, weights.radius, weights.normalization).to(device)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unnormalized features (B, d) and log kappa (B,), both float32."""
        features, convf = self.backbone(images)
        return features.float(), None if self.confidence_net is None else self.confidence_net(convf).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unit directions mu (B, d) and kappa (B,), both float32."""
        features, log_kappa = self.embed(images)
        return F.normalize(features), None if log_kappa is None else log_kappa.exp()


def _load_confidence_net(state: StateDict, backbone: Backbone, source: str) -> ConfidenceNet:
    architecture = backbone.architecture
    shape = identify_confidence_net(state)
    net = build_confidence_net(shape.name, architecture.widths[-1], architecture.map_size, outputs=shape.outputs)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{source}: the confidence net does not fit the {backbone.name}: {str(error).splitlines()[-1].strip()}"
        ) from None
    return net


def save_model(
    path: Path,
    backbone_state: StateDict,
    confidence_state: StateDict,
    *,
    radius: float,
    normalization: str,
    normalizer: str | None = None,
    objective: Objective | None = None,
    warning: str | None = None,
    epoch: int | None = None,
    global_step: int | None = None,
) -> None:
    """Writes one file with everything that :meth:`SCF.from_checkpoint` needs.

    Args:
        objective: that the confidence net was trained for; None counts as SCF.
        warning: what speaks against using the confidence net, for people.
        normalizer, epoch, global_step: how it was trained, where that is known; for people.
    """
    stated = None if objective is None else objective.value
    facts = Facts(epoch, global_step, radius, normalization, normalizer, stated, warning)
    write_weights(Weights(str(path), backbone_state, confidence_net=confidence_state, facts=facts), path)
