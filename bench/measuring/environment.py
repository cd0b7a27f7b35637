"""What a measurement ran on, to be written beside every number."""

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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what benchmarks run on
_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results"  # holds a folder for each device, named by `device_slug`


def _output_of(*command):
    """The command's output, None where it is not installed or fails."""
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def command():
    """The command that runs, as one would type it; of a path outside the project only the name."""
    spec = sys.modules["__main__"].__spec__
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else os.path.basename(sys.argv[0])
    words = [
        (os.path.relpath(word, _ROOT) if Path(word).is_relative_to(_ROOT) else os.path.basename(word))
        if os.path.isabs(word)
        else word
        for word in sys.argv[1:]
    ]
    return " ".join(["python", program, *words])


def environment(device):
    """Hardware, versions and revision as a flat dict of strings, numbers and None (not there, or not to be found out).

    `commit` ends in "-dirty" where tracked files differ from it.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "command": command(),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
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


def device_slug(device):
    """The device's name as it stands in the names of result files: "cpu", "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", environment(device)["device"].lower()).strip("-")
