"""Arguments of the losses: their checks, and the options that their operators take."""

import enum

import torch

from scf_fast.kernels._common import MAX_DIM, check_floating, use_triton


class LossOption(enum.IntFlag):
    """Switches of an operator, as one argument: each of its own would cost time in PyTorch's Python layer in every
    call, and a place in four signatures.
    """

    MEAN = enum.auto()
    SUM = enum.auto()  # with neither, one loss per row
    PUBLISHED = enum.auto()
    COEFFICIENTS = enum.auto()  # also leave what the gradients of features and class centers need
    TERMS = enum.auto()
    TRITON = enum.auto()
    DEBUG = enum.auto()
    VMF = enum.auto()  # of the pair likelihood; without it, the Gaussian


def reduce_rows(rows: torch.Tensor, options: int) -> torch.Tensor:
    """Returns the loss of all rows: their mean, their sum, or as they are."""
    return rows.mean() if options & LossOption.MEAN else rows.sum() if options & LossOption.SUM else rows


def loss_options(reduction: str, return_terms: bool, backend: str, debug: bool, features: torch.Tensor) -> int:
    """Returns the options that all losses have.

    Raises:
        ValueError: unknown reduction, or a backend that cannot run.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    options: int = {"mean": LossOption.MEAN.value, "sum": LossOption.SUM.value, "none": 0}[reduction]
    if return_terms:
        options |= LossOption.TERMS.value
    if use_triton(backend, features):
        options |= LossOption.TRITON.value
    if debug:
        options |= LossOption.DEBUG.value
    return options


def center_loss_options(
    features: torch.Tensor, class_centers: torch.Tensor, reduction: str, return_terms: bool, backend: str, debug: bool
) -> int:
    """Returns the options of a loss against class centers; raises as ``loss_options``."""
    options = loss_options(reduction, return_terms, backend, debug, features)
    if torch.is_grad_enabled() and (features.requires_grad or class_centers.requires_grad):
        options |= LossOption.COEFFICIENTS.value
    return options


def check_rows(
    features: torch.Tensor, name: str, parameter: torch.Tensor, labels: torch.Tensor, per_dimension: bool = False
) -> None:
    """Raises ValueError unless features are (B, d), and there is a label and a parameter for each row, or with
    ``per_dimension`` for each of its elements.
    """
    check_floating("features", features)
    check_floating(name, parameter)
    if features.ndim != 2 or not 2 <= features.shape[1] <= MAX_DIM:
        raise ValueError(f"features must be (B, d) with d in 2 .. {MAX_DIM}, got {tuple(features.shape)}")
    batch, dim = features.shape
    shapes = [(batch,), (batch, 1)] + [(batch, dim)] * per_dimension
    if tuple(parameter.shape) not in shapes:
        listed = f"{', '.join(map(str, shapes[:-1]))} or {shapes[-1]}"
        raise ValueError(f"{name} must be {listed} to match features, got {tuple(parameter.shape)}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels must be ({batch},) to match features, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, got {labels.dtype}: convert them with .long()")


def check_center_loss(
    features: torch.Tensor,
    name: str,
    parameter: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    per_dimension: bool = False,
) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    check_rows(features, name, parameter, labels, per_dimension)
    check_floating("class_centers", class_centers)
    if class_centers.ndim != 2 or class_centers.shape[1] != features.shape[1]:
        raise ValueError(
            f"class_centers must be (C, {features.shape[1]}) to match features {tuple(features.shape)}, got "
            f"{tuple(class_centers.shape)}"
        )


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raises IndexError for a label without a class center; reads them, which waits for a device."""
    low, high = (value.item() for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(
            f"labels must be in [0, {classes}), one for each class center, got values from {low} to {high}"
        )
