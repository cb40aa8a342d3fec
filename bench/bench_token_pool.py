"""token_pool against the module as it is written in plain PyTorch; see fusion_rivals.py for names."""

from __future__ import annotations

import pytest
from device import DEVICE, LIKE_GPU, REHEARSED
from fusion_rivals import Case, Pool
from interleave import CLOCK

SHAPES = [(1, 20, 8)] if REHEARSED else [(64, 3136, 192)] if LIKE_GPU else [(8, 3136, 192), (1, 196, 192)]
RIVALS, SECONDS = "eager compile hivilt gemm copy", 4.0
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
]
GROUPS: dict[str, dict[str, tuple[str, Case]]] = {}
for B, N, C in SHAPES:
    for direction in ("inference", "forward+backward"):
        for dtype in ("bf16",) if LIKE_GPU else ("fp32", "bf16") if B > 1 else ("fp32",):
            case = Pool(B=B, N=N, C=C, direction=direction, dtype=dtype, device=DEVICE)
            GROUPS[f"token_pool {direction} {case}"] = {name: (name, case) for name in RIVALS.split()}


@pytest.mark.parametrize(
    "title, rival",
    [
        pytest.param(title, label, id=f"{title.split()[-1]}-{entries[label][1].direction}-{label}")
        for title, entries in GROUPS.items()
        for label in entries
    ],
)
def bench_token_pool(benchmark, race, title, rival):
    race(title, GROUPS[title], SECONDS).hand_over(benchmark, rival)
