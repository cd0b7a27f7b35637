"""The machine and the versions behind a measurement, written beside every number."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import scipy
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where benchmarks run
ROOT = Path(__file__).parents[2]  # of the checkout
RESULTS = ROOT / "bench" / "results"  # one folder for each device, named by ``device_slug``


def _output_of(*command: str) -> str | None:
    """Returns the command's output, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def _device_name(device: torch.device | str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def is_installed(module: str) -> bool:
    """Returns whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def command() -> str:
    """Returns the running command as one would type it; a path outside the project is cut to its last part."""
    spec = sys.modules["__main__"].__spec__
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])
    words = [
        (os.path.relpath(word, ROOT) if Path(word).is_relative_to(ROOT) else os.path.basename(word))
        if os.path.isabs(word)
        else word
        for word in sys.argv[1:]
    ]
    return " ".join(["python", program, *words])


def environment(device: torch.device | str) -> dict[str, str | int | None]:
    """Returns hardware, versions and revision; None stands for what is not there or cannot be found out.

    ``commit`` ends in "-dirty" where tracked files differ from it.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "command": command(),
        "date": date.today().isoformat(),
        "device": _device_name(device),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": _triton_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "commit": _output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    }


def device_slug(device: torch.device | str) -> str:
    """Returns the device's name as result files and folders carry it: "cpu", "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
