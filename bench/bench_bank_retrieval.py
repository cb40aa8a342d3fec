"""Retrieval from a feature bank against plain PyTorch, FAISS and the matrix product alone; see bank_rivals.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bank_rivals import DIRECTIONS, FAISS, Case
from device import DEVICE, LIKE_GPU, REHEARSED
from interleave import CLOCK

SHAPES = [(2, 300, 8)] if REHEARSED else [(64, 10_000, 192), (256, 100_000, 192), (1024, 100_000, 256)]
SMALL = [] if REHEARSED else [(1, 100_000, 192), (8, 100_000, 192), (16, 100_000, 192)]  # a query at a time, a few
SECONDS = {"forward": 8.0, "forward+backward": 10.0}
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
    pytest.mark.filterwarnings("ignore:.*Swig:DeprecationWarning"),  # inside faiss
]

# title -> (label -> (rival, case), seconds of timing)
GROUPS: dict[str, tuple[dict[str, tuple[str, Case]], float]] = {}


def group(case: Case) -> str:
    """Registers the race of every rival that has this direction; hivilt in each of its precisions."""
    title = f"{case.operation} {case.direction} {case}"
    others = ["eager", "compile"]
    if LIKE_GPU and (case.backward or case.B < SHAPES[0][0]):
        others.remove("compile")  # compiling takes more of a GPU's minutes than all else of such a race
    if not case.backward:
        others += ["floor", *(["faiss", "faiss_blas"] if FAISS else [])]
    entries = {name: (name, case) for name in others} | {"hivilt": ("hivilt", case)}
    entries |= {f"hivilt_{how}": ("hivilt", replace(case, precision=how)) for how in ("fp32", "bf16")}
    if case.B <= 16 and not LIKE_GPU and not case.backward:
        entries["hivilt_int8"] = ("hivilt_int8", case)
    GROUPS[title] = entries, SECONDS[case.direction] / (4 if LIKE_GPU else 1)
    return title


def cases(direction: str, shapes: list[tuple[int, int, int]]) -> list[Case]:
    topk = 5 if REHEARSED else 100
    return [Case(B=B, M=M, C=C, topk=topk, direction=direction, device=DEVICE) for B, M, C in shapes]


def pairs(*titles: str):
    """One test per group and label, a group's tests side by side."""
    tests = [
        pytest.param(title, label, id=f"{title.split()[-1]}-{GROUPS[title][0][label][1].direction}-{label}")
        for title in titles
        for label in GROUPS[title][0]
    ]
    return pytest.mark.parametrize("title, rival", tests)


@pairs(*(group(case) for case in cases(DIRECTIONS[0], SHAPES + SMALL)))
def bench_bank_retrieval_forward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(case) for case in cases(DIRECTIONS[1], SHAPES)))
def bench_bank_retrieval_forward_backward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)
