import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file as save_safetensors

from scf_fast.errors import InputError
from scf_fast.networks.confidence import identify_confidence_net
from scf_fast.networks.families import family_state
from scf_fast.weights.files import save_file
from scf_fast.weights.reading import _PROGRESS, Weights, model_facts


def _only_part(weights: Weights, layout: str) -> str:
    if len(weights.parts) != 1:
        raise InputError(
            f"{weights.source}: one {layout} file holds one part, here are {', '.join(weights.parts) or 'none'}; "
            "choose with --part"
        )
    return weights.parts[0]


def _progress(weights: Weights) -> dict:
    return {key: weights.facts[key] for key in _PROGRESS if key in weights.facts}


def _own_names(weights: Weights) -> dict[str, torch.Tensor]:
    return family_state(weights.backbone, weights.architecture)


def _of_family(weights: Weights, family: str) -> None:
    if weights.backbone is None:
        return
    name = weights.network()[0]
    if weights.architecture.family != family:
        differ = {
            "published": "no BatchNorm between the convolutions of a unit",
            "tface": "a BatchNorm between the convolutions of a unit, and no projection where the width stays",
            "insightface": "a BatchNorm between the convolutions of a unit, and a projection at every stride",
        }
        raise InputError(
            f"{weights.source}: {name} cannot be written for {family}, whose backbones have {differ[family]}: it is "
            "another network; "
            f"use --to {weights.architecture.family}"
        )


def _net_must_be(weights: Weights, layout: str, net: str) -> None:
    if weights.confidence_net is not None and identify_confidence_net(weights.confidence_net) != net:
        raise InputError(
            f"{weights.source}: the confidence net {identify_confidence_net(weights.confidence_net)} cannot be "
            f"written for {layout}, "
            f"which has {net} alone; use --to scf_fast or safetensors"
        )


def _published(weights: Weights):
    _of_family(weights, "published")
    _net_must_be(weights, "published", "mlp")
    if weights.confidence_net is not None and weights.class_centers is None:
        backbone = {} if weights.backbone is None else {"backbone_state_dict": weights.backbone}
        return {**_progress(weights), "uncer_net_state_dict": weights.confidence_net, **backbone}
    if _only_part(weights, "published") == "backbone":
        return weights.backbone
    return {"arc_face_state_dict": {"weight": weights.class_centers}, **_progress(weights)}


def _tface(weights: Weights):
    part = _only_part(weights, "tface")
    _of_family(weights, "tface")
    _net_must_be(weights, "tface", "conv")
    return _own_names(weights) if part == "backbone" else getattr(weights, part)


def _insightface(weights: Weights):
    if weights.confidence_net is not None:
        raise InputError(
            f"{weights.source}: insightface has no confidence net; choose another part with --part, or use --to "
            "scf_fast"
        )
    _of_family(weights, "insightface")
    if weights.parts == ("backbone",):
        return _own_names(weights)
    backbone = {} if weights.backbone is None else {"state_dict_backbone": _own_names(weights)}
    return {**_progress(weights), **backbone, "state_dict_softmax_fc": {"weight": weights.class_centers}}


def _scf_fast(weights: Weights):
    """What the stages write: a backbone under its family's names, class centers and confidence nets as the published
    code has them, and backbone and confidence net together as a model that says how to use it.
    """
    if weights.parts == ("backbone", "confidence_net"):
        return {
            "format": "scf_fast model",
            "backbone_state_dict": weights.backbone,
            "uncer_net_state_dict": weights.confidence_net,
            **model_facts(weights),
        }
    part = _only_part(weights, "scf_fast")
    if part == "backbone":
        return _own_names(weights)
    entry = {
        "class_centers": ("arc_face_state_dict", {"weight": weights.class_centers}),
        "confidence_net": ("uncer_net_state_dict", weights.confidence_net),
    }
    return {**dict([entry[part]]), **weights.facts}


def _safetensors(weights: Weights) -> dict[str, torch.Tensor]:
    """One part under its own names; several with the part's name before each."""
    if weights.parts == ("backbone",):
        return _own_names(weights)
    if weights.parts == ("confidence_net",):
        return weights.confidence_net
    flat = {} if weights.class_centers is None else {"class_centers": weights.class_centers}
    for part in ("backbone", "confidence_net"):
        flat |= {f"{part}.{key}": value for key, value in (getattr(weights, part) or {}).items()}
    return flat


LAYOUTS: dict[str, Callable[[Weights], Any]] = {
    "published": _published,
    "tface": _tface,
    "insightface": _insightface,
    "scf_fast": _scf_fast,
    "safetensors": _safetensors,
}


def write(weights: Weights, path: str | Path, layout: str = "scf_fast") -> None:
    """Write a weight file, complete or not at all; every tensor keeps its dtype and bits.

    Args:
        layout: a key of :data:`LAYOUTS`.
    Raises:
        ValueError: the layout has no place for these weights; the message says why.
    """
    if not weights.parts:
        raise InputError(f"{weights.source}: must hold weights of a known kind to be written; inspect says what it has")
    value = LAYOUTS[layout](weights)
    if layout != "safetensors":
        return save_file(value, Path(path))
    part = Path(path).with_name(Path(path).name + ".part")
    save_safetensors(
        {key: tensor.contiguous() for key, tensor in value.items()},
        part,
        {"format": "pt", "scf_fast": json.dumps(weights.facts)},
    )
    os.replace(part, path)
