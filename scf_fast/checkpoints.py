"""Weight files of every family: read with nothing but tensors let in, recognised by their keys, written complete or not at all.

    python -m scf_fast.checkpoints inspect FILE
    python -m scf_fast.checkpoints convert IN OUT --to published|tface|insightface|scf_fast|safetensors

A file is a backbone, class centers, a confidence net, or several of these (:class:`Weights`); what its layout calls them is in
:func:`read` and :data:`LAYOUTS`. The folders that a run resumes from belong to :mod:`scf_fast.run_state`.
"""
import argparse
import glob
import json
import os
import re
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_safetensors

from scf_fast.backbones import BACKBONES, Architecture, family_state, identify_backbone, native_state
from scf_fast.confidence import identify_confidence_net

BACKBONE_FILE, CENTERS_FILE, CONFIDENCE_FILE, MODEL_FILE = "backbone.pth", "fc.pth", "confidence.pth", "scf_model.pt"  # what the stages write
# What a folder may stand for: insightface's shards of all ranks, the model of stage 2, the two files of stage 1. In its releases until 2022
# insightface put a rank's class centers into a file of their own, beside the backbone.
_FOLDERS = (("checkpoint_gpu_*.pt",), (MODEL_FILE,), (BACKBONE_FILE, CENTERS_FILE, "rank[:_]*_softmax_weight.pt"))
_PROGRESS = ("epoch", "global_step")  # as every family counts them: from 0 in the published code and here
_FACTS = (*_PROGRESS, "radius", "normalization", "normalizer")
_OPTIMIZER = {"state", "param_groups"}  # keys of an optimiser's state_dict, whose moments have the shapes of weights
_DEFAULT_RADIUS = 64.0  # of the published command line and of TFace: their files do not say


def save_file(value, path: Path) -> None:
    """``torch.save``, complete or not at all."""
    write_whole(path, lambda file: torch.save(value, file))


def write_whole(path: Path, write: Callable) -> None:
    """Let ``write(file)`` fill a file that takes its name when its bytes are on the disk; on an exception nothing is left of it.

    Raises:
        OSError: it could not be written, for want of room for instance; names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save ends its archive even then, and fails of that
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the name may be lost with the power, and an older file come back
    finally:
        os.close(folder)


def load_file(path: str | Path, flag: str):
    """Tensors and plain containers from a checkpoint of PyTorch or safetensors, whatever its name; code in it is refused.

    Args:
        flag: what the user named the file with, for the message.
    Raises:
        ValueError: missing, unreadable, no checkpoint, or holding more than tensors.
    """
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {**json.loads((file.metadata() or {}).get("scf_fast", "{}")), **{key: file.get_tensor(key) for key in file.keys()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocol, beside the error that says it all
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error.strerror or error}); give the path of a checkpoint file") from None
    except Exception as error:  # on bytes that are no checkpoint the unpickler fails in any way there is
        foreign = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if foreign:
            reason = f"loading it would run {foreign[1]}, and code from a checkpoint is never run; save the state_dict alone"
        else:
            reason = str(error).splitlines()[0] if str(error) and not isinstance(error, KeyError) else type(error).__name__
        raise ValueError(f"{flag} {path}: is no checkpoint of tensors ({reason})") from None


def _is_safetensors(path: str | Path) -> bool:
    """Whether the file starts as that format does: the length of a JSON header, which fits in the file, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= os.path.getsize(path) - 8 and start[8:] == b"{"


@dataclass
class Weights:
    """What one weight file holds, or several that belong together; a part that is not there is None.

    Attributes:
        source: what the user named it with, for messages.
        backbone: state_dict under the names of :class:`scf_fast.backbones.Backbone`.
        class_centers: (C, z_dim), unnormalised, in the dtype of the file.
        confidence_net: state_dict of one of :data:`scf_fast.confidence.CONFIDENCE_NETS`.
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
        wanted = {"backbone": "a backbone's state_dict of tensors", "class_centers": "class centers, one (classes, width) tensor",
                  "confidence_net": "a confidence net's state_dict of tensors"}[part]
        if self.parts:
            raise ValueError(f"{self.source}: must hold {wanted}, but holds {' and '.join(self.describe())}")
        if part == "backbone" and self.other:
            self._identify(max(self.other, key=len))
        found = f"keys like {list(self.other[0])[:3]}" if self.other else "none"
        raise ValueError(f"{self.source}: must hold {wanted}, got {found}")

    def _identify(self, state: dict[str, torch.Tensor]) -> tuple[str, int]:
        try:
            return identify_backbone(state)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None

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
        """(C, z_dim) float32 class centers, unnormalised.

        Raises:
            ValueError: there are none, or values that are not finite or rows that are zero.
        """
        value = self.only("class_centers").class_centers.float()
        if not torch.isfinite(value).all() or not value.any(dim=1).all():
            raise ValueError(f"{self.source}: class centers must be finite and no row zero; the file is damaged or its training diverged")
        return value

    def describe(self) -> list[str]:
        """One phrase a part, for people."""
        lines = []
        if self.backbone is not None:
            name, z_dim = self.network()
            a = self.architecture
            size = sum(value.numel() for key, value in self.backbone.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked")))
            lines.append(f"backbone {name} ({a.family}), embedding {z_dim}, last map {a.widths[-1]} x {a.map_size} x {a.map_size}, "
                         f"{size / 1e6:.1f} M parameters, {_dtype(self.backbone.values())}")
        if self.class_centers is not None:
            lines.append(f"class centers of {len(self.class_centers)} identities, width {self.class_centers.shape[1]}, {_dtype([self.class_centers])}")
        if self.confidence_net is not None:
            net = self.confidence_net
            lines.append(f"confidence net {identify_confidence_net(net)} on {net['_log_kappa.0.weight'].shape[1]} values, "
                         f"{sum(value.numel() for value in net.values()) / 1e6:.1f} M values, {_dtype(net.values())}")
        return lines


def _dtype(tensors) -> str:
    return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}))


def read(spec: str | Path, flag: str = "file") -> Weights:
    """Everything known in a weight file.

    A state_dict may be bare or nested, with the ``module.`` prefix of DataParallel or not. Class centers are the published
    ``['arc_face_state_dict']['weight']``, insightface's ``['state_dict_softmax_fc']['weight']``, TFace's ``[data set]['kernel']``, in which a
    column is a class, or a bare tensor.

    Args:
        spec: a file; or several that belong together, as a comma-separated list, a pattern or a folder. Class centers of several
            files are one rank's each, as insightface saves them in ``checkpoint_gpu_R.pt`` and TFace in
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
            raise ValueError(f"{flag} {path}: must hold a state_dict of tensors or class centers, got {type(value).__name__} without tensors")
        shards += [] if found.class_centers is None else [found.class_centers]
        for part in ("backbone", "confidence_net"):
            old, new = getattr(weights, part), getattr(found, part)
            if old is not None and new is not None and not _same_parameters(old, new):
                raise ValueError(f"{flag} {spec}: must hold one {part.replace('_', ' ')}, but {path} has another than the files before it")
            setattr(weights, part, old if old is not None else new)
        weights.facts = {**found.facts, **weights.facts}
        weights.other += found.other
    if shards:
        rows = [len(shard) for shard in shards]
        if rows != sorted(rows, reverse=True) or rows[0] - rows[-1] > 1:
            raise ValueError(f"{flag} {spec}: the ranks' class centers must be in the order of the ranks, each as many rows as the next or one more, got "
                             f"{', '.join(map(str, rows))}; a file is missing or out of order")
        widths = {shard.shape[1] for shard in shards}
        if len(widths) > 1:
            raise ValueError(f"{flag} {spec}: the ranks' class centers must have one width, got {', '.join(map(str, sorted(widths)))}; "
                             "give the files of one run")
        weights.class_centers = torch.cat(shards) if len(shards) > 1 else shards[0]
    return weights


def _expand(spec: str | Path, flag: str) -> list[str]:
    """The files that ``spec`` names, shards in the order of their ranks."""
    text = str(spec)
    if os.path.isdir(text):
        for patterns in _FOLDERS:
            found = [(glob.glob(os.path.join(glob.escape(text), pattern)), "*" in pattern) for pattern in patterns]
            paths = [path for some, are_shards in found for path in (_by_rank(some, text, flag) if are_shards else some)]
            if paths:
                return paths
        raise ValueError(f"{flag} {text}: is a folder without {', '.join(name for names in _FOLDERS for name in names)}; give a checkpoint file")
    if not os.path.exists(text) and re.search(r"[*?\[]", text):
        paths = glob.glob(text)
        if not paths:
            raise ValueError(f"{flag} {text}: no file has a name like that; check the pattern")
        return _by_rank(paths, text, flag)
    return [text] if os.path.exists(text) or "," not in text else [part.strip() for part in text.split(",") if part.strip()]


def _by_rank(paths: list[str], spec: str, flag: str) -> list[str]:
    numbered = sorted((int((re.findall(r"\d+", os.path.basename(path)) or [-1])[-1]), path) for path in paths)
    ranks = [rank for rank, _ in numbered]
    if len(paths) > 1 and ranks != list(range(len(paths))):
        raise ValueError(f"{flag} {spec}: the files must be those of ranks 0 to {len(paths) - 1}, got {', '.join(map(str, ranks))}; "
                         "add the missing ones, or list the files with commas")
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
            holder = next((name for name in ("backbone", "confidence_net") if key.startswith(f"{name}.")), "class_centers" if key == "class_centers" else "")
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
            raise ValueError(f"{weights.source}: must hold {part.replace('_', ' ')} once, got several; save what is meant in a file of its own")
        setattr(weights, part, value)


def _class_centers_in(state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """(C, z_dim) class centers where a state_dict is one matrix of them, else None.

    TFace's heads have a column for each class, and CurricularFace a running mean ``t`` beside it. Its PartialFC saves the matrix under the
    name of the data set, as others do theirs under names of their own: then the longer side is that of the classes.
    """
    names = {key.rpartition(".")[2]: value for key, value in state.items() if value.ndim == 2}
    if len(names) != 1 or (len(state) > 1 and state.keys() != {"kernel", "t"}):
        return None
    (name, matrix), = names.items()
    if name in ("weight", "class_centers"):
        return matrix
    rows, columns = matrix.shape
    if name != "kernel" and rows == columns:
        return None
    return matrix.T.contiguous() if name == "kernel" or rows < columns else matrix


def _same_parameters(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal but for BatchNorm's statistics, which differ between the ranks of one insightface run; rank 0's are the ones it evaluates with."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if not key.endswith(("running_mean", "running_var", "num_batches_tracked")))


def backbone_state(spec: str | Path, flag: str = "--saved_bkb") -> dict[str, torch.Tensor]:
    """The backbone in a weight file of any family, under the names of :class:`scf_fast.backbones.Backbone`; see :func:`read`."""
    return read(spec, flag).only("backbone").backbone


def class_centers(spec: str | Path, flag: str = "--saved_fc") -> torch.Tensor:
    """(C, z_dim) float32 class centers in weight files of any family, unnormalised; see :func:`read`."""
    return read(spec, flag).usable_class_centers()


def _only_part(weights: Weights, layout: str) -> str:
    if len(weights.parts) != 1:
        raise ValueError(f"{weights.source}: one {layout} file holds one part, here are {', '.join(weights.parts) or 'none'}; choose with --part")
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
        differ = {"published": "no BatchNorm between the convolutions of a unit", "tface": "a BatchNorm between the convolutions of a unit, and no "
                  "projection where the width stays", "insightface": "a BatchNorm between the convolutions of a unit, and a projection at every stride"}
        raise ValueError(f"{weights.source}: {name} cannot be written for {family}, whose backbones have {differ[family]}: it is another network; "
                         f"use --to {weights.architecture.family}")


def _net_must_be(weights: Weights, layout: str, net: str) -> None:
    if weights.confidence_net is not None and identify_confidence_net(weights.confidence_net) != net:
        raise ValueError(f"{weights.source}: the confidence net {identify_confidence_net(weights.confidence_net)} cannot be written for {layout}, "
                         f"which has {net} alone; use --to scf_fast or safetensors")


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
        raise ValueError(f"{weights.source}: insightface has no confidence net; choose another part with --part, or use --to scf_fast")
    _of_family(weights, "insightface")
    if weights.parts == ("backbone",):
        return _own_names(weights)
    backbone = {} if weights.backbone is None else {"state_dict_backbone": _own_names(weights)}
    return {**_progress(weights), **backbone, "state_dict_softmax_fc": {"weight": weights.class_centers}}


def _scf_fast(weights: Weights):
    """What the stages write: a backbone under its family's names, class centers and confidence nets as the published code has them, and
    backbone and confidence net together as a model that says how to use it."""
    if weights.parts == ("backbone", "confidence_net"):
        return {"format": "scf_fast model", "backbone_state_dict": weights.backbone, "uncer_net_state_dict": weights.confidence_net,
                **model_facts(weights)}
    part = _only_part(weights, "scf_fast")
    if part == "backbone":
        return _own_names(weights)
    entry = {"class_centers": ("arc_face_state_dict", {"weight": weights.class_centers}), "confidence_net": ("uncer_net_state_dict", weights.confidence_net)}
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
    "published": _published, "tface": _tface, "insightface": _insightface, "scf_fast": _scf_fast, "safetensors": _safetensors}


def model_facts(weights: Weights) -> dict:
    """The facts of a whole model: where the file is silent, the radius is 64 and the pixels are what the backbone's family takes."""
    return {"radius": _DEFAULT_RADIUS, "normalization": weights.architecture.normalization, **weights.facts}


def write(weights: Weights, path: str | Path, layout: str = "scf_fast") -> None:
    """Write a weight file, complete or not at all; every tensor keeps its dtype and bits.

    Args:
        layout: a key of :data:`LAYOUTS`.
    Raises:
        ValueError: the layout has no place for these weights; the message says why.
    """
    if not weights.parts:
        raise ValueError(f"{weights.source}: must hold weights of a known kind to be written; inspect says what it has")
    value = LAYOUTS[layout](weights)
    if layout != "safetensors":
        return save_file(value, Path(path))
    part = Path(path).with_name(Path(path).name + ".part")
    save_safetensors({key: tensor.contiguous() for key, tensor in value.items()}, part, {"format": "pt", "scf_fast": json.dumps(weights.facts)})
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scf_fast.checkpoints", description="What is in a weight file, and the same weights for other code.")
    commands = parser.add_subparsers(dest="command", required=True)
    files = "a file; several that belong together as a comma-separated list, a pattern or a folder"
    inspect = commands.add_parser("inspect", help="say what a file holds")
    inspect.add_argument("source", metavar="FILE", help=files)
    convert = commands.add_parser("convert", help="write the weights as other code names them, bit for bit; optimiser states are left out")
    convert.add_argument("source", metavar="IN", help=files)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=tuple(LAYOUTS), help="whose layout")
    convert.add_argument("--part", choices=Weights.PARTS, help="write this part alone")
    convert.add_argument("--radius", type=float, help=f"radius of a model whose file does not say it [{_DEFAULT_RADIUS:g}]")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    options = parser.parse_args(arguments)
    try:
        weights = read(options.source)
        if options.command == "inspect":
            facts = [f"{key} {value}" for key, value in weights.facts.items()]
            other = [f"{len(state)} tensors of no known kind, such as {next(iter(state))}" for state in weights.other]
            print("\n".join([*weights.describe(), *facts, *other]))
            return 0
        if options.target.exists() and not options.overwrite:
            raise ValueError(f"{options.target}: exists; give another name, or --overwrite")
        if options.part:
            weights = weights.only(options.part)
        if options.radius is not None:
            weights = replace(weights, facts={"radius": options.radius, **weights.facts})
        write(weights, options.target, options.to)
        print(f"{options.target}: {' and '.join(weights.describe())}, as {options.to}")
        return 0
    except (ValueError, OSError, SafetensorError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
