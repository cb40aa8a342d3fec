"""The independent judge of every backend: float64 oracle, error budgets, random cases, hostile memory.

Shipped, so that bench and users can hold a kernel to the same figures; imports nothing but torch, numpy and itself.
"""

from .assertions import Tally, assert_topk, assert_within
from .cases import Case, case, cases, check, judge
from .memory import LAYOUTS, guarded, layouts, poison, relayout
from .oracle import TINY, UNIT, Truth, best, dropout_keep, eager, oracle, pairs_from_indices, philox

__all__ = [
    "LAYOUTS",
    "TINY",
    "UNIT",
    "Case",
    "Tally",
    "Truth",
    "assert_topk",
    "assert_within",
    "best",
    "case",
    "cases",
    "check",
    "dropout_keep",
    "eager",
    "guarded",
    "judge",
    "layouts",
    "oracle",
    "pairs_from_indices",
    "philox",
    "poison",
    "relayout",
]
