"""Top-k attention against what people use today, one group per shape, direction and dtype; see rivals.py for names."""

from __future__ import annotations

from dataclasses import replace

import gpu_targets
import pytest
from device import DEVICE, LIKE_GPU, REHEARSED
from interleave import CLOCK
from rivals import Case

if LIKE_GPU:
    sizes = gpu_targets.REHEARSAL if REHEARSED else gpu_targets.SHAPES
    SHAPES = [Case(*shape, dtype=gpu_targets.DTYPE, device=DEVICE) for shape in sizes.values()]
else:
    SHAPES = [
        Case(8, 12, 196, 64, 64, 16),  # one ViT image against a sentence
        Case(4, 12, 1024, 512, 64, 32),  # a fine image against a long text
        Case(1, 12, 2048, 2048, 64, 64),  # two long sequences
    ]
MIDDLE = SHAPES[1]

# Kind of race -> rivals, seconds.  On a GPU each backend of scaled_dot_product_attention is a rival of its own.
if LIKE_GPU:
    FUSED, MASKED = "flash efficient cudnn math", "efficient_masked cudnn_masked math_masked"
    RACES = {
        "forward": (f"eager compile flex {FUSED} {MASKED} hivilt floor", 1.0),
        "forward+backward": (f"eager compile flex {FUSED} {MASKED} hivilt", 1.0),
        "queries": ("eager flash hivilt", 0.5),
        "shared": (f"eager flash {MASKED} hivilt", 0.5),
        "dense": (f"eager {FUSED} hivilt", 0.5),
        "data": ("", 0.5),
    }
else:
    RACES = {
        "forward": ("eager compile sdpa hivilt floor", 6),
        "forward+backward": ("eager compile sdpa hivilt", 9),
        "queries": ("eager sdpa hivilt", 4),
        "shared": ("eager sdpa_masked sdpa hivilt", 4),
        "dense": ("eager sdpa hivilt", 3),
        "data": ("", 3),
    }
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
    GROUPS[title] = {kind: ("hivilt", replace(case, data=kind)) for kind in kinds}, RACES["data"][1]
    return title


@pairs(*(group(case, *RACES["forward"]) for case in SHAPES))
def bench_topk_attention_forward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(case, backward=True), *RACES["forward+backward"]) for case in SHAPES))
def bench_topk_attention_forward_backward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


if LIKE_GPU:

    @pairs(group(replace(MIDDLE, dtype="fp32"), "eager efficient math hivilt", 0.5))
    def bench_topk_attention_fp32(benchmark, race, title, rival):
        race(title, *GROUPS[title]).hand_over(benchmark, rival)

else:

    @pairs(*(half(case) for case in SHAPES))
    def bench_topk_attention_bf16(benchmark, race, title, rival):
        race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, axis="queries", backward=b), *RACES["queries"]) for b in (False, True)))
def bench_topk_attention_axis_queries(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, shared=768, backward=b), *RACES["shared"]) for b in (False, True)))
def bench_topk_attention_shared_selection(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(replace(MIDDLE, topk=None, backward=b), *RACES["dense"]) for b in (False, True)))
def bench_topk_attention_dense(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(kinds_of_data(MIDDLE))
def bench_topk_attention_data(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)
