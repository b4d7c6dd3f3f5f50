"""What a bug planted into a kernel is; ``mutations.py`` and ``mutations_of_weights.py`` have a line for each."""

from dataclasses import dataclass

KINDS = ("stride", "mask", "scale", "tile", "race", "int32", "rule")
"""A wrong stride, a missing mask, a dropped factor, a tile too few or too many, two programs storing to one place, a row offset in
int32, another rule (a term or a mask that is not the definition's)."""


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` becomes ``new`` in ``kernel`` of ``module`` (below ``peftkit_kernels``), noticed by ``test``.

    ``old`` has to occur exactly once in the kernel.
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
