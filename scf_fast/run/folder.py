"""The folder of a run: which run it belongs to, and that nobody else is writing to it."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scf_fast import __version__
from scf_fast import config as configuration
from scf_fast.config import ConfidenceConfig, Config
from scf_fast.errors import InputError
from scf_fast.pipelines.text import is_utf8
from scf_fast.run import same_inputs
from scf_fast.run.checkpoints import ResumePoint, newest_intact
from scf_fast.run.folder_lock import PREFIX as LOCK_PREFIX
from scf_fast.run.folder_lock import locked

log = logging.getLogger(__name__)

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"


def versions() -> dict[str, str | None]:
    """Returns what decides a result besides the configuration: versions of the software, and the device."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        # with the CUDA that it is built for, which the metadata of some wheels leaves out
        "torch": str(torch.__version__),
    }
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


def claim(config: Config) -> ResumePoint | None:
    """Checks the output folder against this run, before anything is written, and returns where to resume, if anywhere.

    Raises:
        InputError: the folder holds another run, or this one without --resume.
    """
    folder = Path(config.output_dir)
    if not is_utf8(os.fspath(folder)):  # after an epoch it would fail
        raise InputError(
            f"--output_dir {folder}: its name must be UTF-8, or PyTorch cannot map the files in it; give another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; give a folder")
    if config.overwrite:
        _check_nothing_else_is_lost(config)
    old = folder / CONFIG_FILE
    if not old.exists() and config.resume and (folder / CHECKPOINTS).is_dir():
        return _find_slope(newest_intact(folder / CHECKPOINTS), {})
    if not old.exists():
        if folder.exists() and any(_contents(folder)) and not config.overwrite:
            raise InputError(
                f"--output_dir {folder}: holds files that are no run of this program; give another folder, or "
                "--overwrite to delete them"
            )
        return None
    if config.overwrite:
        return None
    before = configuration.load_saved(old)
    _check_same_run(before, config)
    if not config.resume:
        raise InputError(
            f"--output_dir {folder}: holds this run already; give --resume to continue it, or --overwrite to delete it"
        )
    return _find_slope(newest_intact(folder / CHECKPOINTS), before)


def _find_slope(point: ResumePoint | None, before: dict[str, Any]) -> ResumePoint | None:
    """Returns the checkpoint with the slope that it was trained by, where its version has not noted that in it.

    Args:
        before: the options that the folder's run was started with; the first versions had no other slope than exact.
    """
    if point is None or point.state.slope is not None:
        return point
    slope = before.get("slope") or "exact"
    return dataclasses.replace(point, state=dataclasses.replace(point.state, slope=slope))


def continued(config: Config, point: ResumePoint) -> Config:
    """Returns the configuration of a run that goes on: its slope is the one that it began with, whatever is the
    default now or is given. Adam's moments are of that slope.
    """
    slope = point.state.slope
    if not isinstance(config, ConfidenceConfig) or slope in (None, config.slope):
        return config
    log.info(
        "--slope %s: the run goes on with %s, as it began; another one needs another --output_dir", config.slope, slope
    )
    return dataclasses.replace(config, slope=slope)


def _check_same_run(before: dict[str, Any], config: Config) -> None:
    """Checks the options that make it this run: others may change, such as hardware settings, a longer schedule or
    another cadence of logs.

    Args:
        before: the options that the folder's run was started with; one that its version did not have yet has the
            default, which is what that version did.
    """
    now, paths = config.identity(), {name for name, _ in config.input_paths()}
    defaults = config.defaults()
    # What has moved is compared by its content, once it is open.
    compared = {
        name
        for name, entry in same_inputs.noted(Path(config.output_dir)).items()
        if name in paths and same_inputs.is_same_path(entry["path"], before.get(name)) and now.get(name)
    }
    different = [
        f"{name} {old!r} -> {value!r}"
        for name, value in now.items()
        if name not in compared
        and not _is_same(name in paths, old := before.get(name, defaults.get(name)), value)
        and not (name == "normalization" and value is None)  # stage 2 finds it out later
    ]
    if different:
        raise InputError(
            f"--output_dir {config.output_dir}: holds a different run ({', '.join(different)}); give another folder, "
            "or --overwrite to delete it"
        )


def _is_same(is_path: bool, before: Any, now: Any) -> bool:
    """Returns whether an option has the value that it had, however a path is spelled."""
    return same_inputs.is_same_path(before, now) if is_path else before == now


def _check_nothing_else_is_lost(config: Config) -> None:
    """Checks that --overwrite deletes neither what this run reads nor the folder that it is started in."""
    folder = os.path.realpath(config.output_dir)
    named = [(f"--{name}", path) for name, path in config.input_paths()]
    for what, path in [("the current folder", "."), *named]:
        if os.path.commonpath([folder, os.path.realpath(path)]) == folder:
            raise InputError(
                f"--overwrite would delete all of {config.output_dir}, and {what} {path} lies in it; give another "
                "--output_dir"
            )


@contextlib.contextmanager
def prepare(config: Config, is_locked: bool) -> Iterator[None]:
    """Empties the run's folder if it is to be overwritten, or makes and locks it, and notes the configuration in it.

    Args:
        is_locked: whether the caller holds its lock already, since it was there before.
    Raises:
        InputError: another run has begun in it since :func:`claim`.
    """
    folder = Path(config.output_dir)
    if config.overwrite and is_locked:
        _empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if is_locked else locked(folder):
        if not is_locked and claim(config) is not None:  # of a run that began, and ended, in the meantime
            raise InputError(
                f"--output_dir {folder}: another launch has trained here since this one began; start again with "
                "--resume"
            )
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        configuration.save(config, folder / CONFIG_FILE, versions())
        yield


def _empty(folder: Path) -> None:
    """Deletes everything in a folder, which stays, with its lock."""
    for path in _contents(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _contents(folder: Path) -> Iterator[Path]:
    """Yields what is in a folder besides its lock."""
    return (path for path in folder.iterdir() if not path.name.startswith(LOCK_PREFIX))
