"""The number of steps that Adam has made, which corrects its moments, wherever an implementation counts them:

    torch.optim.Adam                             optimizer.state[parameter]["step"], a float32 tensor on the device
    DeepSpeed's FusedAdam and DeepSpeedCPUAdam   optimizer.state[parameter]["step"], an int; FusedAdam counts on in the
                                                 last parameter of a group alone, and leaves 0 in group["step"]
    Apex's FusedAdam                             group["step"], an int

SGD counts nowhere. A checkpoint holds one int, so that any implementation goes on from any other's.
"""

from typing import Any

import torch


def read_step_count(optimizer: torch.optim.Optimizer) -> int | None:
    """Returns the steps that an optimizer counts; None where it counts none, as SGD and Adam before its first step."""
    return _largest([*optimizer.state.values(), *optimizer.param_groups])


def write_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Lets Adam go on from this count; its moments must be in ``optimizer.state`` already."""
    packages = {base.__module__.partition(".")[0] for base in type(optimizer).__mro__}
    if "apex" in packages:
        for group in optimizer.param_groups:
            group["step"] = count
        return
    for parameter, state in optimizer.state.items():
        if "deepspeed" in packages:
            state["step"] = count
        else:
            state["step"] = torch.tensor(float(count), dtype=torch.float32, device=parameter.device)


def saved_step_count(shared: dict[str, Any]) -> int | None:
    """Returns the count that a checkpoint holds, in its entry ``optimizer_steps``.

    Older versions saved it as the optimizer had it: what the parameters' state has in ``counters``, what the groups
    have in ``group_steps``.
    """
    if "optimizer_steps" in shared:
        return shared["optimizer_steps"]
    return _largest([shared["counters"], *({"step": count} for count in shared["group_steps"])])


def _largest(places: list[dict[str, Any]]) -> int | None:
    counts = [place["step"] for place in places if place.get("step") is not None]
    return max(map(int, counts), default=None)
