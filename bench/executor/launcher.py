"""Lets the project's own Python code launch its kernels on CPU tensors, compiled for a GPU that is not there.

    with executing(architecture=80, approximation=Approximation(Mode.PLUS)):
        loss = scf_loss(features, log_kappa, class_centers, labels, backend="triton")

Each ``kernel[grid](...)`` inside is specialized by the rules of Triton's just-in-time compiler, compiled, and executed.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import scf_fast.kernels  # noqa: F401  executing() looks for the kernels in all its modules
from bench.executor.approximation import Approximation
from bench.executor.arithmetic import U8, Array
from bench.executor.compiler import KernelRequest, compile_kernel
from bench.executor.machine import Launch
from bench.executor.memory import GlobalMemory
from bench.executor.program import Program
from scf_fast.kernels import _common

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*u1",
}


class Specialized(NamedTuple):
    """What the compiler is told of one argument: its type, and whether it is a multiple of 16."""

    type: str
    divisible: bool


def specialize(value: Any, constant: bool = False, by_value: bool = True) -> Specialized:
    """Returns what Triton's just-in-time compiler specializes a kernel for.

    Args:
        constant: the parameter is a ``tl.constexpr``.
        by_value: integers are looked at; not for parameters in ``do_not_specialize``.
    """
    if constant or value is None:
        return Specialized("constexpr", False)
    if isinstance(value, torch.Tensor):
        # Allocations are aligned, here and on a GPU; PyTorch's on the CPU may be aligned otherwise.
        offset = value.storage_offset() * value.element_size()
        return Specialized(_POINTERS[value.dtype], by_value and offset % 16 == 0)
    if isinstance(value, bool):
        return Specialized("u1", False)
    if isinstance(value, int):
        if value == 1 and by_value:
            return Specialized("constexpr", False)
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if -(2**63) <= value < 2**63 else "u64"
        return Specialized(kind, by_value and value % 16 == 0)
    if isinstance(value, float):
        return Specialized("fp32", False)
    raise TypeError(f"no kernel of ours takes {type(value).__name__}: {value!r}")


class Executor(NamedTuple):
    """For which GPU kernels are compiled, and how they are executed.

    Attributes:
        options: of the compiler, which replace those of the launch.
    """

    architecture: int = 80
    approximation: Approximation = Approximation()
    options: tuple[tuple[str, Any], ...] = ()


class ExecutedKernel:
    """Stands where a kernel stood; ``self[grid](...)`` compiles and executes it."""

    def __init__(self, kernel: InterpretedFunction | JITFunction, executor: Executor):
        self.function, self.executor = kernel.fn, executor
        self.parameters = inspect.signature(kernel.fn).parameters
        unspecialized = kernel.kwargs if isinstance(kernel, InterpretedFunction) else vars(kernel)
        self.by_type = frozenset(unspecialized.get("do_not_specialize") or ())

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: Sequence[int], *arguments: Any, **keywords: Any) -> None:
        values = dict(zip(self.parameters, arguments))
        values |= {name: keywords.pop(name) for name in list(keywords) if name in self.parameters}
        values |= {n: p.default for n, p in self.parameters.items() if n not in values}
        request = self.request(values, {**keywords, **dict(self.executor.options)})
        program, shared_bytes = _program(request)
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        memory = GlobalMemory([_bytes(storage) for storage in storages.values()])
        places = {pointer: memory.address(i) for i, pointer in enumerate(storages)}

        def argument(value: Any) -> float:
            if not isinstance(value, torch.Tensor):
                return value
            return places[value.untyped_storage().data_ptr()] + int(value.storage_offset()) * value.element_size()

        passed = [argument(values[name]) for name, kind in request.signature.items() if kind != "constexpr"]
        Launch(program, grid, passed, memory, shared_bytes, self.executor.approximation).run()
        for start, storage in zip(memory.starts, storages.values()):
            _bytes(storage)[:] = memory.data[start : start + storage.nbytes()]

    def request(self, values: dict[str, Any], options: dict[str, Any]) -> KernelRequest:
        """Returns what has to be compiled for these arguments."""
        signature: dict[str, str] = {}
        constants: dict[int, Any] = {}
        divisible = []
        for place, (name, parameter) in enumerate(self.parameters.items()):
            value = values[name]
            kind = specialize(value, parameter.annotation is tl.constexpr, name not in self.by_type)
            signature[name] = kind.type
            if kind.type == "constexpr":
                constants[place] = value
            if kind.divisible:
                divisible.append(place)
        return KernelRequest(
            self.function.__module__,
            self.function.__name__,
            signature,
            constants,
            tuple(divisible),
            options,
            self.executor.architecture,
        )


_programs: dict[str, tuple[Program, int]] = {}


def _program(request: KernelRequest) -> tuple[Program, int]:
    """Returns the program and its bytes of shared memory."""
    key = repr(request)
    if key not in _programs:
        compiled = compile_kernel(request)
        _programs[key] = Program(compiled.ptx), compiled.shared_bytes
    return _programs[key]


def _bytes(storage: torch.UntypedStorage) -> Array:
    """Returns the memory of a tensor as bytes that NumPy can write."""
    if not storage.nbytes():
        return torch.empty(0, dtype=torch.uint8).numpy().view(U8)
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


@contextlib.contextmanager
def executing(architecture: int = 80, approximation: Approximation | None = None, **options: Any) -> Iterator[None]:
    """Within it, ``backend="triton"`` takes CPU tensors and executes the compiled kernels.

    Args:
        architecture: of the GPU to compile for, 80 for sm_80.
        approximation: of inexact instructions and tensor cores; exact by default.
        options: of the compiler, in the place of those of each launch.
    """
    executor = Executor(architecture, approximation or Approximation(), tuple(options.items()))
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("scf_fast.kernels.")]
    before: list[tuple[Any, str, Any]] = [(_common, "INTERPRETED", _common.INTERPRETED)]
    for module in modules:
        kernels = (InterpretedFunction, JITFunction)
        before += [(module, name, value) for name, value in vars(module).items() if isinstance(value, kernels)]
    try:
        _common.INTERPRETED = True  # CPU tensors may go to Triton
        for module, name, kernel in before[1:]:
            setattr(module, name, ExecutedKernel(kernel, executor))
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
