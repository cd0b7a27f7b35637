"""Where a confidence net starts, and the highest learning rate that its first step bears: measured on the first batches.

Both are closed forms. The best constant kappa under the exact SCF loss is A_d^-1(mean cosine). And a step of Adam moves
each weight by at most about the learning rate, so it moves mean log kappa, to first order, by at most

    lr * sum over all weights of |d mean log kappa / d weight|
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.errors import InputError
from scf_fast.kernels import inverse_mean_resultant_length, mean_resultant_length
from scf_fast.objectives import Objective

LEAST_COSINE = 0.01
_BISECTIONS = 200


def best_constant(objective: Objective, mean_cosine: float, dim: int, published: bool = False) -> float:
    """Returns the kappa, or the precision of a Gaussian, that fits all images best if they share one.

    | objective | optimum at the mean cosine c |
    |---|---|
    | ``scf`` | A_d^-1(c); with the published normalizer, (d/2 - 1) / (1 - c) |
    | ``scf_gaussian`` | (d/2) / (1 - c) |
    | ``pfe`` | d / (1 - c): both images have it, so that their difference has half of it |
    | ``pfe_vmf`` | A_d(kappa s) s = 2 A_d(kappa) with s = sqrt(2 + 2 c) |

    Args:
        mean_cosine: with the own class centers, or between images of a person; in [0.01, 1).
    """
    c = min(mean_cosine, 1 - 1e-7)  # of float32 features that are the centers themselves
    if objective is Objective.SCF_GAUSSIAN:
        return dim / 2 / (1 - c)
    if objective is Objective.PFE:
        return dim / (1 - c)
    if objective is Objective.PFE_VMF:
        return _pair_optimum(c, dim)
    if published:
        return max(dim / 2 - 1, 0.5) / (1 - c)
    return inverse_mean_resultant_length(torch.tensor(c, dtype=torch.float64), dim).item()


def _pair_optimum(c: float, dim: int) -> float:
    spread = (2 + 2 * c) ** 0.5
    low, high = torch.tensor([1e-3, 1e10], dtype=torch.float64).log()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        own, pair = mean_resultant_length(torch.stack((middle.exp(), spread * middle.exp())), dim)
        low, high = (middle, high) if spread * pair > 2 * own else (low, middle)
    return low.exp().item()


def mean_over_ranks(values: torch.Tensor) -> float:
    """Returns the mean of all ranks' values, (N,); collective."""
    total = torch.stack((values.double().sum(), values.new_tensor(float(len(values)), dtype=torch.float64)))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def check_cosine(mean_cosine: float, centers: str) -> None:
    """Checks that the class centers belong to the features.

    Args:
        centers: the option that names them, with its value.
    Raises:
        InputError: the mean cosine is below 0.01, or not a number.
    """
    if not mean_cosine >= LEAST_COSINE:
        raise InputError(
            f"{centers}: the images' mean cosine with their own class centers is {mean_cosine:.3f}, so that no kappa fits "
            "them; give the centers of this backbone in the order of this data's identities, or --initial_kappa none"
        )


def rate_limit(net: nn.Module, parameters: Iterable[nn.Parameter], inputs: torch.Tensor, step: float) -> float:
    """Returns the learning rate at which a first step of Adam moves the net's mean output by at most ``step``, to first
    order; collective, the same on every rank.

    Args:
        net: inputs -> (B,) log kappa; in training mode, and its buffers stay as they are.
        inputs: of a batch.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(net(inputs).mean(), trained, allow_unused=True)
    for buffer, kept in buffers:
        buffer.copy_(kept)
    reach = torch.stack([gradient.abs().sum(dtype=torch.float64) for gradient in gradients if gradient is not None])
    return step / mean_over_ranks(reach.sum().reshape(1))
