"""Flags and positional arguments of the commands that embed images."""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from scf_fast.errors import InputError
from scf_fast.inference import Decoding, InferenceOptions
from scf_fast.networks.precision import PRECISION_DTYPES
from scf_fast.pipelines.sources.base import reason_of
from scf_fast.pipelines.sources.image_names import IMAGE_SUFFIXES, list_skipped, subfolders, walk_images
from scf_fast.pipelines.waiting import add_timeout_argument


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every command that embeds images; :func:`inference_options` reads them."""
    add_normalization_argument(parser)
    parser.add_argument(
        "--flip",
        action="store_true",
        help="embed mirror images too, as insightface does: features are added, log kappa or log variance is averaged",
    )
    parser.add_argument("--device", type=usable_device, help="default: this rank's GPU where there is one, else cpu")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISION_DTYPES),
        help="precision of the backbone; auto: half precision on a GPU where it is accurate",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="images at once (default: %(default)s)"
    )
    parser.add_argument(
        "--loader", default="auto", choices=("auto", "dali", "torch"), help="decoder; auto: dali where it is installed"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="decoding threads or processes a rank (default: one less than it has CPU cores, 1 to 16)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="end at an image that cannot be decoded (default: it is left out, counted and listed with the reason)",
    )
    add_timeout_argument(parser)


def inference_options(arguments: argparse.Namespace) -> InferenceOptions:
    """Returns the values of the flags that :func:`add_inference_arguments` adds, and makes the device of ``--device``
    the current one.
    """
    if arguments.device is not None and arguments.device.type == "cuda":
        # Pinned memory, streams and events go to the current GPU unless told otherwise, and so would 500 MB of context.
        torch.cuda.set_device(arguments.device)
    return InferenceOptions(
        normalization=arguments.normalization,
        flip=arguments.flip,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        decoding=Decoding(arguments.loader, arguments.num_workers, arguments.input_timeout),
        strict=arguments.strict,
    )


def add_normalization_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--normalization``."""
    parser.add_argument(
        "--normalization",
        choices=("insightface", "published"),
        help="pixel convention, where the model's files do not state it (default: as noted in the fc.pth beside a "
        "backbone, else the one that the backbone's family is trained with)",
    )


def usable_device(text: str) -> torch.device:
    """Converts a command-line word to a device that works here."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise argparse.ArgumentTypeError(
            f"must be a device that PyTorch can use here, such as cpu or cuda:0, got {text!r}"
        ) from error


def positive_int(text: str) -> int:
    """Converts a command-line word to an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


class FoundImages(NamedTuple):
    """Image files, and what was left out."""

    paths: list[Path]
    skipped: Counter[str]  # files and folders, by reason


def find_images(paths: list[Path]) -> FoundImages:
    """Returns the files given, and the images in and under the folders given, sorted within each folder.

    Which files are images is the rule of :mod:`scf_fast.pipelines.sources.image_names`, as in training; a file that is
    given by itself is taken as it is.

    Raises:
        InputError: a path does not exist or cannot be listed, or there are no images.
    """
    found: list[Path] = []
    skipped = Counter[str]()
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no {path}; check the path")
        found += [path] if path.is_file() else _images_under(path, skipped)
    if not found:
        raise InputError(
            f"no images under {', '.join(map(str, paths))}; files must end in {', '.join(IMAGE_SUFFIXES)}"
            f"{list_skipped(skipped)}"
        )
    return FoundImages(found, skipped)


def _images_under(path: Path, skipped: Counter[str]) -> list[Path]:
    root = os.fsencode(path)
    try:
        folders, names = subfolders(root, skipped)
        for first in folders:
            for folder, images in walk_images(root, first, skipped):
                names += [os.path.join(folder, image) for image in images]
    except OSError as error:
        raise InputError(
            f"cannot list {os.fsdecode(error.filename or path)}: {reason_of(error)}; restore it or leave it out"
        ) from error
    return sorted(path / os.fsdecode(name) for name in names)
