"""The layer of BLIP-2's Q-Former on hivilt.ops.topk_attention."""

from __future__ import annotations

from ..reference import modules as plain
from ._heads import attend


class QFormerMultiHeadAttention(plain.QFormerMultiHeadAttention):
    """The twin; shared queries are read where they lie, and the scores are never in memory."""

    _attend = staticmethod(attend)


class QFormerLayer(plain.QFormerLayer):
    """The twin; its attentions are hivilt.nn.QFormerMultiHeadAttention."""

    attention_class = QFormerMultiHeadAttention
