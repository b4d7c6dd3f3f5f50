"""Test which methods work on which architecture, with tiny models.

Each cell tests one task, such as training, saving or merging. The compatibility table and ``peftkit check`` run the cells.
"""

from peftkit.compatibility.cells import CELLS, Case, Outcome, run_cells
from peftkit.compatibility.methods import METHODS
from peftkit.compatibility.tiny import family_case, tiny_model

__all__ = ["CELLS", "METHODS", "Case", "Outcome", "family_case", "run_cells", "tiny_model"]
