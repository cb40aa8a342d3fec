"""A pytest plugin (``-p gpu_tests``) for as many tests as fit into a given time, whatever happens to the process.

No test is started late, and --breadth-first takes one parametrisation of every test function, then another of each.
Every start and every outcome goes to a file at once: after a crash, or a kernel that hangs, a second process with the
same file goes on behind the test that was running.  Random cases stop after some seconds per test, because each of them
makes Triton compile its kernels anew.  Each is judged; how all of them compare with plain PyTorch is then left open.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from record import read, write

import hivilt.testing

LOST = 86  # exit status after which no test of this process could say anything


def pytest_addoption(parser):
    group = parser.getgroup("hivilt on a GPU")
    group.addoption("--record", type=Path, required=True, help="file of starts and outcomes, a JSON object per line")
    group.addoption("--breadth-first", action="store_true", help="one of each test function, then another of each")
    group.addoption("--share", default="1/1", help="2/8: every eighth test, from the second on")
    group.addoption("--start-until", type=float, default=float("inf"), help="seconds since the epoch: no later start")
    group.addoption("--case-seconds", type=float, default=None, help="random cases of one test stop after so long")


def pytest_configure(config):
    seconds = config.getoption("case_seconds")
    if seconds is not None:
        hivilt.testing.cases = Some(hivilt.testing.cases, seconds)
        hivilt.testing.Tally.assert_no_worse = hivilt.testing.cases.enough(hivilt.testing.Tally.assert_no_worse)


class Some:
    """``hivilt.testing.cases``, for ``seconds`` at a time."""

    def __init__(self, every: Callable, seconds: float):
        self.every, self.seconds, self.cut = every, seconds, False

    def __call__(self, *args, **keywords):
        start, self.cut = time.monotonic(), False
        for case in self.every(*args, **keywords):
            if time.monotonic() - start > self.seconds:
                self.cut = True
                return
            yield case

    def enough(self, compare: Callable) -> Callable:
        """The largest error of a few cases beside that of plain PyTorch is a matter of luck."""
        return lambda *args, **keywords: None if self.cut else compare(*args, **keywords)


def breadth_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """One of each function, then another of each; which ones come first is random and always the same."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[", 1)[0], []).append(item)
    for group in functions.values():
        random.Random(0).shuffle(group)
    longest = max(map(len, functions.values()), default=0)
    return [group[i] for i in range(longest) for group in functions.values() if i < len(group)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    number, of = map(int, config.getoption("share").split("/"))
    started = {line.get("test") for line in read(config.getoption("record"))}
    order = breadth_first(items) if config.getoption("breadth_first") else items
    items[:] = [item for item in order[number - 1 :: of] if item.nodeid not in started]


def note(config, **line) -> None:
    write(config.getoption("record"), **line)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    late = time.time() > item.config.getoption("start_until")
    note(item.config, test=item.nodeid, outcome="not reached" if late else "started", at=time.time())
    return True if late else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Asks after every test, so that the one which did it is the one that is blamed."""
    if context_is_lost():
        note(item.config, test=item.nodeid, outcome="lost the GPU")
        pytest.exit("the GPU answers this process no more", returncode=LOST)


def pytest_sessionfinish(session, exitstatus):
    if exitstatus != LOST:  # then another process goes on
        note(session.config, end=int(exitstatus))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        note(item.config, test=item.nodeid, outcome="failed", why=report.longreprtext[-3000:], seconds=report.duration)
    elif report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        note(item.config, test=item.nodeid, outcome="skipped", why=why)
    elif report.when == "call":
        note(item.config, test=item.nodeid, outcome="passed", seconds=report.duration)
    return report


def context_is_lost() -> bool:
    """Whether a kernel has done what ends a CUDA context: then every call after it fails, whoever makes it."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
