"""What is known of a kernel that is compiled for its instructions: how it is launched, and what a program computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.measuring.compilation import Launch, record_launches

Arguments = Mapping[str, Any]  # of a launch: its kernel's parameters and the options of its compilation


@dataclass(frozen=True)
class Product:
    """The matrix product within a kernel.

    Attributes:
        dtype: of its operands: "bfloat16" (or float16), "tf32" or "float32" (outside of the tensor cores).
        flop: of one unit; a multiplication and an addition count as two.
        inner: length of the dimension that is summed over.
        step: the kernel's constant that says how much of it one turn of the loop takes.
    """

    dtype: str
    flop: float
    inner: int
    step: str


@dataclass(frozen=True)
class Variant:
    """A kernel in one of the forms in which it is launched.

    Attributes:
        work: what it computes, with types and width.
        kernel: name of the kernel function.
        launch: calls a public function on CPU tensors, which launches the kernel.
        unit: what is counted, such as "element" or "score".
        units: how many of them one program computes, from the launch's arguments.
        nbytes: of one unit, read and written once; None where a matrix product or ``slots`` set the pace.
        slots: instructions that one unit takes at least, where they set the pace.
        product: the matrix product, if there is one.
        turns: of its outermost loops that hold no product themselves: over tiles, images or splits.
        inner_turns: of the loops within those, where there is no product.
        settings: constants by which its launch is known among others of the same kernel.
    """

    work: str
    kernel: str
    launch: Callable[[], object]
    unit: str
    units: Callable[[Arguments], float]
    nbytes: float | None = None
    slots: float | None = None
    product: Product | None = None
    turns: float = 1.0
    inner_turns: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()

    def record(self) -> Launch:
        """Returns the launch.

        Raises:
            LookupError: the public function does not launch such a kernel.
        """
        for launch in record_launches(self.launch):
            arguments = launch.arguments
            if launch.name == self.kernel and all(arguments[name] == value for name, value in self.settings):
                return launch
        raise LookupError(f"{self.work}: no launch of {self.kernel} with {dict(self.settings)}")
