"""What works on which architecture: cells that train, save, merge and so on a tiny model, for the matrix and ``peftkit check``."""

from peftkit.compatibility.cells import CELLS, Case, Outcome, run_cells
from peftkit.compatibility.methods import METHODS
from peftkit.compatibility.tiny import family_case, tiny_model

__all__ = ["CELLS", "METHODS", "Case", "Outcome", "family_case", "run_cells", "tiny_model"]
