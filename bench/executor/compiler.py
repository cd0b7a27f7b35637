"""Compiles kernels to PTX, for GPUs that need not be there, and keeps the results on disk.

A process that imported the kernels for Triton's interpreter cannot compile them. A child process without
``TRITON_INTERPRET`` does it (``compile_server``), started when something is first missing on disk, and ended with this
process. Results lie in a folder for each state of the kernels' sources, under ``$XDG_CACHE_HOME/scf_fast/executor``.
"""

import functools
import gzip
import hashlib
import importlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from scf_fast.pipelines.formats import atomic_file

ROOT = Path(__file__).resolve().parents[2]
_STATES_KEPT = 8  # of the kernels' sources; about 3 MB each


@dataclass(frozen=True)
class KernelRequest:
    """A kernel as it is specialized for a launch.

    Attributes:
        module, kernel: where it is defined, and its name.
        signature: Triton's type of each parameter, "constexpr" for constants.
        constants: values by the place of the parameter.
        divisible: places of pointers and integers that are multiples of 16.
        options: of the launch, such as num_warps.
        architecture: 80 for sm_80.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[int, Any]
    divisible: tuple[int, ...]
    options: dict[str, Any]
    architecture: int


class CompiledKernel(NamedTuple):
    ptx: str
    shared_bytes: int


class CompileError(RuntimeError):
    """Triton does not compile a kernel; the message is its own."""


def compile_kernel(request: KernelRequest) -> CompiledKernel:
    """Returns the kernel's PTX, from disk if it was compiled before."""
    source = Path(inspect.getfile(importlib.import_module(request.module))).read_bytes()  # it may lie beside kernels/
    digest = hashlib.sha256(repr(request).encode() + source).hexdigest()[:32]
    path = _folder() / f"{request.kernel.strip('_')}-{digest}.json.gz"
    try:
        return CompiledKernel(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError):  # absent, or not written by this version
        compiled = _ask_server(request)
    atomic_file.write_bytes(path, gzip.compress(json.dumps(compiled._asdict()).encode(), 6, mtime=0), sync=False)
    return compiled


@functools.cache
def _folder() -> Path:
    """Returns the folder for these sources and this Triton; removes those that were not used for longest."""
    digest = hashlib.sha256(version("triton").encode())
    for path in sorted(
        [*(ROOT / "kernels").glob("*.py"), Path(__file__), Path(__file__).with_name("compile_server.py")]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scf_fast" / "executor"
    folder = home / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    states = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in states[_STATES_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "bench.executor.compile_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path},
    )


def _ask_server(request: KernelRequest) -> CompiledKernel:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    pickle.dump(request, server.stdin)
    server.stdin.flush()
    try:
        reply = pickle.load(server.stdout)
    except EOFError:
        _server.cache_clear()
        raise CompileError(f"the compile server ended with status {server.wait()}") from None
    if isinstance(reply, str):
        raise CompileError(reply)
    return reply
