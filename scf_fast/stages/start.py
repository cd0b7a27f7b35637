"""Where a confidence net starts, and the highest learning rate that its first step bears, from the first batches.

Both are closed forms. The best constant kappa under the exact SCF loss is A_d^-1(mean cosine). And a step of Adam moves
each weight by at most about the learning rate, so it moves mean log kappa, to first order, by at most

    lr * sum over all weights of |d mean log kappa / d weight|
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from scf_fast.errors import InputError
from scf_fast.objectives import Objective
from scf_fast.stages.criteria import fitting_value

LEAST_COSINE = 0.01
_LARGEST_COSINE = 1 - 1e-7  # of images that are the center itself, in float32


def best_constant(objective: Objective, mean_cosine: float, dim: int, published: bool = False) -> float:
    """Returns the kappa, or the variance of a Gaussian, that fits all images best if they share one.

    Args:
        mean_cosine: with the own class centers, or between images of a person; in [0.01, 1].
        published: the normalizer is the published code's, whose optimum is (d/2 - 1) / (1 - c) at every kappa that has
            no I_v above 1e-6.
    """
    cosine = min(mean_cosine, _LARGEST_COSINE)
    if published and objective is Objective.SCF:
        return max(dim / 2 - 1, 0.5) / (1 - cosine)
    return fitting_value(objective, cosine, dim)


def genuine_cosine(mu: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cosine of each pair of images with one label, averaged for each image that is in one, (M,).

    Args:
        mu: (B, d) unit directions.
        labels: (B,).
    """
    _, own, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = mu.new_zeros(len(counts), mu.shape[1]).index_add_(0, own, mu)
    others = (counts[own] - 1).to(mu.dtype)
    paired = others > 0
    return ((mu * (sums[own] - mu)).sum(dim=1))[paired] / others[paired]


def mean_over_ranks(values: torch.Tensor) -> float:
    """Returns the mean of all ranks' values, (N,); collective."""
    total = torch.stack((values.double().sum(), values.new_full((), float(len(values)), dtype=torch.float64)))
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
            f"{centers}: the images' mean cosine with their own class centers is {mean_cosine:.3f}, so that no kappa "
            "fits them; give the centers of this backbone in the order of this data's identities, or --initial_kappa "
            "none"
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
