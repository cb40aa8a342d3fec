"""What the demos share: tables of several seeds, the folder of pictures, threads."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

SEEDS = (0, 1, 2)


def options(about: str, **more: str) -> argparse.Namespace:
    """``--out``, ``--quick`` and further flags with their help.  Also sets torch to one thread: with tensors as small
    as these more of them mostly wait."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    for name, what in more.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return found


def table(rows: dict[str, list[dict[str, float]]], form: str = "{:.1f}") -> str:
    """A line for each name: the mean over the seeds of each column, and its standard deviation."""
    columns = list(next(iter(rows.values()))[0])
    lines = [" " * 30 + "".join(f"{column:>16}" for column in columns)]
    for name, seeds in rows.items():
        line = f"  {name:<28}"
        for column in columns:
            values = [seed[column] for seed in seeds]
            text = form.format(statistics.mean(values))
            if len(values) > 1:
                text += " ±" + form.format(statistics.stdev(values))
            line += f"{text:>16}"
        lines.append(line)
    return "\n".join(lines)
