"""What a session of tests leaves behind, a JSON object per line, also when its process dies; and what it amounts to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

HUNG_S = 60  # a test that was cut short after so long was not merely slow


def read(path: Path) -> list[dict]:
    """The lines of a record; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write(path: Path, **line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@dataclass
class Counts:
    """How many tests ended how, and what there is to say about those that did not pass."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    unfinished: int = 0
    not_reached: int = 0
    failures: list[dict] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)  # of skipped tests

    @property
    def ran(self) -> int:
        return self.passed + self.failed + self.skipped + self.unfinished

    def fail(self, test: str, why: str) -> None:
        self.failed += 1
        self.failures.append({"test": test, "why": why})

    def add(self, lines: list[dict], killed_at: float | None) -> None:
        """Counts a record; ``killed_at``: when its last process was ended from outside, None if it ended by itself."""
        tests: dict[str, list[dict]] = {}
        for line in (line for line in lines if "test" in line):
            tests.setdefault(line["test"], []).append(line)
        last = list(tests)[-1] if tests else None
        for test, said in tests.items():
            outcomes = {line["outcome"]: line for line in said}
            if "lost the GPU" in outcomes:
                self.fail(test, "after it the GPU answered no more\n" + outcomes.get("failed", {}).get("why", ""))
            elif "failed" in outcomes:
                self.fail(test, outcomes["failed"]["why"])
            elif "skipped" in outcomes:
                self.skipped += 1
                why = outcomes["skipped"]["why"]
                self.reasons[why] = self.reasons.get(why, 0) + 1
            elif "passed" in outcomes:
                self.passed += 1
            elif "not reached" in outcomes:
                self.not_reached += 1
            elif test != last or killed_at is None:
                self.fail(test, "the process ended while it ran")
            elif killed_at - outcomes["started"]["at"] > HUNG_S:
                self.fail(test, f"it had not ended after {killed_at - outcomes['started']['at']:.0f} s")
            else:
                self.unfinished += 1
