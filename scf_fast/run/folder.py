"""The folder of a run: whose it is, that nobody else is writing to it, and what it is known by."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from scf_fast import __version__
from scf_fast import config as configuration
from scf_fast.config import Config
from scf_fast.errors import InputError
from scf_fast.run import checkpoints

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
_LOCK_SECONDS = 15  # workers of a run that was killed notice within 5
# A run may be continued with other hardware settings, a longer schedule or another cadence of logs, but these make it
# another run.
_IDENTITY = (
    "stage",
    "data",
    "batch_size",
    "seed",
    "network",
    "z_dim",
    "loss",
    "margins",
    "saved_bkb",
    "saved_fc",
    "finetune_bkb",
    "confidence_net",
    "normalizer",
    "radius",
    "label_smoothing",
    "sample_rate",
    "scale",
    "margin_gradient",
    "dropout",
    "augmentation",
    "flip",
    "shuffle",
    "data_weights",
    "images_per_identity",
    "max_images_per_identity",
    "normalization",
)
_READ = (
    "data",
    "dataroot",
    "saved_bkb",
    "saved_fc",
    "feature_cache",
    "index_dir",
    "deepspeed_config",
)  # files that a run needs and does not make


def versions() -> dict:
    """What decides a result besides the configuration."""
    found = {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": str(torch.__version__),
    }  # with the CUDA that it is built for, which the metadata of some wheels leaves out
    for package in ("triton", "deepspeed", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["scf_fast"] = __version__
    if shutil.which("git"):
        root = Path(__file__).resolve().parents[2]
        found["git"] = (
            subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
            ).stdout.strip()
            or None
        )
    return found


def claim(config: Config) -> tuple[str, dict] | None:
    """Check the output folder against this run, before anything is written; name and state of the checkpoint to resume
    from, if any.

    Raises:
        ValueError: the folder holds another run, or this one without --resume.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; give a folder")
    if config.overwrite:
        _check_nothing_else_is_lost(config)
    old = folder / CONFIG_FILE
    if not old.exists() and config.resume and (folder / CHECKPOINTS).is_dir():
        return checkpoints.newest_intact(folder / CHECKPOINTS)
    if not old.exists():
        if folder.exists() and any(folder.iterdir()) and not config.overwrite:
            raise InputError(
                f"--output_dir {folder}: holds files that are no run of this program; give another folder, or "
                "--overwrite to delete them"
            )
        return None
    if config.overwrite:
        return None
    before, now = configuration.load_saved(old), config.as_dict()
    different = [key for key in _IDENTITY if not _same(key, before.get(key), now[key])]
    if different:
        what = ", ".join(f"{key} {before.get(key)!r} -> {now[key]!r}" for key in different)
        raise InputError(
            f"--output_dir {folder}: holds a different run ({what}); give another folder, or --overwrite to delete it"
        )
    if not config.resume:
        raise InputError(
            f"--output_dir {folder}: holds this run already; give --resume to continue it, or --overwrite to delete it"
        )
    return checkpoints.newest_intact(folder / CHECKPOINTS)


def _check_nothing_else_is_lost(config: Config) -> None:
    """What --overwrite deletes must hold neither what this run reads nor the folder that it is started in."""
    folder = os.path.realpath(config.output_dir)
    named = [(f"--{flag}", path) for flag in _READ for path in str(getattr(config, flag) or "").split(",") if path]
    for what, path in [("the current folder", "."), *named]:
        if os.path.commonpath([folder, os.path.realpath(path)]) == folder:
            raise InputError(
                f"--overwrite would delete all of {config.output_dir}, and {what} {path} lies in it; give another "
                "--output_dir"
            )


def _same(key: str, before, now) -> bool:
    """Whether an option has the value that it had, however a path is spelled."""
    if key == "normalization" and now is None:  # stage 2 finds it out later
        return True
    if key in _READ and before and now:
        before, now = ([os.path.realpath(path) for path in value.split(",")] for value in (before, now))
    return before == now


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder against a second launch, which would delete what the first is writing.

    Raises:
        ValueError: another process holds it for longer than the workers of a dead run live.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        for attempt in range(_LOCK_SECONDS + 1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_SECONDS:
                    raise InputError(
                        f"--output_dir {folder}: another run is writing to it; wait for its end, or stop its ranks: "
                        "pkill -f train.py"
                    ) from None
                time.sleep(1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def empty(folder: Path) -> None:
    """Delete what is in a folder, which stays: it is locked."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
