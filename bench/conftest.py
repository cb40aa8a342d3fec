"""Sessions of benchmarks: fixed threads, a quiet machine or a warning, the machine's description in every result."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this file

import psutil
import pytest
import torch
from device import DEVICE, LIKE_GPU, REHEARSED
from machine import describe
from race import Outcome, Settings, WarmUp, run_race
from roofline import measure

BUSY = 0.1  # share of all CPUs used by others, above which times are not worth quoting
PATIENCE_S = 20
_settings: Settings | None = None
_busy: dict[str, float] = {}


def pytest_addoption(parser):
    group = parser.getgroup("hivilt benchmarks")
    group.addoption("--threads", type=int, default=2, help="threads of torch and hivilt (default 2, at most the CPUs)")
    group.addoption("--rounds", type=int, default=None, help="rounds of every race; default: as many as are worth it")
    group.addoption("--no-memory", action="store_true", help="leave out peak memory")
    group.addoption("--until", type=float, default=float("inf"), help="seconds since the epoch: no race starts later")
    group.addoption("--warm-up", action="store_true", help="call every rival once and measure nothing")


def pytest_configure(config):
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]


@pytest.fixture(scope="session")
def settings(request) -> Settings:
    """The session's settings; the threads are set and the machine's peaks measured."""
    global _settings
    threads = min(request.config.getoption("threads"), len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    if not REHEARSED:
        wait_until_quiet()
    dtype = torch.bfloat16 if LIKE_GPU else torch.float32
    peak = measure(DEVICE, dtype)
    facts = describe(threads) | {"gflops_of_matmul": peak.flops / 1e9, "gb_per_s_of_copy": peak.bytes / 1e9}
    if LIKE_GPU:
        facts["matmul"] = str(dtype)[6:]
    option = request.config.getoption
    _settings = Settings(threads, option("rounds"), peak, facts, not option("no_memory"), option("until"))
    return _settings


def wait_until_quiet() -> None:
    """Gives a build or a test run that has just ended some time to settle; the races themselves notice what stays."""
    deadline = time.monotonic() + PATIENCE_S
    while psutil.cpu_percent(1.0) > 100 * BUSY and time.monotonic() < deadline:
        pass


@pytest.fixture(scope="session")
def race(request):
    """``race(title, entries, seconds)`` -> Outcome; run once, for the first of its tests."""
    if request.config.getoption("warm_up"):
        return lambda title, entries, seconds: WarmUp(entries)
    settings = request.getfixturevalue("settings")
    outcomes: dict[str, Outcome] = {}

    def once(title: str, entries: dict, seconds: float) -> Outcome:
        if title not in outcomes:
            outcomes[title] = run_race(title, entries, seconds, settings)
            _busy[title] = max((f["busy_others"] for f in outcomes[title].facts.values()), default=0.0)
        return outcomes[title]

    return once


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a host's name says nothing about its speed
    if _settings is not None:
        machine_info["hivilt"] = _settings.machine


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["project"] = "hivilt"  # not the name of the folder it was cloned into


def pytest_terminal_summary(terminalreporter):
    busy = {title: share for title, share in _busy.items() if share > BUSY}
    if busy:
        terminalreporter.section("the machine was busy", sep="-")
        terminalreporter.line(f"Others used more than {BUSY:.0%} of the CPUs during these races; do not quote them:")
        for title, share in busy.items():
            terminalreporter.line(f"  {share:4.0%}  {title}")
