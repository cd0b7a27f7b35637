"""The contents of weight files as values: :class:`Weights`, its parts, and the facts that stand beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, NoReturn

import torch

from scf_fast.errors import InputError
from scf_fast.networks.backbones import BACKBONES, Architecture
from scf_fast.networks.confidence import DEFAULT_RADIUS, identify_confidence_net
from scf_fast.networks.precision import dtype_name
from scf_fast.objectives import Objective
from scf_fast.weights.family_names import StateDict, identify_backbone

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: values that are not trained


class Part(str, Enum):
    """A part of an SCF model that a file can hold; the value is the name of its field in :class:`Weights`."""

    BACKBONE = "backbone"
    CLASS_CENTERS = "class_centers"
    CONFIDENCE_NET = "confidence_net"


_WANTED = {
    Part.BACKBONE: "a backbone's state_dict of tensors",
    Part.CLASS_CENTERS: "class centers, one (classes, width) tensor",
    Part.CONFIDENCE_NET: "a confidence net's state_dict of tensors",
}


_FACT_TYPES: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "radius": (int, float),
    "normalization": str,
    "normalizer": str,
    "objective": str,
    "warning": str,
    "kappa_factor": (int, float),
}


@dataclass(frozen=True)
class Facts:
    """The facts that a weight file states besides its tensors; None if it does not state one.

    Attributes:
        epoch, global_step: counted from 0, as the published code does it.
        radius: of the sphere that the confidence net was trained for.
        normalization: of the pixels, a name that scf_fast.pipelines.loading.base.Preprocessing knows.
        normalizer: of the SCF loss, ``"exact"`` or ``"published"``.
        objective: that the confidence net was trained for, a value of scf_fast.objectives.Objective. Files of other
            programs and older ones of this program do not state it: they are SCF.
        warning: what speaks against using the confidence net.
        kappa_factor: that ``scf_fast.calibrate`` has put into the confidence net, all of them together.
    """

    epoch: int | None = None
    global_step: int | None = None
    radius: float | None = None
    normalization: str | None = None
    normalizer: str | None = None
    objective: str | None = None
    warning: str | None = None
    kappa_factor: float | None = None

    @classmethod
    def found_in(cls, entry: Mapping[str, object]) -> "Facts":
        """Returns the facts among the entries of a checkpoint; a value of another type is ignored."""
        found: dict[str, Any] = {
            name: entry[name] for name, kind in _FACT_TYPES.items() if isinstance(entry.get(name), kind)
        }
        return cls(**found)

    def known(self) -> dict[str, int | float | str]:
        """Returns the facts that are known, by name, as files hold them."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def completed_by(self, other: "Facts") -> "Facts":
        """Returns these facts, with those of ``other`` in place of the unknown ones."""
        unknown = [entry.name for entry in fields(self) if getattr(self, entry.name) is None]
        return replace(self, **{name: getattr(other, name) for name in unknown})


@dataclass
class Weights:
    """The contents of a weight file, or of several that belong together; a part that is not there is None.

    Attributes:
        source: what the user named it with, for messages.
        backbone: state_dict under the names of :class:`scf_fast.networks.backbones.Backbone`.
        class_centers: (C, z_dim), unnormalized, in the dtype of the file.
        confidence_net: state_dict of one of :data:`scf_fast.networks.confidence.CONFIDENCE_NETS`.
        other: state_dicts that are none of these.
    """

    source: str = ""
    backbone: StateDict | None = None
    class_centers: torch.Tensor | None = None
    confidence_net: StateDict | None = None
    facts: Facts = field(default_factory=Facts)
    other: list[StateDict] = field(default_factory=list)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are there."""
        return tuple(part for part in Part if getattr(self, part.value) is not None)

    def only(self, part: Part) -> "Weights":
        """Returns one part alone, with the facts.

        Raises:
            InputError: it is not there; the message says what is there instead.
        """
        if part not in self.parts:
            self._raise_missing(part)
        return Weights(self.source, facts=self.facts, **{part.value: getattr(self, part.value)})

    def require_backbone(self) -> StateDict:
        """Returns the backbone.

        Raises:
            InputError: there is none; the message says what is there instead.
        """
        if self.backbone is None:
            self._raise_missing(Part.BACKBONE)
        return self.backbone

    def require_class_centers(self) -> torch.Tensor:
        """Returns (C, z_dim) float32 class centers, unnormalized, that can be trained on.

        Raises:
            InputError: there are none, or a row is zero.
        """
        if self.class_centers is None:
            self._raise_missing(Part.CLASS_CENTERS)
        centers = self.class_centers.float()
        if not centers.any(dim=1).all():
            raise InputError(
                f"{self.source}: no row of the class centers must be zero; the file is damaged or its training diverged"
            )
        return centers

    def require_confidence_net(self) -> StateDict:
        """Returns the confidence net.

        Raises:
            InputError: there is none; the message says what is there instead.
        """
        if self.confidence_net is None:
            self._raise_missing(Part.CONFIDENCE_NET)
        return self.confidence_net

    def network(self) -> tuple[str, int]:
        """Returns name and embedding width of the backbone.

        Raises:
            InputError: there is none, or its architecture is unknown.
        """
        return self._identify(self.require_backbone())

    @property
    def architecture(self) -> Architecture:
        """Architecture of the backbone; raises what :meth:`network` does."""
        return BACKBONES[self.network()[0]]

    @property
    def radius(self) -> float:
        """Radius of the model's sphere: as the file states it, else the default."""
        return DEFAULT_RADIUS if self.facts.radius is None else self.facts.radius

    @property
    def objective(self) -> Objective:
        """What the confidence net was trained for: as the file states it, else SCF.

        Raises:
            InputError: the file states an objective that this version does not know.
        """
        name = self.facts.objective
        try:
            return Objective.SCF if name is None else Objective(name)
        except ValueError:
            raise InputError(
                f"{self.source}: was trained for the objective {name!r}, which this version does not know (it knows "
                f"{', '.join(objective.value for objective in Objective)}); use the version that wrote the file, or a "
                "newer one"
            ) from None

    @property
    def normalization(self) -> str:
        """Pixel convention: as the file states it, else the one that the backbone's family is trained with."""
        return self.facts.normalization or self.architecture.normalization

    def describe(self) -> list[str]:
        """Returns one phrase for each part, for people to read."""
        lines = []
        if self.backbone is not None:
            name, z_dim = self.network()
            a = self.architecture
            size = sum(value.numel() for key, value in self.backbone.items() if not key.endswith(STATISTICS))
            lines.append(
                f"backbone {name} ({a.family}), embedding {z_dim}, last map {a.widths[-1]} x {a.map_size} x "
                f"{a.map_size}, {size / 1e6:.1f} M parameters, {_dtypes(self.backbone.values())}"
            )
        if self.class_centers is not None:
            lines.append(
                f"class centers of {len(self.class_centers)} identities, width {self.class_centers.shape[1]}, "
                f"{_dtypes([self.class_centers])}"
            )
        if self.confidence_net is not None:
            net = self.confidence_net
            shape = identify_confidence_net(net)
            width = f", {shape.outputs} outputs" if shape.outputs > 1 else ""
            trained_for = "" if self.facts.objective is None else f" for {self.facts.objective}"
            lines.append(
                f"confidence net {shape.name}{trained_for} on {shape.inputs} values{width}, "
                f"{sum(value.numel() for value in net.values()) / 1e6:.1f} M values, {_dtypes(net.values())}"
            )
        return lines

    def _identify(self, state: StateDict) -> tuple[str, int]:
        try:
            return identify_backbone(state)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from None

    def _raise_missing(self, part: Part) -> NoReturn:
        if self.parts:
            raise InputError(f"{self.source}: must hold {_WANTED[part]}, but holds {' and '.join(self.describe())}")
        if part is Part.BACKBONE and self.other:
            self._identify(max(self.other, key=len))  # says more exactly what is wrong with these tensors
        found = f"keys like {list(self.other[0])[:3]}" if self.other else "none"
        raise InputError(f"{self.source}: must hold {_WANTED[part]}, got {found}")


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return "/".join(sorted({dtype_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}))
