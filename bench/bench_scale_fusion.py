"""Scale fusion, interpolate_add and SegFormer's decode head against plain PyTorch; see fusion_rivals.py for names."""

from __future__ import annotations

import importlib.util

import pytest
from device import DEVICE, LIKE_GPU, REHEARSED
from fusion_rivals import DIRECTIONS, Add, Case, Fusion, Head
from interleave import CLOCK

# (B, side of the finest grid, its channels); three scales, grids and channels halving.
if REHEARSED:
    SHAPES = [(1, 4, 8)]
elif LIKE_GPU:
    SHAPES = [(64, 56, 96), (64, 56, 192), (64, 28, 192), (64, 14, 96), (1, 56, 192)]
else:
    SHAPES = [(8, 56, 96), (8, 56, 192), (16, 28, 256), (1, 56, 192), (1, 14, 96)]
DTYPE = "bf16" if LIKE_GPU else "fp32"
ADD = {"B": 1, "n": 8, "N": 20, "C": 8} if REHEARSED else {"B": 4, "n": 784, "N": 3136, "C": 192}
SECONDS = {"inference": 4.0, "training forward": 4.0, "forward+backward": 6.0}
RIVALS = "eager permute compile deterministic hivilt gemm copy"
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
]

# title -> (label -> (rival, case), seconds of timing)
GROUPS: dict[str, tuple[dict[str, tuple[str, Case]], float]] = {}


def group(case: Case, rivals: str, **others: Case) -> str:
    """Registers the race of these rivals; ``others`` are races of hivilt against itself. Returns its title."""
    title = f"{case.operation} {case.direction} {case}"
    entries = {name: (name, case) for name in rivals.split()} | {n: ("hivilt", c) for n, c in others.items()}
    GROUPS[title] = entries, SECONDS[case.direction] / (4 if LIKE_GPU else 1)
    return title


def pairs(*titles: str):
    """One test per group and label, a group's tests side by side."""
    tests = [
        pytest.param(title, label, id=f"{title.split()[-1]}-{GROUPS[title][0][label][1].direction}-{label}")
        for title in titles
        for label in GROUPS[title][0]
    ]
    return pytest.mark.parametrize("title, rival", tests)


def fusions(direction: str, dtype: str = DTYPE) -> list[Fusion]:
    how = {"direction": direction, "dtype": dtype, "device": DEVICE}
    return [Fusion(B=B, side=side, channels=channels, **how) for B, side, channels in SHAPES]


@pairs(*(group(case, RIVALS) for case in fusions("inference")))
def bench_scale_fusion_inference(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(case, RIVALS) for case in fusions("training forward")))
def bench_scale_fusion_training_forward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(*(group(case, RIVALS) for case in fusions("forward+backward")))
def bench_scale_fusion_forward_backward(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


if not LIKE_GPU:

    @pairs(
        *(
            group(half, "eager hivilt gemm copy", hivilt_fp32=single)
            for direction in DIRECTIONS
            for half, single in zip(fusions(direction, "bf16")[1:3], fusions(direction)[1:3], strict=True)
        )
    )
    def bench_scale_fusion_bf16(benchmark, race, title, rival):
        race(title, *GROUPS[title]).hand_over(benchmark, rival)


@pairs(
    *(
        group(Add(**ADD, direction=direction, dtype=DTYPE, device=DEVICE), "eager compile hivilt copy")
        for direction in ("inference", "forward+backward")
    )
)
def bench_interpolate_add(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)


if importlib.util.find_spec("transformers"):
    IMAGE = 64 if REHEARSED else 512

    @pairs(
        *(
            group(
                Head(B=1, model=model, image=IMAGE, labels=labels, direction=direction, dtype=DTYPE, device=DEVICE),
                rivals,
            )
            for model, labels, direction, rivals in (
                ("B0", 0, "inference", "eager compile hivilt"),
                ("B5", 0, "inference", "eager compile hivilt"),
                ("B0", 0, "forward+backward", "eager hivilt"),
                ("B5", 0, "forward+backward", "eager hivilt"),
                ("B0", 150, "inference", "eager compile hivilt"),
                ("B5", 150, "inference", "eager compile hivilt"),
                ("B0", 150, "forward+backward", "eager hivilt"),
            )
        )
    )
    def bench_segformer_head(benchmark, race, title, rival):
        race(title, *GROUPS[title]).hand_over(benchmark, rival)
