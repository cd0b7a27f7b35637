"""Kernels compiled for GPUs that need not be there, exactly as the project launches them.

``record_launches`` runs the project's own functions on CPU tensors and keeps each launch in the place of running it;
``compile_launch`` compiles a recorded launch under the JIT's own rules of specialization (types, constants, sizes that
are 1 or multiples of 16). The process must not have TRITON_INTERPRET set: interpreted kernels cannot be compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from scf_fast.errors import InputError
from scf_fast.kernels import _common


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what ``kernel[grid](*positional, **named)`` was given."""

    kernel: Any  # a JITFunction
    grid: tuple[int, ...]
    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns the values of the kernel's parameters, and the options of its compilation."""
        return dict(zip(self.kernel.arg_names, self.positional)) | dict(self.named)


@dataclass(frozen=True)
class CompiledKernel:
    """A launch compiled for one architecture: resources, PTX and SASS."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    local: int  # bytes of a thread
    shared: int  # bytes of a program
    num_warps: int
    ptx: str
    ttir: str
    sass: str


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """Returns the launches of kernels that ``call`` makes, none of which runs: the tensors that they fill stay as they
    are. ``call`` passes CPU tensors and ``backend="triton"``.

    Raises:
        InputError: TRITON_INTERPRET is set.
    """
    if _common.INTERPRETED:
        raise InputError("TRITON_INTERPRET must not be set: kernels that are interpreted do not compile")
    launches = []

    def keep(kernel: Any, *positional: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        launches.append(Launch(kernel, tuple(grid), positional, named))

    # INTERPRETED is what lets CPU tensors through to the launch.
    with mock.patch.object(JITFunction, "run", keep), mock.patch.object(_common, "INTERPRETED", True):
        call()
    return launches


def compile_launch(launch: Launch, architecture: int) -> CompiledKernel:
    """Compiles a recorded launch for one architecture, 90 being sm_90; compilations are kept in Triton's cache."""
    target = GPUTarget("cuda", architecture, 32)
    source, options = _specialize(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", file.name)))
        sass = _cuobjdump("-sass", file.name)
    return CompiledKernel(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
        ttir=compiled.asm["ttir"],
        sass=sass,
    )


def _specialize(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Returns what ``JITFunction.run`` would compile, and its options; private parts of Triton, read in 3.7.1."""
    kernel, backend = launch.kernel, make_backend(target)
    named = {**launch.named, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.positional, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def _cuobjdump(flag: str, path: str) -> str:
    """Runs the cuobjdump that comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
