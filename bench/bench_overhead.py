"""What one call costs when there is nothing to compute: microseconds beyond torch.mul, the plainest operator of torch.

kernel is the C++ operator (on a GPU what launches the Triton kernels), operator the one above it that chooses the
backend, hivilt the public function, which checks its arguments.  sdpa stands for any attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, LIKE_GPU, REHEARSED
from interleave import CLOCK, others_at_work, quartiles, take_turns
from race import Outcome
from rivals import hivilt_backend
from stopwatch import host_stopwatch

import hivilt
from hivilt.ops._topk_attention_rows import TOPK_ATTENTION
from hivilt.testing import judge

DIRECTIONS = ("no-grad", "grad", "grad+backward")
RIVALS = ("mul", "sdpa", "kernel", "operator", "hivilt")
CALLS = 5 if REHEARSED else 50
pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.timeout(300)]


def calls(direction: str) -> dict[str, Callable[[], object]]:
    """One query, one key, one head: what is left is the way to the kernel and back."""
    x = [torch.randn(1, 1, 1, 8, device=DEVICE).requires_grad_(direction != "no-grad") for _ in range(3)]
    backend, operator = hivilt_backend(DEVICE), torch.ops.hivilt.topk_attention.default
    if LIKE_GPU:
        kernel = TOPK_ATTENTION.rows[backend].run if backend else None
    else:
        kernel = torch.ops.hivilt.topk_attention_cpu.default
    rest = (-1, 0, *(None,) * 8, 0.35, 0.0)
    forward = {
        "mul": lambda: torch.mul(x[0], x[1]),
        "sdpa": lambda: F.scaled_dot_product_attention(*x),
        "kernel": lambda: kernel(*x, *rest),
        "operator": lambda: operator(*x, *rest, ""),
        "hivilt": lambda: hivilt.ops.topk_attention(*x, 1),
    }
    if backend is None:  # the reference does other things than the kernels' way in
        forward = {name: forward[name] for name in ("mul", "sdpa")}
    if direction == "no-grad":
        return forward
    forward = {name: run for name, run in forward.items() if name not in ("kernel", "operator")}  # they record nothing
    if direction == "grad":
        return forward
    ones = torch.ones(1, 1, 1, 8, device=DEVICE)
    used = {"mul": x[:2], "sdpa": x, "hivilt": x}
    return {
        name: (lambda run=run, to=used[name]: torch.autograd.grad(run(), to, ones)) for name, run in forward.items()
    }


@pytest.fixture(scope="session")
def overheads(settings):
    """``overheads(direction)`` -> Outcome; run once, for the first of its tests."""
    outcomes: dict[str, Outcome] = {}

    def once(direction: str) -> Outcome:
        if direction in outcomes:
            return outcomes[direction]
        outcome = outcomes[direction] = Outcome(f"overhead {direction} {DEVICE}")
        x = torch.randn(3, 1, 1, 1, 8, device=DEVICE)
        inputs = {"query": x[0], "key": x[1], "value": x[2], "topk": 1}
        # The choice of a backend is part of the call, except that a CPU which stands for a GPU would choose its own.
        asked = hivilt.use_backend(hivilt_backend(DEVICE)) if REHEARSED else contextlib.nullcontext()
        with asked, others_at_work() as share:
            judge(hivilt.ops.topk_attention, inputs, backward=True, what=outcome.title)
            outcome.samples = take_turns(
                calls(direction), seconds=2, rounds=settings.rounds, calls=CALLS, stopwatch=host_stopwatch()
            )
        for name, samples in outcome.samples.items():
            beyond = [1e6 * (a - b) for a, b in zip(samples, outcome.samples["mul"], strict=True)]
            outcome.facts[name] = {
                "rival": name, "direction": direction, "us_beyond_mul": quartiles(beyond),
                "busy_others": round(share(), 3), "machine": settings.machine,
            }  # fmt: skip
        return outcome

    return once


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_overhead_call(benchmark, overheads, direction, rival):
    outcome = overheads(direction)
    if rival not in outcome.samples:
        below = rival in ("kernel", "operator") and hivilt_backend(DEVICE) is not None
        outcome.skipped[rival] = "records no gradient" if below else f"no hivilt kernel for {DEVICE} here"
    outcome.hand_over(benchmark, rival)
