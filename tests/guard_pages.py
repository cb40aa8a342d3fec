"""Runs calls on tensors that end, or begin, at a page that faults when touched, in a process that may die of it."""

from __future__ import annotations

from pathlib import Path

import fresh
import pytest

PREAMBLE = """
import sys, torch, hivilt, hivilt.testing as t
tests, backend, at = sys.argv[1:]
sys.path.insert(0, tests)
ops, count = hivilt.ops, 0
def guard(x):
    return {n: t.guarded(v, at) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
"""


def survives(script: str, count: int, where: tuple[str, str], at: str) -> None:
    """``script`` finds ``backend``, ``at`` (which end of a tensor the page is at), ``ops``, ``t`` and ``guard`` (of a
    dict of arguments), and adds 1 to ``count`` after each of its ``count`` cases."""
    backend, device = where
    if device != "cpu":
        pytest.skip("guard pages are host memory")
    whole = f'{PREAMBLE}{script}print("survived", count)\n'
    done = fresh.run(whole, str(Path(__file__).parent), backend, at, timeout=240)
    assert done.stdout.strip() == f"survived {count}", f"exit {done.returncode}\n{done.stdout}{done.stderr[-3000:]}"
