"""How one sample is taken: by the CPU's clock, or between two events on the GPU with a cold L2."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from device import DEVICE, LIKE_GPU, gpu

FILL_BYTES = 1 << 28 if DEVICE == "cuda" else 1 << 16
MOST_FILLS = 32


class Clock:
    """Seconds per call by the CPU's clock; ``wait`` waits for the device, inside the sample."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait

    def warm_up(self, run: Callable[[], object], calls: int) -> None:
        for _ in range(calls):
            run()
        self.wait()

    def time(self, run: Callable[[], object], calls: int) -> float:
        before = time.perf_counter()
        for _ in range(calls):
            run()
        self.wait()
        return (time.perf_counter() - before) / calls


class Events:
    """Seconds per call on the device, between two events.

    Before them a buffer of at least twice the L2 is written, so that no rival finds its inputs there, and so often that
    the host has queued the whole call before the device comes to it: what is timed is the device, not Python.  The time
    that Python takes is measured by bench_overhead.py.
    """

    def __init__(self, gpu=gpu, device: str = DEVICE):
        self.gpu = gpu
        size = max(FILL_BYTES, 2 * getattr(gpu.get_device_properties(0), "L2_cache_size", 0))
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.fills = 1
        self.fill_s = min(self._host_and_device(self.buffer.zero_) for _ in range(3))

    def _host_and_device(self, run: Callable[[], object]) -> float:
        self.gpu.synchronize()
        start = time.perf_counter()
        run()
        self.gpu.synchronize()
        return time.perf_counter() - start

    def warm_up(self, run: Callable[[], object], calls: int) -> None:
        """Runs twice; the second run tells how long the host takes."""
        run()
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        host_s = time.perf_counter() - start
        self.gpu.synchronize()
        self.fills = max(self.fills, min(MOST_FILLS, 1 + int(2 * host_s / self.fill_s)))

    def time(self, run: Callable[[], object], calls: int) -> float:
        start, end = (self.gpu.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.fills):
            self.buffer.zero_()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def stopwatch() -> Clock | Events:
    """That of the device of this session; one per race."""
    return Events() if LIKE_GPU else Clock()


def host_stopwatch() -> Clock:
    """What a call costs whoever makes it: the CPU's clock, waiting for the device after the last call of a sample."""
    return Clock(gpu.synchronize if LIKE_GPU else lambda: None)
