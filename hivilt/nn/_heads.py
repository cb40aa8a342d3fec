"""Attention between projections, on hivilt.ops.topk_attention."""

from __future__ import annotations

from torch import Tensor

from ..ops import topk_attention
from ..reference.modules import _heads as plain
from .multi_scale_attention import asked_for
from .topk_attention import dense_attention

PAIRS = 1 << 12  # queries times keys below which, on a CPU, torch's own attention is as fast or faster


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """As hivilt.reference.modules has it; dense calls that are small, or that no kernel takes, are torch's own."""
    masks = {"attn_mask": attn_mask, "key_mask": key_mask, "dropout_p": dropout_p}
    if topk is None and query.is_cpu and query.shape[2] * key.shape[2] < PAIRS and not asked_for():
        return plain.attend(query, key, value, **masks)
    if topk is None:
        return dense_attention(query, key, value, **masks)
    return topk_attention(query, key, value, topk, **masks)
