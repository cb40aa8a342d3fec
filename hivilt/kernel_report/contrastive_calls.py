"""The calls of the contrastive losses whose kernels are compiled; see ``calls.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..triton_kernels import contrastive_loss_launch as launch
from .fusion_calls import DTYPES, blank


@dataclass(frozen=True)
class Contrast:
    """One call of contrastive_loss, forward and backward."""

    batch: int = 4096
    width: int = 512
    dtype: str = "bf16"
    queries: int = 1
    columns: int = 0  # 0: as many as rows; otherwise with labels and without column sums
    siglip: bool = False
    tensors: bool = True  # scale and bias
    kernel: str = ""

    def __str__(self) -> str:
        words = ["contrastive", f"B{self.batch}", f"C{self.width}"]
        words += [f"R{self.queries}"] if self.queries > 1 else []
        words += [f"N{self.columns}"] if self.columns else []
        return "-".join(words + (["siglip"] if self.siglip else []) + ([] if self.tensors else ["numbers"]))

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        dtype, B, N = DTYPES[self.dtype], self.batch, self.columns or self.batch
        x, y = blank(B, self.queries, self.width, dtype=dtype), blank(N, self.width, dtype=dtype)
        scale, bias = (blank(dtype=torch.float32) if self.tensors else None for _ in range(2))
        labels = blank(B, dtype=torch.int64) if self.columns else None
        head = (x, y, scale, 1.0, bias, 0.0, labels)
        kind, columns = "siglip" if self.siglip else "infonce", not (self.siglip or self.columns)
        rows, cols, target = launch.contrastive_loss(*head, columns, kind)
        grads = [torch.empty_like(t) if t.numel() else None for t in (rows, cols, target)]
        launch.contrastive_loss_backward(*head, kind, rows, cols, *grads, True, True)


def contrastive_calls() -> Iterator[Contrast]:
    """The table; what is told apart first comes first."""
    for dtype in DTYPES:
        call = Contrast(dtype=dtype)
        yield from (call, replace(call, siglip=True), replace(call, width=64), replace(call, width=100, batch=50))
        yield replace(call, queries=32, batch=512, width=256)
        yield replace(call, columns=10_000)
    yield Contrast(tensors=False)
    yield Contrast(batch=32_768, kernel="_contrast_")
