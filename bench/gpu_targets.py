"""The shapes that are raced on a GPU, and what the kernels are to reach there."""

from __future__ import annotations

from typing import Any, NamedTuple

# B, H, Q, N, D, topk; the second ones stand for the first in a rehearsal, where a kernel is interpreted.
SHAPES = {
    "small": (8, 12, 196, 128, 64, 16),
    "middle": (8, 12, 1024, 512, 64, 32),
    "large": (2, 12, 4096, 4096, 64, 64),
}
REHEARSAL = {"small": (1, 2, 19, 16, 16, 4), "middle": (1, 2, 24, 40, 16, 5), "large": (1, 1, 33, 70, 16, 6)}
DTYPE = "bf16"
MOST_MB = 64


class Target(NamedTuple):
    what: str
    shape: str
    direction: str
    rival: str
    least: float
    variant: str = ""


TARGETS = (
    Target("forward: times faster than eager", "middle", "forward", "eager", 20),
    Target("forward: times the speed of dense flash", "middle", "forward", "flash", 0.35),
    Target("forward: times faster than eager", "large", "forward", "eager", 8),
    Target("forward: times faster than eager", "small", "forward", "eager", 5),
    Target("shared selection, forward: times the speed of dense flash", "middle", "forward", "flash", 0.75, "-shared"),
    Target("forward+backward: times faster than eager", "middle", "forward+backward", "eager", 12),
)


# Of retrieval from a bank, in float32: shapes (B, M, C), and times faster than torch's product and topk (of 100).
BANK_SHAPES = (256, 100_000, 192), (1024, 100_000, 256)
BANK_REHEARSAL = ((2, 300, 8),)
BANK_LEAST = 8


def bank_names(machine: dict[str, Any]) -> list[str]:
    """The shapes of a bank as they stand in the titles of races."""
    shapes, topk = (BANK_REHEARSAL, 5) if machine.get("rehearsal") else (BANK_SHAPES, 100)
    return ["B{}-M{}-C{}-top{}".format(*sizes, topk) for sizes in shapes]


def name(sizes: tuple[int, ...]) -> str:
    """The shape as it stands in the title of a race."""
    return "B{}-H{}-Q{}-N{}-D{}-top{}".format(*sizes)


def names(machine: dict[str, Any]) -> dict[str, str]:
    """The shapes of a session on this machine."""
    return {role: name(sizes) for role, sizes in (REHEARSAL if machine.get("rehearsal") else SHAPES).items()}


def rows(results: Any, ms: Any, spread: Any) -> list[list[str]]:
    """One row per target for report.targets; a race that did not take place says so."""
    shapes, found = names(results.machine), []
    for what, role, direction, rival, least, variant in TARGETS:
        group = f"topk_attention {direction} {shapes[role]}{variant}-{DTYPE}-{results.device}"
        quartiles = results.fact(group, "hivilt", f"ratio_vs_{rival}")
        reached = "not measured" if quartiles is None else "yes" if quartiles["median"] >= least else "no"
        time = f"{ms(results.median(group, 'hivilt'))} ms"
        found.append([what, f"{shapes[role]}{variant}", time, spread(quartiles), f"{least:g}", reached])
    group = f"topk_attention forward {shapes['large']}-{DTYPE}-{results.device}"
    peak, out = (results.fact(group, "hivilt", fact) for fact in ("peak_bytes", "output_bytes"))
    extra = None if peak is None or out is None else (peak - out) / 1e6
    reached = "not measured" if extra is None else "yes" if extra < MOST_MB else "no"
    measured = "-" if extra is None else f"{extra:.1f}"
    what = "forward: MB of memory beyond inputs and result"
    found.append([what, shapes["large"], "-", measured, f"below {MOST_MB}", reached])
    for shape in bank_names(results.machine):
        group = f"bank_retrieval forward {shape}-fp32-{results.device}"
        quartiles = results.fact(group, "hivilt", "ratio_vs_eager")
        reached = "not measured" if quartiles is None else "yes" if quartiles["median"] >= BANK_LEAST else "no"
        time = f"{ms(results.median(group, 'hivilt'))} ms"
        what = "bank_retrieval forward: times faster than eager"
        found.append([what, shape, time, spread(quartiles), f"{BANK_LEAST:g}", reached])
    return found
