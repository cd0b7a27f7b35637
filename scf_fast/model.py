"""A trained model: image -> direction mu and confidence, the concentration kappa or the precision 1 / variance."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.errors import InputError
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import DEFAULT_RADIUS, ConfidenceNet, build_confidence_net, identify_confidence_net
from scf_fast.objectives import Density, Objective
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.family_names import StateDict
from scf_fast.weights.reading import read_noted_facts, read_weights
from scf_fast.weights.writing import write_weights


def confidence_of(prediction: torch.Tensor, density: Density) -> torch.Tensor:
    """Returns (N,) confidences in the dtype of what a confidence net predicts.

    Args:
        prediction: (N,) log kappa; or (N,) or (N, D) log variances of a Gaussian.
    Returns:
        kappa; or 1 / variance, of several variances the inverse of their harmonic mean, which is the mean of
        1 / variance over the dimensions.
    """
    if density is Density.VMF:
        return prediction.exp()
    precision = prediction.neg().exp()
    return precision if precision.ndim == 1 else precision.mean(dim=1)


class SCF(nn.Module):
    """Backbone and confidence net, or a backbone alone, in evaluation mode.

        model = SCF.from_checkpoint("run/scf_model.pt")
        mu, kappa = model(images)  # images: (B, 3, 112, 112) RGB, scaled as model.normalization says

    The second value is the confidence under the density of the model's objective: kappa, or 1 / variance. Without a
    confidence net there is none: methods return None in its place.

    Args:
        confidence_net: predicts log kappa (B,), or log variances (B,) or (B, d), as the objective's density has it.
        others: see Attributes.
    Attributes:
        radius: r of the sphere that the confidence net was trained for; without meaning for Gaussians.
        normalization: pixel convention, ``"insightface"`` or ``"published"`` (see
            ``scf_fast.pipelines.loading.base.Preprocessing``).
        embedding_dim: width d of the features.
        objective: what the confidence net was trained for; without meaning for a backbone alone.
    Raises:
        ValueError: the confidence net does not give the values that the objective's density has.
    """

    def __init__(
        self,
        backbone: Backbone,
        confidence_net: ConfidenceNet | None,
        radius: float = DEFAULT_RADIUS,
        normalization: str = "insightface",
        objective: Objective = Objective.SCF,
    ):
        super().__init__()
        self.backbone, self.confidence_net = backbone, confidence_net
        self.radius, self.normalization, self.embedding_dim = radius, normalization, backbone.z_dim
        self.objective = objective
        allowed = {0, 1} if objective.density is Density.VMF else {0, 1, backbone.z_dim}
        if self.outputs not in allowed:
            raise ValueError(
                f"the confidence net of a model of {objective.title} must have 1 output"
                f"{'' if objective.density is Density.VMF else f' or {backbone.z_dim}, one for each dimension'}, got "
                f"{self.outputs}; its file states another objective than it was trained for, or none"
            )
        self.eval()

    @property
    def density(self) -> Density:
        """The density whose parameter the confidence net predicts."""
        return self.objective.density

    @property
    def outputs(self) -> int:
        """Values that the confidence net predicts for each image: 1, or d; 0 of a backbone alone."""
        return 0 if self.confidence_net is None else identify_confidence_net(self.confidence_net.state_dict()).outputs

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
                file, the file states an objective that this version does not know or that the confidence net does
                not fit, or the ``fc.pth`` beside it cannot be read.
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
        try:
            return cls(backbone, net, weights.radius, weights.normalization, weights.objective).to(device)
        except ValueError as error:
            raise InputError(f"model {path}: {error}") from None

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unnormalized features (B, d) and what the confidence net predicts: log
        kappa (B,), or log variances (B,) or (B, d). Both are float32.
        """
        features, convf = self.backbone(images)
        return features.float(), None if self.confidence_net is None else self.confidence_net(convf).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB -> unit directions mu (B, d) and confidences (B,), kappa or 1 / variance, see
        :func:`confidence_of`. Both are float32.
        """
        features, prediction = self.embed(images)
        return F.normalize(features), None if prediction is None else confidence_of(prediction, self.density)

    def log_variance(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) normalized RGB -> natural logarithms of the variances, (B,) or (B, d) float32.

        Raises:
            ValueError: the model's density is not Gaussian.
        """
        if self.confidence_net is None or self.density is not Density.GAUSSIAN:
            found = "a backbone alone" if self.confidence_net is None else f"of {self.objective.title}"
            raise ValueError(
                f"log_variance needs a model of a Gaussian objective, and this one is {found}; call the model for mu "
                "and its confidence"
            )
        _, prediction = self.embed(images)
        assert prediction is not None
        return prediction


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
