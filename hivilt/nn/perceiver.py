"""Perceiver resampler on hivilt.ops.topk_attention."""

from __future__ import annotations

from ..reference import modules as plain
from ._heads import attend


class PerceiverAttention(plain.PerceiverAttention):
    """The twin; the scores of latents and keys are never in memory."""

    _attend = staticmethod(attend)


class PerceiverResampler(plain.PerceiverResampler):
    """The twin; its attentions are hivilt.nn.PerceiverAttention."""

    attention = PerceiverAttention
