"""The networks in a dict of tensors, whatever wrappers, trainers and enclosing modules have put before their names.

A network is found by a name that all of its kind have; what stands before that name is its prefix, and every tensor
under the prefix belongs to it. So ``module.``, ``model.``, ``encoder.``, ``features.module.`` and any other prefix is
taken off, also several in one file (``net.backbone.`` and ``net.head.``).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from scf_fast.networks.confidence import is_confidence_net
from scf_fast.weights.contents import Part
from scf_fast.weights.family_names import StateDict, native_state

# Parts of names that wrappers of modules add, wherever they stand: DataParallel, torch.compile, FSDP, activation
# checkpoints. No family has modules of these names.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# A name of each network: of the published and TFace's backbones, insightface's, confidence nets; and what must be there
# too, where the name alone says little.
_ANCHORS: dict[str, tuple[str, ...]] = {
    "output_layer.3.weight": (),
    "layer1.0.conv1.weight": (),
    "_log_kappa.0.weight": (),
    "shift": ("scale", "fc1.weight", "fc2.weight"),  # of PFE
}
# The modules of all families, beside which a class of its own may have the head.
_BACKBONE_MODULES = frozenset(
    ("input_layer", "body", "output_layer", "conv1", "bn1", "prelu", "bn2", "fc", "features")
    + tuple(f"layer{stage}" for stage in range(1, 5))
)
_COUNTERS = (
    "total_ops",
    "total_params",
    "n_averaged",
)  # buffers of a FLOP counter (thop), and of torch's AveragedModel
_SMALL = 1  # elements of what may stand beside class centers: CurricularFace's running mean, AdaFace's statistics


class Found(NamedTuple):
    """A part in a dict of tensors."""

    part: Part | None  # None: of no known kind
    value: StateDict | torch.Tensor  # class centers are a tensor
    prefix: str  # of its names, without a dot at the end


def parts_in(tensors: Mapping[str, torch.Tensor]) -> Iterator[Found]:
    """Yields everything in a dict of tensors.

    BatchNorm's counters are completed with zeros, as ``load_state_dict`` does for files from before PyTorch 0.4.1.
    """
    for prefix, network in _divided(_unwrapped(tensors)):
        place = prefix.removesuffix(".")
        head = {name: tensor for name, tensor in network.items() if name.partition(".")[0] not in _BACKBONE_MODULES}
        if len(head) < len(network) and (beside := _class_centers_in(head)) is not None:
            yield Found(Part.CLASS_CENTERS, beside, place)
            network = {name: tensor for name, tensor in network.items() if name not in head}
        centers = _class_centers_in(network)
        if is_confidence_net(network):
            yield Found(Part.CONFIDENCE_NET, _completed(network), place)
        elif "output_layer.3.weight" in network or {"fc.weight", "layer1.0.conv1.weight"} <= network.keys():
            yield Found(Part.BACKBONE, native_state(_completed(network)), place)
        elif centers is not None:
            yield Found(Part.CLASS_CENTERS, centers, place)
        else:
            yield Found(None, network, place)


def under_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> StateDict:
    """Returns the tensors whose names, without what wrappers have added, start with a prefix that ends before a dot."""
    return {name: tensor for name, tensor in _unwrapped(tensors).items() if name.startswith(f"{prefix}.")}


def _unwrapped(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Returns the tensors without the parts of their names that wrappers have added."""
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _COUNTERS}
    state: StateDict = {}
    for name, tensor in kept.items():
        module, dot, leaf = name.rpartition(".")
        state[".".join([*(part for part in module.split(".") if dot and part not in _WRAPPERS), leaf])] = tensor
    return state if len(state) == len(kept) else kept  # two names that differ in the wrapper alone


def _divided(state: StateDict) -> list[tuple[str, StateDict]]:
    """Returns (prefix, names without it) of the networks of a state_dict, and last of what belongs to none of them."""
    prefixes = {
        name.removesuffix(anchor)
        for name in state
        for anchor, others in _ANCHORS.items()
        if (name == anchor or name.endswith(f".{anchor}"))
        and all(name.removesuffix(anchor) + other in state for other in others)
    }
    longest_first = sorted(prefixes, key=len, reverse=True)
    found: dict[str, StateDict] = {prefix: {} for prefix in longest_first}
    rest: StateDict = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
        if prefix is None:
            rest[name] = tensor
        else:
            found[prefix][name.removeprefix(prefix)] = tensor
    return [*found.items(), *([("", rest)] if rest else [])]


def _completed(state: StateDict) -> StateDict:
    """Returns a network's state_dict with the counters of its BatchNorms."""
    complete: StateDict = {}
    for name, tensor in state.items():
        complete[name] = tensor
        module, _, leaf = name.rpartition(".")
        counter = f"{module}.num_batches_tracked"
        if leaf == "running_var" and counter not in state:
            complete[counter] = torch.tensor(0)
    return complete


def _class_centers_in(state: StateDict) -> torch.Tensor | None:
    """Returns (C, z_dim) class centers if a state_dict is one matrix of them, else None.

    TFace's and AdaFace's heads have a column for each class, and beside it single numbers such as CurricularFace's
    running mean. TFace's PartialFC saves the matrix under the name of the data set, as others do theirs under names of
    their own: then the longer side is that of the classes.
    """
    matrices = {key.rpartition(".")[2]: value for key, value in state.items() if value.ndim == 2}
    others = [value for value in state.values() if value.ndim != 2]
    if len(matrices) != 1 or len(others) != len(state) - 1 or any(value.numel() > _SMALL for value in others):
        return None
    ((name, matrix),) = matrices.items()
    if name in ("weight", "class_centers"):
        return matrix
    rows, columns = matrix.shape
    if name != "kernel" and rows == columns:
        return None
    return matrix.T.contiguous() if name == "kernel" or rows < columns else matrix
