"""The block of vision transformers, attending with hivilt.ops.topk_attention."""

from __future__ import annotations

from ..reference import modules as plain
from ._heads import attend


class SelfAttention(plain.SelfAttention):
    """The twin; no N x N matrix is in memory, forward or backward."""

    _attend = staticmethod(attend)


class VisionBlock(plain.VisionBlock):
    """The twin; its attention is hivilt.nn.SelfAttention."""

    attention = SelfAttention
