"""Compiles kernels on request, in a process whose Triton does not interpret.

    python -m bench.executor.compile_server

Reads pickled ``KernelRequest`` from its input until that ends, and writes a pickled ``CompiledKernel`` for each, or the
text of an error.
"""

import importlib
import os
import pickle
import sys
import traceback
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.executor.compiler import CompiledKernel, KernelRequest


def _stop_at_ptx(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, architecture: Any = None
) -> tuple[str, str] | None:
    """Leaves the assembler out, a quarter of the time; without arguments, names itself for Triton's cache keys."""
    if stages is None:
        return "ptx alone", "ptx alone"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def compile_to_ptx(request: KernelRequest) -> CompiledKernel:
    kernel = getattr(importlib.import_module(request.module), request.kernel)
    source = ASTSource(
        kernel,
        request.signature,
        {(place,): value for place, value in request.constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in request.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", request.architecture, 32), options=dict(request.options))
    return CompiledKernel(compiled.asm["ptx"], compiled.metadata.shared)


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: CompiledKernel | str = compile_to_ptx(request)
        except Exception:
            reply = traceback.format_exc()
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
