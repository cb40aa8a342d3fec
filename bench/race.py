"""One race: every rival of a group is judged, weighed, then timed in turn with the others. Tests read the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import memory
import pytest
import torch
from gate import Gate
from interleave import CLOCK, others_at_work, quartiles, ratio, take_turns
from rivals import Case, draw, hivilt_backend, runner
from roofline import Cost, Peak

BASELINES = ("eager", "sdpa", "floor", "hivilt_fp32", "normal")


@dataclass
class Settings:
    """What all races of a session share."""

    threads: int
    rounds: int | None
    peak: Peak
    machine: dict[str, Any]
    weigh: bool = True


@dataclass
class Outcome:
    """Samples and facts of every rival that ran; why the others did not."""

    title: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, AssertionError] = field(default_factory=dict)

    def hand_over(self, benchmark, label: str) -> None:
        """Gives pytest-benchmark the samples and facts of one rival, or skips or fails its test."""
        if label in self.failed:
            raise self.failed[label]
        if label in self.skipped:
            pytest.skip(self.skipped[label])
        benchmark.group = self.title
        benchmark.extra_info.update(self.facts[label])
        CLOCK.replay(benchmark, self.samples[label])


def wait_for(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def run_race(title: str, entries: dict[str, tuple[str, Case]], seconds: float, settings: Settings) -> Outcome:
    """Races the entries, label -> (rival, case). A rival with a wrong result is not timed."""
    outcome, calls = Outcome(title), {}
    drawn: dict[Case, tuple[dict, Gate]] = {}
    for label, (name, case) in entries.items():
        if name == "hivilt" and hivilt_backend(case.device) is None:
            outcome.skipped[label] = f"no hivilt kernel for {case.device} here (python -m hivilt.info says why)"
            continue
        if case not in drawn:
            x = draw(case)
            drawn[case] = x, Gate(case, x)
        x, gate = drawn[case]
        try:
            run = runner(name, case, x)
            if name == "compile":
                run()
        except Exception as error:
            if name != "compile":
                raise
            outcome.skipped[label] = f"torch.compile cannot compile here: {str(error).splitlines()[0]}"
            continue
        try:
            results = run()
            errors = gate.check(name, results)
        except AssertionError as error:
            outcome.failed[label] = error
            continue
        calls[label] = run
        outcome.facts[label] = {
            "case": str(case), "rival": name, "direction": case.direction, "max_error": errors,
            "output_bytes": sum(t.numel() * t.element_size() for t in results),
            "peak_bytes": memory.peak_bytes(name, case, settings.threads) if settings.weigh else None,
        }  # fmt: skip
        del results
    drawn.clear()
    if calls:
        with others_at_work() as share:
            device = next(iter(entries.values()))[1].device
            outcome.samples = take_turns(calls, seconds=seconds, rounds=settings.rounds, wait=wait_for(device))
        for label, samples in outcome.samples.items():
            name, case = entries[label]
            cost = case_cost(name, case)
            settle(outcome, label, samples, cost, settings, share())
    return outcome


def case_cost(name: str, case: Case) -> Cost:
    """What the rival's own operation must at least do: dense attention for sdpa, the matrix product for the floor."""
    return case.scores_cost() if name == "floor" else case.cost(dense=name == "sdpa")


def settle(outcome: Outcome, label: str, samples: list[float], cost: Cost, settings: Settings, busy: float) -> None:
    """Adds what only the samples tell to the facts of a rival."""
    facts = outcome.facts.setdefault(label, {})
    facts |= {
        f"ratio_vs_{other}": ratio(outcome.samples[other], samples)
        for other in BASELINES
        if other in outcome.samples and other != label
    }
    torch_s = settings.peak.torch_s(cost)
    facts |= {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "torch_s": torch_s,
        "speed_vs_torch": torch_s / quartiles(samples)["median"],
        "busy_others": round(busy, 3),
        "machine": settings.machine,
    }
