"""What an execution reports of a faulty program."""


class ExecutionError(RuntimeError):
    """A program did what a GPU leaves undefined."""


class RaceError(ExecutionError):
    """Two threads access one place without an order between them, at least one of them writing."""


class MemoryAccessError(ExecutionError):
    """An access is out of bounds or misaligned."""


class UnwrittenRegisterError(ExecutionError):
    """A register is read that nothing was written to."""


class ConvergenceError(ExecutionError):
    """Threads that an instruction needs together do not reach it together."""


class UnknownInstructionError(NotImplementedError):
    """The executor does not know an instruction: it has those that Triton emits for the project's kernels, and says so
    rather than guess where a new kernel or another Triton has one more.
    """
