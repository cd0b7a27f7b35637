"""Programs in PTX, written by hand and executed on NumPy arrays."""

from collections.abc import Callable

import numpy as np
import pytest

from bench.executor.approximation import Approximation
from bench.executor.machine import Launch
from bench.executor.memory import GlobalMemory
from bench.executor.program import Program

# %rd0, %rd1, ...: addresses of the arrays; %r0: the thread; %rd10 to %rd13: 1, 2, 4 and 8 times it.
_PROLOGUE = """
	mov.u32 %r0, %tid.x;
	cvt.u64.u32 %rd10, %r0;
	shl.b64 %rd11, %rd10, 1;
	shl.b64 %rd12, %rd10, 2;
	shl.b64 %rd13, %rd10, 3;
"""


def assemble(body: str, arrays: int = 1, threads: int = 32) -> Program:
    """Returns a program whose parameters are the addresses of arrays."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 test_param_{i}" for i in range(arrays))
    loads = "\n".join(f"\tld.param.b64 %rd{i}, [test_param_{i}];" for i in range(arrays))
    return Program(
        f".visible .entry test(\n{parameters}\n)\n.reqntid {threads}\n{{\n{loads}\n{_PROLOGUE}\n{body}\n\tret;\n}}\n"
    )


def _execute(
    program: str | Program,
    *arrays: np.ndarray,
    threads: int = 32,
    grid: tuple[int, ...] = (1,),
    shared: int = 0,
    approximation: Approximation | None = None,
) -> list[np.ndarray]:
    """Returns the arrays as the program leaves them."""
    if isinstance(program, str):
        program = assemble(program, len(arrays), threads)
    memory = GlobalMemory([array.view(np.uint8).ravel() for array in arrays])
    addresses = [memory.address(i) for i in range(len(arrays))]
    Launch(program, grid, addresses, memory, shared, approximation).run()
    contents = [memory.data[start : start + array.nbytes] for start, array in zip(memory.starts, arrays)]
    return [content.view(array.dtype).reshape(array.shape) for content, array in zip(contents, arrays)]


@pytest.fixture(scope="session")
def execute() -> Callable[..., list[np.ndarray]]:
    return _execute


@pytest.fixture(scope="session")
def make_program() -> Callable[..., Program]:
    return assemble
