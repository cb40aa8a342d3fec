"""Attention among scales on hivilt.ops.topk_attention, and areas of fused tokens on hivilt.ops.interpolate_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import policy
from ..ops import interpolate_tokens, topk_attention
from ..reference import modules as plain
from ..reference.modules.multi_scale_attention import attend
from ..reference.modules.scale_fusion import Grid
from . import topk_attention as of_attention
from ._choice import kernel_exists
from .scale_fusion import HierarchicalPatchEmbedding

# Queries times keys from which the operator beats torch's attention on a CPU, forward and backward together.  Below,
# what is left is the way into a call, which is shorter in torch.
PAIRS = 1 << 12


@torch.compiler.assume_constant_result
def asked_for() -> bool:
    return policy(None) != "auto"


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """``attend`` by the operator where that is faster, or a backend was asked for; else by torch."""
    device, width = query.device.type, max(query.shape[-1], value.shape[-1])
    pays = device == "cpu" and query.shape[2] * key.shape[2] >= PAIRS
    if not (asked_for() or (pays and of_attention.kernel_exists(device, query.dtype, width))):
        return attend(query, key, value, key_mask, query_mask, dropout_p, scale)
    return topk_attention(query, key, value, key_mask=key_mask, query_mask=query_mask, dropout_p=dropout_p, scale=scale)


class MultiScaleAttention(plain.MultiScaleAttention):
    """The twin; scales of many tokens attend with hivilt.ops.topk_attention, whose backward writes no probabilities.

    Dropout is then counter-based and second derivatives raise.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        return dense(q, k, v, mask, mask, dropout_p)


class CrossScaleAttention(plain.CrossScaleAttention):
    """The twin, on hivilt.ops.topk_attention where there are many tokens."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask, query_mask, dropout_p: float) -> Tensor:
        return dense(q, k, v, key_mask, query_mask, dropout_p)


class ScaleExtraction(plain.ScaleExtraction):
    """The twin; tokens are averaged where they lie, without a transposed copy."""

    def _pool(self, x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        if grid == out_grid or not kernel_exists("interpolate_add", x.device.type, x.dtype):
            return super()._pool(x, grid, out_grid)
        return interpolate_tokens(x, grid, out_grid, mode="area")


class FlashMultiScaleAttention(plain.FlashMultiScaleAttention):
    """The twin, on hivilt.ops.topk_attention where there are many tokens."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dropout_p: float) -> Tensor:
        return dense(q, k, v, key_mask, None, dropout_p, self.scale)


class EfficientScaleProcessor(plain.EfficientScaleProcessor):
    """The twin, of hivilt.nn.HierarchicalPatchEmbedding."""

    embedding = HierarchicalPatchEmbedding
