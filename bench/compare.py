"""python bench/compare.py BEFORE.json AFTER.json: both medians of every benchmark and how many times faster AFTER is.

Refuses to compare two machines.  ``corrected`` divides by how much the rivals that are not ours moved in the same race,
which a change of this package cannot have caused.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from report import Results, ms, table

SAME = ("cpu", "cpus", "isa", "threads", "gpu")  # what must agree
NOTED = ("torch", "python", "hivilt")
NOT_OURS = ("eager", "permute", "deterministic", "sdpa", "sdpa_masked", "faiss", "faiss_blas", "floor", "gemm",
            "copy", "mul")  # fmt: skip


def different(before: Results, after: Results, keys: tuple[str, ...]) -> list[str]:
    """One line for each fact of the machines that differs."""
    return [
        f"{key}: {before.machine.get(key)} before, {after.machine.get(key)} after"
        for key in keys
        if before.machine.get(key) != after.machine.get(key)
    ]


def compare(before: Results, after: Results) -> str:
    """Notes and the table. Raises SystemExit when the machines differ."""
    apart = different(before, after, SAME)
    if apart or not before.machine:
        raise SystemExit(
            "compare: not the same machine; nothing to learn\n  " + "\n  ".join(apart or ["unknown machine"])
        )
    rows, alone = [], []
    for group, rivals in after.groups.items():
        drift = [
            before.median(group, name) / after.median(group, name)
            for name in NOT_OURS
            if name in rivals and before.median(group, name)
        ]
        for name in rivals:
            old, new = before.median(group, name), after.median(group, name)
            if old is None:
                alone.append(f"only after: {group} {name}")
                continue
            corrected = f"{old / new / statistics.geometric_mean(drift):.2f}" if drift and name not in NOT_OURS else ""
            rows.append([group, name, ms(old), ms(new), f"{old / new:.2f}", corrected])
    alone += [
        f"only before: {g} {n}" for g, rivals in before.groups.items() for n in rivals if after.median(g, n) is None
    ]
    notes = [*before.warnings(), *after.warnings(), *different(before, after, NOTED), *alone]
    head = ["race", "rival", "before, ms", "after, ms", "times faster", "corrected"]
    return "\n".join([*notes, table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    asked = parser.parse_args()
    print(compare(Results(asked.before), Results(asked.after)))


if __name__ == "__main__":
    main()
