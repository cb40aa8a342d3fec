"""The contrastive loss against plain PyTorch and the matrix product alone; see loss_rivals.py."""

from __future__ import annotations

import pytest
from device import DEVICE, LIKE_GPU, REHEARSED
from interleave import CLOCK
from loss_rivals import Case

SHAPES = [(24, 8)] if REHEARSED else [(8192, 512)] if LIKE_GPU else [(4096, 512), (1024, 256)]
RIVALS, SECONDS = "eager compile chunked hivilt gemm", 12.0
pytestmark = [
    pytest.mark.benchmark(timer=CLOCK),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.compile
]
GROUPS: dict[str, dict[str, tuple[str, Case]]] = {}
for B, C in SHAPES:
    for direction in ("forward", "forward+backward"):
        for dtype in ("bf16",) if LIKE_GPU else ("fp32", "bf16") if B > 1024 else ("fp32",):
            case = Case(B=B, C=C, direction=direction, dtype=dtype, device=DEVICE)
            GROUPS[f"contrastive_loss {direction} {case}"] = {name: (name, case) for name in RIVALS.split()}


@pytest.mark.parametrize(
    "title, rival",
    [
        pytest.param(title, label, id=f"{title.split()[-1]}-{entries[label][1].direction}-{label}")
        for title, entries in GROUPS.items()
        for label in entries
    ],
)
def bench_contrastive_loss(benchmark, race, title, rival):
    race(title, GROUPS[title], SECONDS).hand_over(benchmark, rival)
