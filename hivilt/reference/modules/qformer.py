"""The layer of BLIP-2's querying transformer in plain PyTorch  (arXiv 2301.12597).

A post-norm BERT layer: learned queries and words share the self-attention; only the queries attend to the image, where
the layer has a cross-attention; queries and words have a feed-forward part each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._bank_arguments import check_number
from ._checks import check_choice, check_dropout, check_mask, check_size, check_tokens, refuse
from ._heads import attend, check_heads, check_topk, merge_heads, split_heads
from .vision_block import ACTIVATIONS


class QFormerMultiHeadAttention(nn.Module):
    """Attention with separate projections ``query``, ``key``, ``value`` and none behind.

    Args:
        dim: C; num_heads: divides dim; kv_dim: channels of what is attended to (None: dim).
        dropout: of the probabilities.
        topk: how many keys each query keeps; None: all.
    """

    _attend = staticmethod(attend)

    def __init__(
        self, dim: int, num_heads: int, kv_dim: int | None = None, dropout: float = 0.0, *, topk: int | None = None
    ) -> None:
        super().__init__()
        where = "QFormerMultiHeadAttention"
        check_heads(where, dim, num_heads)
        self.num_heads, self.topk, self.dropout = num_heads, check_topk(where, topk), check_dropout(where, dropout)
        width = dim if kv_dim is None else check_size(where, "kv_dim", kv_dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(width, dim), nn.Linear(width, dim)

    def forward(
        self, x: Tensor, states: Tensor, attn_mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """x [B or 1, Q, C], states [B, N, kv_dim] to [B, Q, C].

        attn_mask: bool, broadcastable to [B, H, Q, N]; key_mask: bool [B, N].  A query without a key gets 0.
        """
        q, k, v = (
            split_heads(f(y), self.num_heads) for f, y in ((self.query, x), (self.key, states), (self.value, states))
        )
        if q.shape[0] != k.shape[0]:  # learned queries that a whole batch shares are projected once
            q = q.expand(k.shape[0], -1, -1, -1)
        dropout_p = self.dropout if self.training else 0.0
        out = self._attend(q, k, v, self.topk, attn_mask=attn_mask, key_mask=key_mask, dropout_p=dropout_p)
        return merge_heads(out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, topk={self.topk}"


class QFormerOutput(nn.Module):
    """norm(residual + dropout(dense(x)))."""

    def __init__(self, width: int, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, dim), nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class QFormerIntermediate(nn.Module):
    """act(dense(x))."""

    def __init__(self, dim: int, width: int, activation: str) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(dim, width), ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class QFormerAttention(nn.Module):
    """``attention`` and, with the residual, ``output``."""

    def __init__(self, attention: nn.Module, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.attention, self.output = attention, QFormerOutput(dim, dim, dropout, eps)

    def forward(self, x: Tensor, states: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
        return self.output(self.attention(x, states, attn_mask, key_mask), x)


class QFormerLayer(nn.Module):
    """One layer of the Q-Former.

    Args:
        dim: C of queries and words; num_heads: divides dim; hidden: channels between the two feed-forward layers.
        encoder_dim: channels of the image; None: the layer has no cross-attention.
        text: whether the layer has a feed-forward part for words.
        dropout: of the branches; attn_drop: of the probabilities; eps: of the norms; activation: of the feed-forward
            parts, one of 'gelu', 'gelu_tanh', 'relu', 'silu'.
        topk: how many image tokens each query keeps; None: all.

    Parameters, named as in transformers: ``attention.attention.{query,key,value}``, ``attention.output.dense``,
    ``attention.output.LayerNorm``, the same under ``crossattention``; ``intermediate_query.dense``,
    ``output_query.dense``, ``output_query.LayerNorm``; the same under ``intermediate`` and ``output`` for words.
    """

    attention_class: type[nn.Module] = QFormerMultiHeadAttention

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        hidden: int | None = None,
        encoder_dim: int | None = None,
        *,
        text: bool = False,
        dropout: float = 0.1,
        attn_drop: float = 0.1,
        eps: float = 1e-12,
        activation: str = "gelu",
        topk: int | None = None,
    ) -> None:
        super().__init__()
        where = "QFormerLayer"
        check_heads(where, dim, num_heads)
        check_dropout(where, dropout)
        check_choice(where, "activation", activation, tuple(ACTIVATIONS))
        if not isinstance(text, bool):
            refuse(TypeError, where, "text", "a bool", text)
        check_number(where, "eps", eps, 0.0, math.inf)
        hidden = 4 * dim if hidden is None else check_size(where, "hidden", hidden)
        self.dim = dim
        self.encoder_dim = None if encoder_dim is None else check_size(where, "encoder_dim", encoder_dim)
        make = self.attention_class
        self.attention = QFormerAttention(make(dim, num_heads, dropout=attn_drop), dim, dropout, eps)
        if encoder_dim is not None:
            crossing = make(dim, num_heads, encoder_dim, attn_drop, topk=topk)
            self.crossattention = QFormerAttention(crossing, dim, dropout, eps)
        if text:
            self.intermediate = QFormerIntermediate(dim, hidden, activation)
            self.output = QFormerOutput(hidden, dim, dropout, eps)
        self.text = text
        self.intermediate_query = QFormerIntermediate(dim, hidden, activation)
        self.output_query = QFormerOutput(hidden, dim, dropout, eps)

    def forward(
        self,
        x: Tensor,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """Queries, and words behind them, through the layer.

        Args:
            x: [B, Q + N_t, C]; [1, Q, C] for queries that a whole batch of images shares.
            image: [B, N, encoder_dim]; not looked at without a cross-attention or without queries.
            image_mask: bool or integer [B, N], True or 1 takes part; other tokens may hold anything, NaN included.
                An image without a token that takes part adds ``crossattention.output.dense.bias`` alone.
            attn_mask: bool, True takes part, of the self-attention, broadcastable to [B, H, Q + N_t, Q + N_t].
            num_queries: Q, how many of the tokens are queries (None: all).

        Returns:
            [B, Q + N_t, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        x, image, image_mask, Q = self._check(x, image, image_mask, attn_mask, num_queries)
        y = self.attention(x, x, attn_mask, None)
        queries, words = (y, None) if Q == y.shape[1] else (y[:, :Q], y[:, Q:])
        found = []
        if Q > 0:
            if self.encoder_dim is not None:
                queries = self._cross(queries, image, image_mask)
            found.append(self.output_query(self.intermediate_query(queries), queries))
        if words is not None:
            found.append(self.output(self.intermediate(words), words))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _cross(self, queries: Tensor, image: Tensor, image_mask: Tensor | None) -> Tensor:
        return self.crossattention(queries, image, None, image_mask)

    def _check(self, x, image, image_mask, attn_mask, num_queries) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        where = "QFormerLayer"
        check_tokens(where, "x", x, "(B, N, C)", self.dim)
        Q = x.shape[1] if num_queries is None else num_queries
        if isinstance(Q, bool) or not isinstance(Q, int):
            refuse(TypeError, where, "num_queries", "an int of at least 0, or None", num_queries)
        if not 0 <= Q <= x.shape[1]:
            refuse(ValueError, where, "num_queries", f"a number from 0 to {x.shape[1]}", num_queries)
        if Q < x.shape[1] and not self.text:
            refuse(ValueError, where, "num_queries", f"{x.shape[1]}, because text is False", num_queries)
        if attn_mask is not None and (not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool):
            refuse(TypeError, where, "attn_mask", "a bool tensor", attn_mask)
        if self.encoder_dim is None or Q == 0:
            return x, None, None, Q
        check_tokens(where, "image", image, "(B, N, C)", self.encoder_dim)
        if x.shape[0] not in (1, image.shape[0]) or (x.shape[0] != image.shape[0] and Q < x.shape[1]):
            refuse(ValueError, where, "image", f"the batch of x, {x.shape[0]}", image)
        if image_mask is not None:
            image_mask = check_mask(where, "image_mask", image_mask, tuple(image.shape[:2]))
            image = torch.where(image_mask[..., None], image, 0.0)
        return x, image, image_mask, Q
