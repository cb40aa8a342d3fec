"""Attention between projections, on hivilt.ops.topk_attention."""

from __future__ import annotations

from torch import Tensor

from ..ops import topk_attention
from .topk_attention import dense_attention


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
    """As hivilt.reference.modules has it; dense calls that no kernel takes are torch's own attention."""
    masks = {"attn_mask": attn_mask, "key_mask": key_mask, "dropout_p": dropout_p}
    if topk is None:
        return dense_attention(query, key, value, **masks)
    return topk_attention(query, key, value, topk, **masks)
