"""Top-k attention against what people use today, one group per shape, direction and dtype; see rivals.py for names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interleave import CLOCK
from rivals import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    Case(8, 12, 196, 64, 64, 16, device=DEVICE),  # one ViT image against a sentence
    Case(4, 12, 1024, 512, 64, 32, device=DEVICE),  # a fine image against a long text
    Case(1, 12, 2048, 2048, 64, 64, device=DEVICE),  # two long sequences
]
SMALL, MIDDLE, LARGE = SHAPES
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
]

# title -> (label -> (rival, case), seconds of timing)
GROUPS: dict[str, tuple[dict[str, tuple[str, Case]], float]] = {}


def group(case: Case, rivals: str, seconds: float) -> str:
    """Registers the race of these rivals; returns its title."""
    title = f"topk_attention {case.direction} {case}"
    GROUPS[title] = {name: (name, case) for name in rivals.split()}, seconds
    return title


def pairs(*titles: str):
    """One test per group and label, a group's tests side by side."""
    tests = [
        pytest.param(title, label, id=f"{case}-{case.direction}-{label}")
        for title in titles
        for label, (_, case) in GROUPS[title][0].items()
    ]
    return pytest.mark.parametrize("title, rival", tests)


def half(case: Case) -> str:
    """The race of bf16 against itself in fp32."""
    low = replace(case, dtype="bf16")
    title = group(low, "sdpa hivilt", 3)
    GROUPS[title][0]["hivilt_fp32"] = ("hivilt", case)
    return title


def kinds_of_data(case: Case) -> str:
    """The race of hivilt against itself on other data: selection takes time that depends on what is selected from."""
    title = f"topk_attention data {case}"
    kinds = ("normal", "clustered", "heavy", "tied", "ascending")
    GROUPS[title] = {kind: ("hivilt", replace(case, data=kind)) for kind in kinds}, 3
    return title


@pairs(*(group(case, "eager compile sdpa hivilt floor", 6) for case in SHAPES))
def bench_topk_attention_forward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(case, backward=True), "eager compile sdpa hivilt", 9) for case in SHAPES))
def bench_topk_attention_forward_backward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(half(case) for case in SHAPES))
def bench_topk_attention_bf16(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, axis="queries", backward=b), "eager sdpa hivilt", 4) for b in (False, True)))
def bench_topk_attention_axis_queries(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, shared=768, backward=b), "eager sdpa_masked sdpa hivilt", 4) for b in (False, True)))
def bench_topk_attention_shared_selection(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, topk=None, backward=b), "eager sdpa hivilt", 3) for b in (False, True)))
def bench_topk_attention_dense(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(kinds_of_data(MIDDLE))
def bench_topk_attention_data(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)
