"""Progressive fusion on hivilt.ops.interpolate_add: a level and the resized level before it are added in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import interpolate_add
from ..reference import modules as plain
from ..reference.modules.scale_fusion import Grid
from ._choice import kernel_exists
from .topk_attention import MultiheadAttention


class ProgressiveFusion(plain.ProgressiveFusion):
    """The twin; its default stages attend with hivilt.nn.MultiheadAttention.

    Cost beside the stages: one pass over each level (with interp="grid" and text, two).
    """

    attention = MultiheadAttention

    def _add(self, fused: Tensor, previous: Tensor, scale: Tensor, grid: Grid, previous_grid: Grid) -> Tensor:
        n, m = math.prod(grid), math.prod(previous_grid)
        texts, previous_texts = fused.shape[1] - n, previous.shape[1] - m
        alike = texts == previous_texts and n > 0 and m > 0
        if not alike or not kernel_exists("interpolate_add", fused.device.type, fused.dtype):
            return super()._add(fused, previous, scale, grid, previous_grid)
        if texts == 0:
            return interpolate_add(fused, previous, scale, grid=previous_grid, out_grid=grid)
        if len(grid) == 1:
            return interpolate_add(fused, previous, scale, segments=((m, n), (texts, texts)))
        vision = interpolate_add(fused[:, :n], previous[:, :m], scale, grid=previous_grid, out_grid=grid)
        return torch.cat([vision, fused[:, n:] + scale * previous[:, m:]], 1)
