"""One race: every rival of a group is judged, weighed, then timed in turn with the others. Tests read the outcome."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import family
import gpu_rivals  # its rivals enter rivals.RIVALS
import memory
import pytest
import torch
from device import LIKE_GPU
from gate import Gate
from interleave import CLOCK, others_at_work, quartiles, ratio, take_turns
from roofline import Cost, Peak
from stopwatch import stopwatch

import hivilt

BASELINES = (
    "eager", "permute", "compile", "chunked", "deterministic", "sdpa", "flash", "cudnn", "faiss", "faiss_blas", "floor",
    "gemm", "copy", "hivilt_fp32", "normal",
)  # fmt: skip
Case = Any  # of any module that family.py knows to ask


@dataclass
class Settings:
    """What all races of a session share."""

    threads: int
    rounds: int | None
    peak: Peak
    machine: dict[str, Any]
    weigh: bool = True
    until: float = float("inf")  # seconds since the epoch, after which no race starts


@dataclass
class Outcome:
    """Samples and facts of every rival that ran; why the others did not."""

    title: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def hand_over(self, benchmark, label: str) -> None:
        """Gives pytest-benchmark the samples and facts of one rival, or skips or fails its test."""
        if label in self.failed:
            raise self.failed[label]
        if label in self.skipped:
            pytest.skip(self.skipped[label])
        benchmark.group = self.title
        benchmark.extra_info.update(self.facts[label])
        CLOCK.replay(benchmark, self.samples[label])


class WarmUp:
    """In place of an outcome: calls a rival once, so that a later session finds in its caches what it compiles."""

    last: tuple[Case | None, dict] = (None, {})  # drawing the inputs may take longer than compiling

    def __init__(self, entries: dict[str, tuple[str, Case]]):
        self.entries = entries

    def hand_over(self, benchmark, label: str) -> None:
        name, case = self.entries[label]
        if name in ("compile", "flex", "hivilt"):
            if WarmUp.last[0] != case:
                WarmUp.last = case, family.of(case).draw(case)
            first_call(name, case, WarmUp.last[1])
        pytest.skip("warmed up")


class Refusal(Exception):
    """A rival that does not run here; the text is the reason."""


def first_call(name: str, case: Case, x: dict) -> tuple[Callable[[], tuple], tuple]:
    """The call that is to be timed, and what it computes. Raises Refusal for a rival that may have no kernel here."""
    runner = family.of(case).runner
    if name not in family.of(case).MAY_REFUSE:
        run = runner(name, case, x)
        return run, run()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # the backends of scaled_dot_product_attention explain themselves so
        try:
            run = runner(name, case, x)
            return run, run()
        except Exception as error:
            what = "torch.compile cannot compile here" if name == "compile" else type(error).__name__
            why = [str(w.message).split(" (Triggered", 1)[0] for w in said if issubclass(w.category, UserWarning)]
            raise Refusal("; ".join([f"{what}: {first_line(error)}", *why])) from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no text"])[0]


def run_race(title: str, entries: dict[str, tuple[str, Case]], seconds: float, settings: Settings) -> Outcome:
    """Races the entries, label -> (rival, case). A rival with a wrong result is not timed."""
    outcome, calls = Outcome(title), {}
    drawn: dict[Case, tuple[dict, Any]] = {}
    if time.time() > settings.until:
        outcome.skipped = dict.fromkeys(entries, "no time was left for this race")
        return outcome
    for label, (name, case) in entries.items():
        kind = family.of(case)
        if name in kind.MAY_REFUSE and time.time() > settings.until:  # the others make a race without it
            outcome.skipped[label] = "no time was left for this rival"
            continue
        if name == "hivilt" and kind.hivilt_backend(case.device) is None:
            outcome.skipped[label] = f"no hivilt kernel for {case.device} here (python -m hivilt.info says why)"
            continue
        if case not in drawn:
            x = kind.draw(case)
            drawn[case] = x, getattr(kind, "Gate", Gate)(case, x)
        x, gate = drawn[case]
        try:
            run, results = first_call(name, case, x)
            errors = gate.check(name, results)
        except Refusal as why:
            outcome.skipped[label] = str(why)
            continue
        except torch.OutOfMemoryError as error:
            outcome.skipped[label] = f"not enough memory: {first_line(error)}"
            continue
        except Exception as error:
            if isinstance(error, AssertionError) and name in kind.MAY_REFUSE and LIKE_GPU:
                # A kernel of torch's own, some of which are known to be wrong: news, but no failure of ours.
                outcome.skipped[label] = f"wrong result, not timed: {first_line(error)}"
            else:
                outcome.failed[label] = error
            continue
        calls[label] = run
        outcome.facts[label] = {
            "case": str(case), "rival": name, "direction": case.direction, "max_error": errors,
            "output_bytes": sum(t.numel() * t.element_size() for t in results),
            "peak_bytes": memory.peak_bytes(name, case, settings.threads, run) if settings.weigh else None,
        }  # fmt: skip
        if LIKE_GPU:
            outcome.facts[label] |= {"ran": what_ran(name), "left_out": outcome.skipped}
        del results
    drawn.clear()
    if calls:
        with others_at_work() as share:
            outcome.samples = take_turns(calls, seconds=seconds, rounds=settings.rounds, stopwatch=stopwatch())
        for label, samples in outcome.samples.items():
            name, case = entries[label]
            cost = family.of(case).case_cost(name, case)
            settle(outcome, label, samples, cost, settings, share())
    return outcome


def what_ran(name: str) -> str:
    """The implementation behind a rival's first call, which has just been made."""
    if name == "hivilt":
        return f"hivilt backend {hivilt.last_backend()}"
    backend = gpu_rivals.FUSED.get(name.removesuffix("_masked"))
    return f"scaled_dot_product_attention on {backend.name} alone" if backend else name


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
