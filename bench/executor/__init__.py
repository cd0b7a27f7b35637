"""Runs compiled Triton kernels without a GPU: the PTX that the compiler emits, executed in NumPy.

    launcher        ``executing()``: the project's own Python code launches its kernels on CPU tensors, executed
    compiler        PTX of a kernel as the JIT would specialize it, from a child process, kept on disk
    machine         one launch: cooperative thread arrays, divergence, barriers, one function per kind of instruction
    program         PTX text -> instructions
    registers       one array over all lanes per register
    memory          global and shared memory, with checks of bounds, alignment, races and copies
    floats          floating-point instructions           approximation   where in its bound an approximate one lands
    integers        integer instructions                  conversions     ``cvt``
    products        ``mma.sync``, ``ldmatrix``            arithmetic      exact float32 and float64 building blocks

IEEE arithmetic is exact, fused multiply-add included. An approximate instruction gives a number within its documented
bound, where ``Approximation`` says. Tensor cores add up exactly, anywhere in a bound, or as an A100 or an H100 does.
Reported as errors: races in shared and in global memory, accesses out of bounds or misaligned, copies used before they
are waited for, registers read before they are written, barriers that not all threads reach.

Not covered: Hopper's and Blackwell's asynchronous products (wgmma, tcgen05), tensor memory copies, mbarriers, local
memory, and what ptxas does after PTX, such as contracting products into sums where the launch allows it.
"""
