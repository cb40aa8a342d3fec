"""A race knows its rivals by the class of its case: they are drawn, run, judged and counted by that class's module."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def of(case: Any) -> ModuleType:
    """Its draw, runner, hivilt_backend, case_cost, MAY_REFUSE, and a Gate where it has one of its own."""
    return sys.modules[type(case).__module__]
