"""Adaptive pooling of tokens, the meaning of it: the mean, the maximum and an attention-weighted mean of x, mixed.

    s_n = score_weight tanh(proj_weight x_n + proj_bias) + score_bias,  a = softmax over the kept tokens of s
    out = sum_p softmax(pool_weights)_p pool_p(x),  pools: mean_n x_n, max_n x_n, sum_n a_n x_n

A row that keeps no token gives zeros and no gradient; a tied maximum sends its gradient to the lowest index.  Sums run
in float64 and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POOLS = ("mean", "max", "attention")


def token_pool(
    features: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    score_weight: Tensor | None,
    score_bias: Tensor | None,
    pool_weights: Tensor,
    *,
    pools: Sequence[str] = POOLS,
    mask: Tensor | None = None,
) -> Tensor:
    """Pools and mixes.

    Args:
        features: [B, N, C].
        proj_weight, proj_bias: [K, C], [K]; score_weight, score_bias: [1, K], [1]; used by "attention" only.
        pool_weights: [len(pools)], one logit per pool in the order of ``pools``.
        mask: bool [B, N], True takes part.

    Returns:
        [B, C] in the features' dtype.
    """
    pooled, _, _ = pool_all(features.double(), proj_weight, proj_bias, score_weight, score_bias, pools, mask)
    return mix(pooled, pool_weights).to(features.dtype)


def mix(pooled: Tensor, pool_weights: Tensor) -> Tensor:
    """sum_p softmax(pool_weights)_p pooled[:, p], in float64."""
    return (pool_weights.double().softmax(0)[:, None] * pooled).sum(1)


def pool_all(x, proj_weight, proj_bias, score_weight, score_bias, pools, mask) -> tuple[Tensor, Tensor, Tensor]:
    """Every pool [B, pools, C] in float64, which token is the maximum [B, C], and the attention weights [B, N]."""
    B, N, C = x.shape
    kept = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else mask
    some = kept.any(1)
    x = torch.where(kept[..., None], x, 0.0)
    first, attention, pooled = x.new_zeros(B, C, dtype=torch.int64), x.new_zeros(B, N), []
    for pool in pools:
        if pool == "mean":
            pooled.append(x.sum(1) / kept.sum(1).clamp(min=1)[:, None])
        elif pool == "max":
            first = _first_maximum(x.detach(), kept)
            pooled.append(x.gather(1, first[:, None]).squeeze(1) if N else x.sum(1))
        else:
            proj_bias, score_bias = (None if t is None else t.double() for t in (proj_bias, score_bias))
            hidden = torch.tanh(F.linear(x, proj_weight.double(), proj_bias))
            scores = F.linear(hidden, score_weight.double(), score_bias).squeeze(-1)
            scores = torch.where(some[:, None], torch.where(kept, scores, float("-inf")), 0.0)
            attention = torch.where(kept, scores.softmax(1), 0.0)
            pooled.append((attention[..., None] * x).sum(1))
    return torch.where(some[:, None, None], torch.stack(pooled, 1), 0.0), first, attention


def _first_maximum(x: Tensor, kept: Tensor) -> Tensor:
    """Which kept token is the maximum [B, C]: the first of equals; NaN wins, as in torch.max."""
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], x.shape[2], dtype=torch.int64)
    ranked = torch.where(kept[..., None], x, float("-inf"))
    top = ranked.amax(1, keepdim=True)
    is_top = ((ranked == top) | (ranked.isnan() & top.isnan())) & kept[..., None]
    return is_top.int().argmax(1)
