"""Window attention on torch's own attention, which serves such small windows better: figures in docs/models.md.

A bias of [H, T, T] with T = 49 fits any cache, so what a kernel of ours could save is small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._running import records
from ..reference import modules as plain
from ..reference.modules.window_attention import same_region


class WindowAttention(plain.WindowAttention):
    """The twin; on the CPU it differs where no gradient is recorded: no T x T matrix of scores is in memory then."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, dropout_p: float
    ) -> Tensor:
        if q.is_cpu and records(q, k, v, bias):  # with a gradient of the bias torch writes the scores out as well
            return super()._attend(q, k, v, bias, regions, dropout_p)
        B, windows = q.shape[:2]
        mask = bias.to(q.dtype)[None]
        if regions is not None:
            mask = torch.where(same_region(regions)[:, None], mask, -torch.inf)
            mask = mask.expand(B, -1, -1, -1, -1).flatten(0, 1)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return out.unflatten(0, (B, windows))


class SwinBlock(plain.SwinBlock):
    """The twin; its attention is hivilt.nn.WindowAttention."""

    attention = WindowAttention
