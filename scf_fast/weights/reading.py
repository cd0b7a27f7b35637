"""Reads weight files of every family: the published SCF code, TFace, insightface and this project.

Parts are recognized by the names and shapes of their tensors, wherever in the file they are nested.
"""

import glob
import os
import re
from pathlib import Path
from typing import Any

import torch

from scf_fast.command import split_paths
from scf_fast.errors import InputError
from scf_fast.pipelines.text import shown, shown_names
from scf_fast.weights.contents import STATISTICS, Facts, Part, Weights
from scf_fast.weights.family_names import StateDict
from scf_fast.weights.files import BACKBONE_FILE, CENTERS_FILE, MODEL_FILE, load_tensor_file
from scf_fast.weights.integrity import not_finite
from scf_fast.weights.recognition import parts_in, under_prefix

# What a folder may stand for: insightface's shards of all ranks, the model of stage 2, the two files of stage 1. In its
# releases until 2022 insightface put a rank's class centers into a file of their own, beside the backbone.
_FOLDERS = (("checkpoint_gpu_*.pt",), (MODEL_FILE,), (BACKBONE_FILE, CENTERS_FILE, "rank[:_]*_softmax_weight.pt"))
_CHOICE, _IN = "#", "/"  # FILE#entry/entry names a dict in a file that holds several
_DEEPEST = 32
_OPTIMIZER = {"state", "param_groups"}  # keys of an optimizer's state_dict, whose moments have the shapes of weights


def read_weights(spec: str | Path, flag: str = "file") -> Weights:
    """Returns all weights of a known kind in a file.

    A state_dict may be bare or nested, its names with any prefix (:mod:`scf_fast.weights.recognition`). Class centers
    are the published ``['arc_face_state_dict']['weight']``, insightface's ``['state_dict_softmax_fc']['weight']``,
    TFace's ``[data set]['kernel']``, in which a column is a class, or a bare tensor.

    Args:
        spec: a file; or several that belong together, as a comma-separated list, a pattern or a folder. Class centers
            of several files are one rank's each, as insightface saves them in ``checkpoint_gpu_R.pt`` and TFace in
            ``HEAD_Epoch_E_Split_R_checkpoint.pth``, in the order of the ranks. Of a file that holds several networks of
            a kind, ``FILE#entry`` is one of them, such as ``FILE#state_dict_ema``.
        flag: what the user named it with, for messages.
    Raises:
        InputError: a file is missing or no checkpoint, or files do not belong together.
    """
    source = f"{flag} {spec}"
    weights = Weights(source)
    shards: list[torch.Tensor] = []
    for path in _expand(spec, flag):
        found = _read_file(path, flag)
        _check_finite(found, f"{flag} {path}")
        if found.class_centers is not None:
            shards.append(found.class_centers)
        weights.backbone = _the_same(weights.backbone, found.backbone, f"{source}: must hold one backbone", path)
        weights.confidence_net = _the_same(
            weights.confidence_net, found.confidence_net, f"{source}: must hold one confidence net", path
        )
        weights.facts = weights.facts.completed_by(found.facts)
        weights.other += found.other
    if shards:
        weights.class_centers = _join_shards(shards, source)
    return weights


def read_noted_facts(weights: Weights, spec: str | Path) -> Facts:
    """Returns the facts of the weights in ``spec``, with the pixel convention that stage 1 notes in the class centers
    beside its backbone, if the weights do not state one themselves.

    Raises:
        InputError: there is a file of that name, and it cannot be read.
    """
    first = Path(_chosen(split_paths(spec)[0])[0])
    beside = first.with_name(CENTERS_FILE)
    if weights.facts.normalization is not None or not first.is_file() or not beside.is_file():
        return weights.facts
    noted = read_weights(beside, "class centers").facts
    return weights.facts.completed_by(Facts(normalization=noted.normalization))


def _read_file(path: str, flag: str) -> Weights:
    found = Weights(f"{flag} {path}")
    file, choice = _chosen(path)
    value = load_tensor_file(file, flag)
    for name in choice:
        value = _entry(value, name, f"{flag} {path}")
    _collect(value, found, {})
    _orient(found)
    if not found.parts and not found.other:
        raise InputError(
            f"{flag} {path}: must hold a state_dict of tensors or class centers, got {type(value).__name__} "
            "without tensors"
        )
    return found


def _chosen(path: str) -> tuple[str, list[str]]:
    """Returns the file that a path names, and the entries in it that lead to what is meant, as ``FILE#entry/entry``."""
    file, mark, entries = path.rpartition(_CHOICE)
    if not mark or os.path.exists(path):
        return path, []
    return file, entries.split(_IN)


def _entry(value: Any, name: str, source: str) -> Any:
    """Returns an entry of a checkpoint: of the dict itself, or the tensors whose names start so.

    Raises:
        InputError: there is no such entry.
    """
    entries = value if isinstance(value, dict) else {}
    if name in entries:
        return entries[name]
    tensors = {key: entry for key, entry in entries.items() if isinstance(key, str) and isinstance(entry, torch.Tensor)}
    below = under_prefix(tensors, name)
    if not below:
        known = shown_names([key for key, entry in entries.items() if isinstance(entry, dict)], 8) or "none"
        raise InputError(f"{source}: there is no entry {shown(name)} in the file, which has {known}")
    return below


def _check_finite(found: Weights, source: str) -> None:
    """
    Raises:
        InputError: a value is not finite.
    """
    centers = {} if found.class_centers is None else {"the class centers": found.class_centers}
    for tensors in (found.backbone or {}, found.confidence_net or {}, centers):
        problem = not_finite(tensors)
        if problem:
            raise InputError(
                f"{source}: weights must be finite, and {problem}; the file is damaged or its training diverged: give "
                "another checkpoint"
            )


def _the_same(old: StateDict | None, new: StateDict | None, must: str, path: str) -> StateDict | None:
    """Returns the network of the files before ``path``, or else the one that it holds.

    Raises:
        InputError: both do, and they differ; the message starts with ``must``.
    """
    if old is None or new is None:
        return new if old is None else old
    if not _same_parameters(old, new):
        raise InputError(f"{must}, but {path} has another than the files before it")
    return old


def _same_parameters(a: StateDict, b: StateDict) -> bool:
    """Compares all but BatchNorm's statistics, which differ between the ranks of one insightface run; rank 0's are the
    ones it evaluates with.
    """
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if not key.endswith(STATISTICS))


def _join_shards(shards: list[torch.Tensor], source: str) -> torch.Tensor:
    """Returns the class centers of all ranks in one tensor.

    Raises:
        InputError: their shapes are not those of one run's ranks, in order.
    """
    rows = [len(shard) for shard in shards]
    if rows != sorted(rows, reverse=True) or rows[0] - rows[-1] > 1:
        raise InputError(
            f"{source}: the ranks' class centers must be in the order of the ranks, each as many rows as the "
            f"next or one more, got {', '.join(map(str, rows))}; a file is missing or out of order"
        )
    widths = {shard.shape[1] for shard in shards}
    if len(widths) > 1:
        raise InputError(
            f"{source}: the ranks' class centers must have one width, got {', '.join(map(str, sorted(widths)))}; "
            "give the files of one run"
        )
    return torch.cat(shards) if len(shards) > 1 else shards[0]


def files_of(spec: str | Path, flag: str) -> list[str]:
    """Returns the files that :func:`read_weights` reads; raises what it does where none is there."""
    return [_chosen(path)[0] for path in _expand(spec, flag)]


def _expand(spec: str | Path, flag: str) -> list[str]:
    """Returns the files that ``spec`` names, shards in the order of their ranks."""
    text = str(spec)
    if os.path.isdir(text):
        return _files_of_folder(text, flag)
    if not os.path.exists(text) and re.search(r"[*?\[]", text):
        paths = glob.glob(text)
        if not paths:
            raise InputError(f"{flag} {text}: no file has a name like that; check the pattern")
        return _by_rank(paths, text, flag)
    return list(split_paths(text))


def _files_of_folder(folder: str, flag: str) -> list[str]:
    for patterns in _FOLDERS:
        paths: list[str] = []
        for pattern in patterns:
            found = glob.glob(os.path.join(glob.escape(folder), pattern))
            paths += _by_rank(found, folder, flag) if "*" in pattern else found
        if paths:
            return paths
    raise InputError(
        f"{flag} {folder}: is a folder without {', '.join(name for names in _FOLDERS for name in names)}; give a "
        "checkpoint file"
    )


def _by_rank(paths: list[str], spec: str, flag: str) -> list[str]:
    """Returns the files of several ranks in their order, by the last number in the name of each."""
    numbered = sorted((int((re.findall(r"\d+", os.path.basename(path)) or [-1])[-1]), path) for path in paths)
    ranks = [rank for rank, _ in numbered]
    if len(paths) > 1 and ranks != list(range(len(paths))):
        raise InputError(
            f"{flag} {spec}: the files must be those of ranks 0 to {len(paths) - 1}, got {', '.join(map(str, ranks))}; "
            "add the missing ones, or list the files with commas"
        )
    return [path for _, path in numbered]


def _collect(value: Any, weights: Weights, places: dict[Part, str], place: tuple[str, ...] = ()) -> None:
    """Puts what a checkpoint holds, nested as checkpoints are, into ``weights``.

    Args:
        places: where each part was found, as ``entry/entry``; filled here.
        place: names that lead to the value.
    Raises:
        InputError: it is nested deeper than any checkpoint.
    """
    if len(place) > _DEEPEST:
        raise InputError(f"{weights.source}: is nested more than {_DEEPEST} levels deep; save the state_dict alone")
    if isinstance(value, torch.Tensor):
        value = {"weight": value}
    if isinstance(value, (list, tuple)) and not place:  # as torch.save([network, epoch]) leaves it
        value = {str(number): entry for number, entry in enumerate(value) if isinstance(entry, dict)}
    if not isinstance(value, dict):
        return
    weights.facts = Facts.found_in(value).completed_by(weights.facts)
    tensors: StateDict = {}
    for key, entry in value.items():
        if isinstance(entry, torch.Tensor) and isinstance(key, str):
            tensors[key] = entry
        elif isinstance(entry, dict) and not entry.keys() >= _OPTIMIZER and not str(key).startswith("optim"):
            _collect(entry, weights, places, (*place, str(key)))
    for part, found, prefix in parts_in(tensors):
        _add(part, found, weights, places, _IN.join([*place, *([prefix] if prefix else [])]))


def _add(
    part: Part | None, value: StateDict | torch.Tensor, weights: Weights, places: dict[Part, str], place: str
) -> None:
    """Puts a part where it belongs in ``weights``.

    Raises:
        InputError: that place is taken, by other values.
    """
    if part is None:
        assert isinstance(value, dict)
        weights.other.append(value)
        return
    if part not in weights.parts:
        setattr(weights, part.value, value)
        places[part] = place
        return
    if not _equal(getattr(weights, part.value), value):
        first, second = places[part], place
        choice = f"choose one of them with FILE{_CHOICE}{first or second}" if first != second else ""
        raise InputError(
            f"{weights.source}: must hold {part.value.replace('_', ' ')} once, got several"
            + (f", in {first or 'the file itself'!r} and in {second or 'the file itself'!r}" if choice else "")
            + f"; {choice or 'save the one that is meant in a file of its own'}"
        )


def _equal(a: StateDict | torch.Tensor, b: StateDict | torch.Tensor) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _orient(weights: Weights) -> None:
    """Turns class centers beside a backbone whose width is that of their columns: MagFace has a class in each."""
    if weights.backbone is None or weights.class_centers is None:
        return
    width = weights.backbone.get("output_layer.3.weight")
    shape = weights.class_centers.shape
    if width is not None and shape[1] != len(width) == shape[0]:
        weights.class_centers = weights.class_centers.T.contiguous()
