"""The checks behind promise 3, it never fails silently: matched targets, gradient reach, finite values, strict loading."""

from peftkit.contract.errors import ContractError
from peftkit.contract.loading import check_fits, load_adapter
from peftkit.contract.matching import check_targets, match_targets
from peftkit.contract.training import CheckReport, check

__all__ = [
    "CheckReport",
    "ContractError",
    "check",
    "check_fits",
    "check_targets",
    "load_adapter",
    "match_targets",
]
