"""The trained state that a rank holds under any ZeRO stage, piece by piece: weights and optimizer state.

A piece is a run of elements of one flattened parameter, so what one layout of ranks has saved any other can load: every
rank fills the pieces it holds from whichever saved pieces overlap them. ZeRO 0 keeps everything on every rank; there
each rank saves an equal share.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.engine.engine import Engine
from scf_fast.engine.step_count import read_step_count, saved_step_count, write_step_count
from scf_fast.errors import InputError

WEIGHT = "weight"


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened parameter."""

    name: str
    start: int
    values: dict[str, torch.Tensor]  # 1-D, equally long: the float32 weight and the optimizer's tensors


def owned_pieces(engine: Engine) -> list[Piece]:
    """Returns the pieces that this rank saves; together the ranks' pieces cover every trained parameter once.

    The tensors are views wherever memory allows, so that writing to them sets the engine's state.
    """
    return _pieces(engine, dist.get_rank(), dist.get_world_size())


def _pieces(engine: Engine, share: int, shares: int) -> list[Piece]:
    state = engine.optimizer.state
    return [
        Piece(
            name,
            start,
            {WEIGHT: weight, **{key: whole.reshape(-1)[place] for key, whole in _elementwise(state.get(flat, {}))}},
        )
        for name, start, weight, flat, place in engine.internals.places(share, shares)
    ]


def shared_state(engine: Engine) -> dict[str, Any]:
    """Returns the state that belongs to no element and is the same on every rank: counts of steps and the loss
    scale.
    """
    return {
        "optimizer_steps": read_step_count(engine.optimizer),
        "loss_scaler": engine.loss_scaler.state_dict() if engine.loss_scaler else {},
        "skipped_steps": engine.internals.skipped_steps,
    }


def restore(engine: Engine, saved: Iterable[Piece], shared: dict, step: int) -> None:
    """Gives a new engine the optimizer state, the counts of steps and the loss scale of a checkpoint, whichever
    implementation of the optimizer has written it; the weights must be in the module already.

    Args:
        saved: all ranks' pieces, on any device.
    """
    saved, optimizer = list(saved), engine.optimizer
    keys = [key for key in saved[0].values if key != WEIGHT]
    for flat in {id(place.flat): place.flat for place in engine.internals.places(0, 1)}.values():
        optimizer.state[flat] = {key: torch.zeros_like(flat, memory_format=torch.contiguous_format) for key in keys}
    by_name = _by_name(saved)
    for piece in _pieces(engine, 0, 1):
        for key in keys:
            _fill(piece.values[key], piece.start, by_name[piece.name], key)
    count = saved_step_count(shared)
    if keys and count is not None:  # Adam without moments begins anew
        write_step_count(optimizer, count)
    if engine.loss_scaler and shared["loss_scaler"]:  # else the scale starts from the beginning
        engine.loss_scaler.load_state_dict(shared["loss_scaler"])
    engine.internals.global_steps, engine.internals.skipped_steps = step, shared["skipped_steps"]


def load_weights(module: nn.Module, saved: Iterable[Piece], buffers: dict[str, torch.Tensor]) -> None:
    """Copies weights and buffers into a module that no engine has divided yet.

    Raises:
        InputError: the pieces are of another network.
    """
    by_name = _by_name(saved)
    state = module.state_dict()
    different = (by_name.keys() | buffers.keys()) ^ state.keys()
    if different:
        raise InputError(f"the checkpoint is of another network: it differs in {', '.join(sorted(different)[:3])}")
    for name, pieces in by_name.items():
        whole = torch.empty(state[name].numel())
        if sum(len(piece.values[WEIGHT]) for piece in pieces) != len(whole):
            raise InputError(
                f"the checkpoint has {sum(len(piece.values[WEIGHT]) for piece in pieces)} elements of {name}, the "
                f"network {len(whole)}"
            )
        _fill(whole, 0, pieces, WEIGHT)
        state[name].copy_(whole.view(state[name].shape))
    for name, value in buffers.items():
        state[name].copy_(value)


def _by_name(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.name, []).append(piece)
    return grouped


def _fill(target: torch.Tensor, start: int, saved: list[Piece], key: str) -> None:
    for piece in saved:
        low, high = max(start, piece.start), min(start + len(target), piece.start + len(piece.values[key]))
        if low < high:
            target[low - start : high - start] = piece.values[key][low - piece.start : high - piece.start].to(
                target.device
            )


def _elementwise(state: dict):
    return [(key, value) for key, value in state.items() if torch.is_tensor(value) and value.dim()]
