"""What the benchmarks run on: the GPU, the CPU, or a CPU that stands for a GPU in a rehearsal (REHEARSE=1).

Whatever only a GPU has, events, its allocator's figures, the size of its L2, is asked of ``gpu``.  In a rehearsal a
stand-in answers, so that the lines written for a GPU run on a machine without one; what they measure means nothing.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REHEARSED = DEVICE == "cpu" and os.environ.get("REHEARSE") == "1"
LIKE_GPU = DEVICE == "cuda" or REHEARSED  # whose shapes, rivals and stopwatch are used

if REHEARSED:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import interpreter

    interpreter.make_fast()  # as tests/conftest.py does


class StandIn:
    """What the benchmarks use of ``torch.cuda``: events of the CPU's clock, an allocator that holds nothing."""

    class Event:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            assert self.at is not None

        def elapsed_time(self, later: StandIn.Event) -> float:
            return 1e3 * (later.at - self.at)

    def synchronize(self) -> None:
        pass

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1 << 16)


gpu = torch.cuda if DEVICE == "cuda" else StandIn()


def peak_bytes(call, gpu=gpu) -> int:
    """Peak memory of a second call beyond what is allocated before it, its results included."""
    call()
    gpu.synchronize()
    gpu.reset_peak_memory_stats()
    before = gpu.memory_allocated()
    results = call()
    gpu.synchronize()
    del results
    return gpu.max_memory_allocated() - before
