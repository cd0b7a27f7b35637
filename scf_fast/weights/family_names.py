"""Parameter names of each family of backbones, and the architecture that a state_dict belongs to.

Every family has the same parameters under names of its own. Ours are those of the published code, which
:class:`scf_fast.networks.backbones.Backbone` has; renaming is one to one, in either direction.
"""

import functools
import re
from collections.abc import Iterable
from typing import TypeAlias

import torch

from scf_fast.errors import InputError
from scf_fast.networks.backbones import BACKBONES, Architecture, Backbone

StateDict: TypeAlias = dict[str, torch.Tensor]


def _family_modules(family: str, units: tuple[int, ...]) -> dict[str, str]:
    """Returns the modules whose names differ in a family: our name -> the family's."""
    if family == "tface":
        return {
            f"body.{k}.res_layer.6.{fc}": f"body.{k}.res_layer.se_block.{fc}"
            for k in range(sum(units))
            for fc in ("fc1", "fc2")
        }
    if family != "insightface":
        return {}
    names = {
        "input_layer.0": "conv1",
        "input_layer.1": "bn1",
        "input_layer.2": "prelu",
        "output_layer.0": "bn2",
        "output_layer.3": "fc",
        "output_layer.4": "features",
    }
    places = [f"layer{stage}.{index}" for stage, count in enumerate(units, 1) for index in range(count)]
    for k, place in enumerate(places):
        names |= {
            f"body.{k}.res_layer.{i}": f"{place}.{name}"
            for i, name in enumerate(("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"))
        }
        names |= {f"body.{k}.shortcut_layer.{i}": f"{place}.downsample.{i}" for i in (0, 1)}
    return names


def _rename(key: str, modules: dict[str, str]) -> str:
    module, dot, leaf = key.rpartition(".")
    return f"{modules.get(module, module)}{dot}{leaf}"


def _theirs_to_ours(keys: Iterable[str]) -> dict[str, str]:
    """Returns module names of the family that wrote these keys -> ours; the keys tell how many units each stage has."""
    keys = list(keys)
    places = [re.match(r"layer(\d+)\.(\d+)\.", key) for key in keys]
    if any(places):
        units: dict[int, int] = {}
        for stage, index in (map(int, place.groups()) for place in places if place):
            units[stage] = max(units.get(stage, 0), index + 1)
        modules = _family_modules("insightface", tuple(units.get(stage, 0) for stage in range(1, max(units) + 1)))
    else:
        modules = _family_modules("tface", (len({key.split(".")[1] for key in keys if key.startswith("body.")}),))
    return {theirs: ours for ours, theirs in modules.items()}


def native_state(state_dict: StateDict) -> StateDict:
    """Returns a backbone's state_dict under the names of :class:`Backbone`, whichever family's names it has."""
    modules = _theirs_to_ours(state_dict)
    return {_rename(key, modules): value for key, value in state_dict.items()}


def family_state(state_dict: StateDict, architecture: Architecture) -> StateDict:
    """Returns the state_dict of a :class:`Backbone` under the names of its own family; undoes :func:`native_state`."""
    modules = _family_modules(architecture.family, architecture.units)
    return {_rename(key, modules): value for key, value in state_dict.items()}


@functools.cache
def _expected_shapes(name: str, z_dim: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in Backbone(name, z_dim).state_dict().items()}


def identify_backbone(state_dict: StateDict) -> tuple[str, int]:
    """Returns name and embedding width of the architecture that a state_dict belongs to, by its keys and shapes under
    any family's names.

    Raises:
        InputError: no known architecture has these keys; the message names the nearest and what differs, in the file's
            own words.
    """
    theirs_to_ours = _theirs_to_ours(state_dict)
    shapes = {_rename(key, theirs_to_ours): tuple(value.shape) for key, value in state_dict.items()}
    embedding = shapes.get("output_layer.3.weight", ())
    if len(embedding) != 2:
        raise InputError(
            "no backbone: must have 'output_layer.3.weight' (insightface: 'fc.weight') as IR-ResNets do, got keys "
            f"like {list(state_dict)[:3]}; give the file that stage 1 wrote"
        )
    z_dim = embedding[0]
    units = len({key.split(".")[1] for key in shapes if key.startswith("body.")})
    for name, architecture in BACKBONES.items():  # of the right depth only: building each of them takes a second
        if sum(architecture.units) == units and _expected_shapes(name, z_dim) == shapes:
            return name, z_dim
    nearest = min(BACKBONES, key=lambda name: sum(map(len, _differences(name, z_dim, shapes).values())))
    ours_to_theirs = {ours: theirs for theirs, ours in theirs_to_ours.items()}
    parts = []
    for kind, keys in _differences(nearest, z_dim, shapes).items():
        if keys:
            examples = sorted(_rename(key, ours_to_theirs) for key in keys)
            parts.append(f"{len(keys)} {kind} ({', '.join(examples[:3])}{', ...' if len(keys) > 3 else ''})")
    raise InputError(f"backbone of no known architecture; nearest is {nearest}: {'; '.join(parts)}")


def _differences(name: str, z_dim: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[str]]:
    """Returns the keys in which these shapes differ from those of an architecture, by the kind of the difference."""
    expected = _expected_shapes(name, z_dim)
    return {
        "missing": expected.keys() - shapes.keys(),
        "unexpected": shapes.keys() - expected.keys(),
        "misshaped": {key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key]},
    }
