import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scf_fast.errors import InputError
from scf_fast.networks.backbones import BACKBONES, Architecture
from scf_fast.networks.confidence import identify_confidence_net
from scf_fast.networks.families import identify_backbone, native_state
from scf_fast.weights.files import load_file

BACKBONE_FILE, CENTERS_FILE, CONFIDENCE_FILE, MODEL_FILE = (
    "backbone.pth",
    "fc.pth",
    "confidence.pth",
    "scf_model.pt",
)  # what the stages write
# What a folder may stand for: insightface's shards of all ranks, the model of stage 2, the two files of stage 1. In its
# releases until 2022 insightface put a rank's class centers into a file of their own, beside the backbone.
_FOLDERS = (("checkpoint_gpu_*.pt",), (MODEL_FILE,), (BACKBONE_FILE, CENTERS_FILE, "rank[:_]*_softmax_weight.pt"))
_PROGRESS = ("epoch", "global_step")  # as every family counts them: from 0 in the published code and here
_FACTS = (*_PROGRESS, "radius", "normalization", "normalizer")
_OPTIMIZER = {"state", "param_groups"}  # keys of an optimizer's state_dict, whose moments have the shapes of weights
_DEFAULT_RADIUS = 64.0  # of the published command line and of TFace: their files do not say


@dataclass
class Weights:
    """What one weight file holds, or several that belong together; a part that is not there is None.

    Attributes:
        source: what the user named it with, for messages.
        backbone: state_dict under the names of :class:`scf_fast.networks.backbones.Backbone`.
        class_centers: (C, z_dim), unnormalized, in the dtype of the file.
        confidence_net: state_dict of one of :data:`scf_fast.networks.confidence.CONFIDENCE_NETS`.
        facts: what else the file says: epoch, global_step, radius, normalization, normalizer.
        other: state_dicts that are none of these.
    """

    source: str = ""
    backbone: dict[str, torch.Tensor] | None = None
    class_centers: torch.Tensor | None = None
    confidence_net: dict[str, torch.Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    other: list[dict[str, torch.Tensor]] = field(default_factory=list)

    PARTS = ("backbone", "class_centers", "confidence_net")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there."""
        return tuple(part for part in self.PARTS if getattr(self, part) is not None)

    def only(self, part: str) -> "Weights":
        """One part alone, with the facts.

        Raises:
            ValueError: it is not there; the message says what is there instead.
        """
        if part in self.parts:
            return Weights(self.source, facts=self.facts, **{part: getattr(self, part)})
        wanted = {
            "backbone": "a backbone's state_dict of tensors",
            "class_centers": "class centers, one (classes, width) tensor",
            "confidence_net": "a confidence net's state_dict of tensors",
        }[part]
        if self.parts:
            raise InputError(f"{self.source}: must hold {wanted}, but holds {' and '.join(self.describe())}")
        if part == "backbone" and self.other:
            self._identify(max(self.other, key=len))
        found = f"keys like {list(self.other[0])[:3]}" if self.other else "none"
        raise InputError(f"{self.source}: must hold {wanted}, got {found}")

    def _identify(self, state: dict[str, torch.Tensor]) -> tuple[str, int]:
        try:
            return identify_backbone(state)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None

    def network(self) -> tuple[str, int]:
        """Name and embedding width of the backbone.

        Raises:
            ValueError: there is none, or its architecture is unknown.
        """
        return self._identify(self.only("backbone").backbone)

    @property
    def architecture(self) -> Architecture:
        return BACKBONES[self.network()[0]]

    def usable_class_centers(self) -> torch.Tensor:
        """(C, z_dim) float32 class centers, unnormalized.

        Raises:
            ValueError: there are none, or values that are not finite or rows that are zero.
        """
        value = self.only("class_centers").class_centers.float()
        if not torch.isfinite(value).all() or not value.any(dim=1).all():
            raise InputError(
                f"{self.source}: class centers must be finite and no row zero; the file is damaged or its training "
                "diverged"
            )
        return value

    def describe(self) -> list[str]:
        """One phrase a part, for people."""
        lines = []
        if self.backbone is not None:
            name, z_dim = self.network()
            a = self.architecture
            size = sum(
                value.numel()
                for key, value in self.backbone.items()
                if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
            )
            lines.append(
                f"backbone {name} ({a.family}), embedding {z_dim}, last map {a.widths[-1]} x {a.map_size} x "
                f"{a.map_size}, "
                f"{size / 1e6:.1f} M parameters, {_dtype(self.backbone.values())}"
            )
        if self.class_centers is not None:
            lines.append(
                f"class centers of {len(self.class_centers)} identities, width {self.class_centers.shape[1]}, "
                f"{_dtype([self.class_centers])}"
            )
        if self.confidence_net is not None:
            net = self.confidence_net
            lines.append(
                f"confidence net {identify_confidence_net(net)} on {net['_log_kappa.0.weight'].shape[1]} values, "
                f"{sum(value.numel() for value in net.values()) / 1e6:.1f} M values, {_dtype(net.values())}"
            )
        return lines


def _dtype(tensors) -> str:
    return "/".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    )


def read(spec: str | Path, flag: str = "file") -> Weights:
    """Everything known in a weight file.

    A state_dict may be bare or nested, with the ``module.`` prefix of DataParallel or not. Class centers are the
    published ``['arc_face_state_dict']['weight']``, insightface's ``['state_dict_softmax_fc']['weight']``, TFace's
    ``[data set]['kernel']``, in which a column is a class, or a bare tensor.

    Args:
        spec: a file; or several that belong together, as a comma-separated list, a pattern or a folder. Class centers
            of several files are one rank's each, as insightface saves them in ``checkpoint_gpu_R.pt`` and TFace in
            ``HEAD_Epoch_E_Split_R_checkpoint.pth``, in the order of the ranks.
        flag: what the user named it with, for messages.
    Raises:
        ValueError: a file is missing or no checkpoint, or files do not belong together.
    """
    weights = Weights(f"{flag} {spec}")
    shards: list[torch.Tensor] = []
    for path in _expand(spec, flag):
        found = Weights(f"{flag} {path}")
        value = load_file(path, flag)
        _collect(value, found)
        if not found.parts and not found.other:
            raise InputError(
                f"{flag} {path}: must hold a state_dict of tensors or class centers, got {type(value).__name__} "
                "without tensors"
            )
        shards += [] if found.class_centers is None else [found.class_centers]
        for part in ("backbone", "confidence_net"):
            old, new = getattr(weights, part), getattr(found, part)
            if old is not None and new is not None and not _same_parameters(old, new):
                raise InputError(
                    f"{flag} {spec}: must hold one {part.replace('_', ' ')}, but {path} has another than the files "
                    "before it"
                )
            setattr(weights, part, old if old is not None else new)
        weights.facts = {**found.facts, **weights.facts}
        weights.other += found.other
    if shards:
        rows = [len(shard) for shard in shards]
        if rows != sorted(rows, reverse=True) or rows[0] - rows[-1] > 1:
            raise InputError(
                f"{flag} {spec}: the ranks' class centers must be in the order of the ranks, each as many rows as the "
                "next or one more, got "
                f"{', '.join(map(str, rows))}; a file is missing or out of order"
            )
        widths = {shard.shape[1] for shard in shards}
        if len(widths) > 1:
            raise InputError(
                f"{flag} {spec}: the ranks' class centers must have one width, got "
                f"{', '.join(map(str, sorted(widths)))}; "
                "give the files of one run"
            )
        weights.class_centers = torch.cat(shards) if len(shards) > 1 else shards[0]
    return weights


def _expand(spec: str | Path, flag: str) -> list[str]:
    """The files that ``spec`` names, shards in the order of their ranks."""
    text = str(spec)
    if os.path.isdir(text):
        for patterns in _FOLDERS:
            found = [(glob.glob(os.path.join(glob.escape(text), pattern)), "*" in pattern) for pattern in patterns]
            paths = [
                path for some, are_shards in found for path in (_by_rank(some, text, flag) if are_shards else some)
            ]
            if paths:
                return paths
        raise InputError(
            f"{flag} {text}: is a folder without {', '.join(name for names in _FOLDERS for name in names)}; give a "
            "checkpoint file"
        )
    if not os.path.exists(text) and re.search(r"[*?\[]", text):
        paths = glob.glob(text)
        if not paths:
            raise InputError(f"{flag} {text}: no file has a name like that; check the pattern")
        return _by_rank(paths, text, flag)
    return (
        [text]
        if os.path.exists(text) or "," not in text
        else [part.strip() for part in text.split(",") if part.strip()]
    )


def _by_rank(paths: list[str], spec: str, flag: str) -> list[str]:
    numbered = sorted((int((re.findall(r"\d+", os.path.basename(path)) or [-1])[-1]), path) for path in paths)
    ranks = [rank for rank, _ in numbered]
    if len(paths) > 1 and ranks != list(range(len(paths))):
        raise InputError(
            f"{flag} {spec}: the files must be those of ranks 0 to {len(paths) - 1}, got {', '.join(map(str, ranks))}; "
            "add the missing ones, or list the files with commas"
        )
    return [path for _, path in numbered]


def _collect(value, weights: Weights) -> None:
    """Put what a checkpoint holds, however nested, into ``weights``."""
    if isinstance(value, torch.Tensor):
        value = {"weight": value}
    if not isinstance(value, dict):
        return
    weights.facts.update({key: value[key] for key in _FACTS if isinstance(value.get(key), int | float | str)})
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, entry in value.items():
        if isinstance(entry, torch.Tensor) and isinstance(key, str):
            key = key.removeprefix("module.")
            holder = next(
                (name for name in ("backbone", "confidence_net") if key.startswith(f"{name}.")),
                "class_centers" if key == "class_centers" else "",
            )
            groups.setdefault(holder, {})[key.removeprefix(f"{holder}.")] = entry
        elif isinstance(entry, dict) and not entry.keys() >= _OPTIMIZER:
            _collect(entry, weights)
    for state in groups.values():
        centers = _class_centers_in(state)
        if "_log_kappa.0.weight" in state:
            part, value = "confidence_net", state
        elif "output_layer.3.weight" in state or {"fc.weight", "layer1.0.conv1.weight"} <= state.keys():
            part, value = "backbone", native_state(state)
        elif centers is not None:
            part, value = "class_centers", centers
        else:
            weights.other.append(state)
            continue
        if getattr(weights, part) is not None:
            raise InputError(
                f"{weights.source}: must hold {part.replace('_', ' ')} once, got several; save what is meant in a "
                "file of its own"
            )
        setattr(weights, part, value)


def _class_centers_in(state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """(C, z_dim) class centers where a state_dict is one matrix of them, else None.

    TFace's heads have a column for each class, and CurricularFace a running mean ``t`` beside it. Its PartialFC saves
    the matrix under the name of the data set, as others do theirs under names of their own: then the longer side is
    that of the classes.
    """
    names = {key.rpartition(".")[2]: value for key, value in state.items() if value.ndim == 2}
    if len(names) != 1 or (len(state) > 1 and state.keys() != {"kernel", "t"}):
        return None
    ((name, matrix),) = names.items()
    if name in ("weight", "class_centers"):
        return matrix
    rows, columns = matrix.shape
    if name != "kernel" and rows == columns:
        return None
    return matrix.T.contiguous() if name == "kernel" or rows < columns else matrix


def _same_parameters(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal but for BatchNorm's statistics, which differ between the ranks of one insightface run; rank 0's are the
    ones it evaluates with.
    """
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key])
        for key in a
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )


def model_facts(weights: Weights) -> dict:
    """The facts of a whole model: where the file is silent, the radius is 64 and the pixels are what the backbone's
    family takes.
    """
    return {"radius": _DEFAULT_RADIUS, "normalization": weights.architecture.normalization, **weights.facts}
