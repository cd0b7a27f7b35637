"""Writes weight files in the layouts of other training code and in our own.

A layout says what the file's entries are called; each of the functions in :data:`LAYOUTS` returns them, or refuses
weights that the layout has no place for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scf_fast.errors import InputError
from scf_fast.networks.confidence import identify_confidence_net
from scf_fast.objectives import Density, Objective
from scf_fast.weights.contents import Part, Weights
from scf_fast.weights.family_names import StateDict, family_state
from scf_fast.weights.files import save_safetensors_file, save_torch_file

_UNITS_OF = {
    "published": "no BatchNorm between the convolutions of a unit",
    "tface": "a BatchNorm between the convolutions of a unit, and no projection where the width stays",
    "insightface": "a BatchNorm between the convolutions of a unit, and a projection at every stride",
}


def write_weights(weights: Weights, path: str | Path, layout: str = "scf_fast") -> None:
    """Writes a weight file, complete or not at all; every tensor keeps its dtype and bits.

    Args:
        layout: a key of :data:`LAYOUTS`.
    Raises:
        InputError: the layout has no place for these weights; the message says why.
        OSError: the file could not be written.
    """
    if not weights.parts:
        raise InputError(f"{weights.source}: must hold weights of a known kind to be written; inspect says what it has")
    content = LAYOUTS[layout](weights)
    if layout == "safetensors":
        save_safetensors_file(content, path, weights.facts.known())
    else:
        save_torch_file(content, path)


def _published(weights: Weights) -> Any:
    _require_family(weights, "published")
    _require_net(weights, "published", "mlp")
    if weights.confidence_net is not None and weights.class_centers is None:
        backbone = {} if weights.backbone is None else {"backbone_state_dict": weights.backbone}
        return {**_progress(weights), **_objective(weights), "uncer_net_state_dict": weights.confidence_net, **backbone}
    if _only_part(weights, "published") is Part.BACKBONE:
        return weights.backbone
    return {"arc_face_state_dict": {"weight": weights.class_centers}, **_progress(weights)}


def _tface(weights: Weights) -> Any:
    part = _only_part(weights, "tface")
    _require_family(weights, "tface")
    _require_net(weights, "tface", "conv")
    if weights.confidence_net is not None and weights.objective is not Objective.SCF:
        raise InputError(
            f"{weights.source}: a tface file cannot say that its confidence net is one of {weights.objective.title}; "
            "use --to scf_fast or safetensors"
        )
    return _own_names(weights) if part is Part.BACKBONE else getattr(weights, part.value)


def _insightface(weights: Weights) -> Any:
    if weights.confidence_net is not None:
        raise InputError(
            f"{weights.source}: insightface has no confidence net; choose another part with --part, or use --to "
            "scf_fast"
        )
    _require_family(weights, "insightface")
    if weights.class_centers is None:
        return _own_names(weights)
    backbone = {} if weights.backbone is None else {"state_dict_backbone": _own_names(weights)}
    return {**_progress(weights), **backbone, "state_dict_softmax_fc": {"weight": weights.class_centers}}


def _scf_fast(weights: Weights) -> Any:
    """Returns the entries that the stages write.

    A backbone has its family's names, class centers and confidence nets those of the published code; backbone and
    confidence net together are a model that says how to use it.
    """
    if weights.parts == (Part.BACKBONE, Part.CONFIDENCE_NET):
        normalizer = weights.facts.normalizer
        return {
            "format": "scf_fast model",
            "backbone_state_dict": weights.backbone,
            "uncer_net_state_dict": weights.confidence_net,
            "radius": weights.radius,
            "normalization": weights.normalization,
            **({} if normalizer is None else {"normalizer": normalizer}),
            **_objective(weights),
            **{name: value for name, value in weights.facts.known().items() if name in ("warning", "kappa_factor")},
            **_progress(weights),
        }
    part = _only_part(weights, "scf_fast")
    if part is Part.BACKBONE:
        return _own_names(weights)
    if part is Part.CLASS_CENTERS:
        return {"arc_face_state_dict": {"weight": weights.class_centers}, **weights.facts.known()}
    return {"uncer_net_state_dict": weights.confidence_net, **weights.facts.known()}


def _safetensors(weights: Weights) -> StateDict:
    """Returns one part under its own names; several with the part's name before each."""
    if weights.parts == (Part.BACKBONE,):
        return _own_names(weights)
    if weights.parts == (Part.CONFIDENCE_NET,):
        return weights.require_confidence_net()
    flat: dict[str, torch.Tensor] = {}
    if weights.class_centers is not None:
        flat["class_centers"] = weights.class_centers
    for part in (Part.BACKBONE, Part.CONFIDENCE_NET):
        state = getattr(weights, part.value) or {}
        flat |= {f"{part.value}.{key}": value for key, value in state.items()}
    return flat


LAYOUTS: dict[str, Callable[[Weights], Any]] = {
    "published": _published,
    "tface": _tface,
    "insightface": _insightface,
    "scf_fast": _scf_fast,
    "safetensors": _safetensors,
}


def _only_part(weights: Weights, layout: str) -> Part:
    if len(weights.parts) != 1:
        found = ", ".join(part.value for part in weights.parts)
        raise InputError(
            f"{weights.source}: a {layout} file holds one part, but there are {found or 'none'}; choose with --part"
        )
    return weights.parts[0]


def _progress(weights: Weights) -> dict[str, int | float | str]:
    """Returns epoch and global step, as far as they are known."""
    return {name: value for name, value in weights.facts.known().items() if name in ("epoch", "global_step")}


def _objective(weights: Weights) -> dict[str, str]:
    """Returns the objective, if it is stated."""
    return {} if weights.facts.objective is None else {"objective": weights.facts.objective}


def _own_names(weights: Weights) -> StateDict:
    """Returns the backbone under the names of its family."""
    return family_state(weights.require_backbone(), weights.architecture)


def _require_family(weights: Weights, family: str) -> None:
    if weights.backbone is None:
        return
    name, _ = weights.network()
    if weights.architecture.family != family:
        raise InputError(
            f"{weights.source}: {name} cannot be written for {family}, whose backbones have {_UNITS_OF[family]}: it is "
            f"another network; use --to {weights.architecture.family}"
        )


def _require_net(weights: Weights, layout: str, net: str) -> None:
    if weights.confidence_net is None:
        return
    if weights.objective.density is not Density.VMF:
        raise InputError(
            f"{weights.source}: the confidence net is one of {weights.objective.title} and predicts variances, which "
            f"{layout} would take for kappa; use --to scf_fast or safetensors"
        )
    name = identify_confidence_net(weights.confidence_net).name
    if name != net:
        raise InputError(
            f"{weights.source}: the confidence net {name} cannot be written for {layout}, which has {net} alone; use "
            "--to scf_fast or safetensors"
        )
