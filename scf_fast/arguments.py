import argparse
from pathlib import Path

import torch

from scf_fast.errors import InputError
from scf_fast.networks.precision import PRECISION_DTYPES
from scf_fast.pipelines.sources.base import IMAGE_SUFFIXES


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that embeds images."""
    add_normalization_argument(parser)
    parser.add_argument(
        "--flip",
        action="store_true",
        help="embed mirror images too, as insightface does: features added, log kappa averaged",
    )
    parser.add_argument("--device", type=_device, help="default: this rank's GPU where there is one, else cpu")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISION_DTYPES),
        help="of the backbone; auto: half precision on a GPU where accurate",
    )
    parser.add_argument(
        "--batch-size",
        "--batch_size",
        type=_positive,
        default=256,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    parser.add_argument(
        "--loader", default="auto", choices=("auto", "dali", "torch"), help="decoder: dali where installed, else torch"
    )
    parser.add_argument(
        "--num-workers",
        "--num_workers",
        type=int,
        default=2,
        metavar="N",
        help="decoding threads or processes (default: %(default)s)",
    )


def add_normalization_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--normalization",
        choices=("insightface", "published"),
        help="pixel convention, where the model's files do not tell it; else as the "
        "fc.pth beside a backbone notes it, else what the backbone's family is trained with",
    )


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise argparse.ArgumentTypeError(
            f"must be a device that PyTorch can use here, such as cpu or cuda:0, got {text!r}"
        ) from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def find_images(paths: list[Path]) -> list[Path]:
    """The files, and every image file under the folders, sorted within each.

    Raises:
        ValueError: a path does not exist, or there are no images.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no {path}; check the path")
        found += (
            [path]
            if path.is_file()
            else sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        )
    if not found:
        raise InputError(f"no images under {', '.join(map(str, paths))}; files must end in {', '.join(IMAGE_SUFFIXES)}")
    return found
