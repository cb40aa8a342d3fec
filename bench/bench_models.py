"""HiViT and HiViLT as wholes, inference and a training step: plain, compiled, on kernels; see model_rivals.py."""

from __future__ import annotations

import pytest
from device import DEVICE, LIKE_GPU, REHEARSED
from interleave import CLOCK
from model_rivals import DIRECTIONS, RIVALS, Case, HiViLT, HiViT

if REHEARSED:
    MODELS: list[Case] = [HiViT(B=1, image=32, patch=4, C=16, heads=2, layers=1),
                          HiViLT(B=1, image=16, patch=4, words=6, C=16, heads=2, layers=1)]  # fmt: skip
elif LIKE_GPU:
    MODELS = [HiViT(B=32, image=224, patch=4, C=96, heads=8, layers=12),
              HiViT(B=64, image=224, patch=16, C=192, heads=12, layers=12),
              HiViLT(B=32, image=224, patch=16, words=64, C=512, heads=8, layers=12),
              HiViLT(B=32, image=224, patch=16, words=64, C=512, heads=8, layers=12, topk=16)]  # fmt: skip
else:
    # In the first of each pair attention and fusion take most of the time, in the second the products around them do.
    MODELS = [HiViT(B=1, image=224, patch=4, C=96, heads=6), HiViT(B=8, image=224, patch=16, C=192, heads=12),
              HiViLT(B=4, image=224, patch=8, words=40, C=128, heads=4, layers=1),
              HiViLT(B=4, image=224, patch=8, words=40, C=128, heads=4, layers=1, topk=16)]  # fmt: skip
SECONDS = {"inference": 2.0, "training step": 4.0}
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
]
GROUPS: dict[str, tuple[dict[str, tuple[str, Case]], float]] = {}
for model in MODELS:
    for direction in DIRECTIONS:
        case = type(model)(**{**vars(model), "direction": direction, "device": DEVICE})
        GROUPS[f"{case.operation} {direction} {case}"] = {name: (name, case) for name in RIVALS}, SECONDS[direction]


@pytest.mark.parametrize(
    "title, rival",
    [
        pytest.param(title, label, id=f"{title.split()[0]}-{title.split()[-1]}-{entries[label][1].direction}-{label}")
        for title, (entries, _) in GROUPS.items()
        for label in entries
    ],
)
def bench_models(benchmark, race, title, rival):
    race(title, *GROUPS[title]).hand_over(benchmark, rival)
