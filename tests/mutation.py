"""The class of a planted bug. The files ``mutations*.py`` have a line for each bug."""

from dataclasses import dataclass

KINDS = ("stride", "mask", "scale", "tile", "race", "int32", "rule")
"""A wrong stride, a missing mask, a missing factor, a tile too few or too many, two programs that store to the same place, a row
offset in int32, another rule (a term or a mask that differs from the definition)."""


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` is replaced by ``new`` in ``kernel`` of ``module`` (in ``peftkit_kernels``), and ``test`` must detect it.

    ``old`` must occur exactly once in the kernel.
    """

    module: str
    kernel: str
    kind: str
    old: str
    new: str
    test: str
    quick: bool = False

    @property
    def name(self):
        return f"{self.kernel}: {self.kind}"


def bugs_of(module, kernel, *lines):
    return [Mutation(module, kernel, *line) for line in lines]


def tests_of(file):
    return lambda name: f"tests/triton/test_{file}.py::test_{name}"
