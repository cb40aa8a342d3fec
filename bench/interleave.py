"""Times rivals in turn, A B C B A C ..., so that a ratio compares two calls of the same moment on the same machine.

pytest-benchmark times one test after the other.  Here all rivals of a group are timed in one sitting, and each test
hands its own samples to pytest-benchmark through a clock that replays them; its statistics then are of those samples.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from stopwatch import Clock, Events

MIN_ROUNDS, MAX_ROUNDS = 9, 80


class ReplayClock:
    """A timer for ``pytest.mark.benchmark(timer=...)`` that moves by the samples it was given, and only by those."""

    __name__ = "samples taken in turn with the rivals"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, samples: list[float]) -> None:
        """Makes ``benchmark`` record these samples, in seconds."""
        left = iter(samples)

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, rounds=len(samples))


CLOCK = ReplayClock()


def take_turns(
    rivals: dict[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int | None = None,
    calls: int = 1,
    stopwatch: Clock | Events | None = None,
) -> dict[str, list[float]]:
    """Samples, in seconds per call, of every rival: entry i of each list was taken in round i.

    Args:
        seconds: how long to go on, within MIN_ROUNDS and MAX_ROUNDS.
        rounds: that many instead.
        calls: how often a rival is called per sample.
        stopwatch: takes a sample; the CPU's clock by default.

    The order within a round is shuffled, because the call before leaves its caches and waiting threads behind.
    """
    shuffle = random.Random(0).shuffle
    stopwatch = stopwatch or Clock()
    order = list(rivals)
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        stopwatch.warm_up(run, calls)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        least, most = (MIN_ROUNDS, MAX_ROUNDS) if rounds is None else (rounds, rounds)
        start, done = time.perf_counter(), 0
        while done < least or (done < most and time.perf_counter() - start < seconds):
            shuffle(order)
            for name in order:
                samples[name].append(stopwatch.time(rivals[name], calls))
            done += 1
    finally:
        if collects:
            gc.enable()
    return samples


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratio(rival: list[float], ours: list[float]) -> dict[str, float]:
    """Quartiles of rival / ours round by round: how many times faster ours is; below 1 it is slower."""
    return quartiles([a / b for a, b in zip(rival, ours, strict=True)])


@contextmanager
def others_at_work() -> Iterator[Callable[[], float]]:
    """Yields a function: share of all CPUs that anyone but this process used meanwhile, once the block is left."""

    def used() -> tuple[float, float, float]:
        cpu, mine = psutil.cpu_times(), os.times()
        idle = cpu.idle + getattr(cpu, "iowait", 0.0)
        return sum(cpu[:8]) - idle, mine.user + mine.system, time.perf_counter()

    before, after = used(), None

    def share() -> float:
        busy, mine, elapsed = (b - a for a, b in zip(before, after or used(), strict=True))
        return max(0.0, busy - mine) / max(1e-9, elapsed * psutil.cpu_count())

    yield share
    after = used()
