"""What an operation must at least do, in flops and bytes, and how long that takes at the speed torch itself reaches.

Flops are a multiply and an add per product; selection only compares and is not counted.  Bytes are each argument read
once and each result written once.  The time is max(flops / speed of torch's big matrix product, bytes / speed of its
copy): no bound where torch's matrix product does not use all of the processor.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Peak(NamedTuple):
    """Of torch on this machine: flops per second of a big matrix product, bytes per second of a big copy."""

    flops: float
    bytes: float

    def torch_s(self, cost: Cost) -> float:
        return max(cost.flops / self.flops, cost.bytes / self.bytes)


def topk_attention_forward(B, H, Q, N, D, kept: int | None, listed: int, C: int = 0, item: int = 4) -> Cost:
    """One forward. ``kept``: pairs per head, None for all; ``listed``: entries of the index lists per head; C: channels
    of the shared selection, after which only the kept pairs need attention scores."""
    pairs = Q * N if kept is None else kept
    scored = pairs if C else Q * N
    flops = 2 * B * H * (scored + pairs) * D + 2 * B * Q * N * C
    numbers = B * H * (2 * Q + 2 * N) * D + B * (Q + N) * C  # query, out, key, value, selection source
    lists = listed * B * (1 if C else H)
    return Cost(flops, item * numbers + 4 * (B * H * Q + lists))


def topk_attention_backward(B, H, Q, N, D, kept: int | None, listed: int, C: int = 0, item: int = 4) -> Cost:
    """One backward: scores again, dP, dQ, dK, dV, all on the kept pairs."""
    pairs = Q * N if kept is None else kept
    numbers = B * H * (4 * Q + 4 * N) * D  # query, out, grad_out, grad_query; key, value and their gradients
    lists = listed * B * (1 if C else H)
    return Cost(2 * B * H * pairs * 5 * D, item * numbers + 4 * (B * H * Q + lists))


def scores(B, H, Q, N, D, item: int = 4) -> Cost:
    """Q K^T alone, written to memory."""
    return Cost(2 * B * H * Q * N * D, item * B * H * (Q * D + N * D + Q * N))


def measure(device: str, dtype: torch.dtype = torch.float32) -> Peak:
    """The best of a few matrix products and copies that fill neither time nor memory."""
    n, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 25)
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))

    def best(run) -> float:
        times = []
        for _ in range(8):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return Peak(2 * n**3 / best(lambda: torch.mm(a, b, out=c)), 2 * size / best(lambda: y.copy_(x)))
