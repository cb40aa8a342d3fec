"""Cross-attention with a cache of projected keys and values on hivilt.ops.topk_attention."""

from __future__ import annotations

from ..reference import modules as plain
from .topk_attention import MultiheadAttention


class CachedCrossAttention(plain.CachedCrossAttention):
    """The twin, whose attention is hivilt.nn.MultiheadAttention."""

    attention = MultiheadAttention
