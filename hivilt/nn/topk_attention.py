"""Attention on hivilt.ops.topk_attention: dense with topk=None, else each query keeps its best keys.

Only what happens between the projections is replaced; the rest is the plain twin's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import policy
from ..ops import topk_attention
from ..ops._topk_attention_rows import TOPK_ATTENTION
from ..reference import modules as plain
from ..reference.modules import topk_attention as twin
from ..reference.modules.topk_attention import as_bias, check_options

__all__ = ["MultiheadAttention", "as_bias", "check_options", "dense_attention"]


class MultiheadAttention(plain.MultiheadAttention):
    """The twin on one operator.

    Where no kernel exists for a dense call (float64, head width above 256), torch's own attention does the work.

    Cost beside the projections: 2 B (L S E + kept pairs E) flops, O(B H L topk) memory; need_weights: O(B H L S).
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        if self.topk is None and not call.get("return_lse"):
            return dense_attention(q, k, v, **call)
        return topk_attention(q, k, v, self.topk, axis=self.axis, **call)


@torch.compiler.assume_constant_result
def kernel_exists(device: str, dtype: torch.dtype, width: int) -> bool:
    """Whether a dense call is worth the operator: not where its only row would be the reference, unless asked for."""
    if policy(None) != "auto":
        return True
    x = torch.empty((0, 1, 1, width), dtype=dtype, device=device)
    operator = (x, x, x, -1, 0, *(None,) * 8, 1.0, 0.0)
    rows = (row for name, row in TOPK_ATTENTION.rows.items() if name != "reference")
    return any(row.why_not(*operator) is None for row in rows)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """hivilt.ops.topk_attention without topk, or torch's own attention where no kernel takes the call."""
    masks = {"attn_mask": attn_mask, "key_mask": key_mask, "query_mask": query_mask}
    if kernel_exists(query.device.type, query.dtype, max(query.shape[-1], value.shape[-1])):
        return topk_attention(query, key, value, scale=scale, dropout_p=dropout_p, **masks)
    return twin.dense_attention(query, key, value, **masks, scale=scale, dropout_p=dropout_p)
