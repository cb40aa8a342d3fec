"""Operators of token_pool as torch sees them: schemas, fakes, flop formulas.

``pools`` holds indices into POOLS.  pooled [B, pools, C] and attention [B, N] are float32 (float64 for float64), first
[B, C] int32 says which token is the maximum; what the pools do not need has the shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

POOLS = ("mean", "max", "attention")
MAX, ATTENTION = 1, 2
SCHEMAS = {
    "token_pool": (
        "Tensor features, Tensor? proj_weight, Tensor? proj_bias, Tensor? score_weight, Tensor? score_bias, "
        "Tensor pool_weights, Tensor? mask, int[] pools",
        "(Tensor out, Tensor pooled, Tensor first, Tensor attention)",
    ),
    "token_pool_backward": (
        "Tensor grad_out, Tensor features, Tensor? proj_weight, Tensor? proj_bias, Tensor? score_weight, "
        "Tensor pool_weights, Tensor? mask, Tensor pooled, Tensor first, Tensor attention, int[] pools",
        "(Tensor grad_features, Tensor grad_proj_weight, Tensor grad_proj_bias, Tensor grad_score_weight, "
        "Tensor grad_score_bias, Tensor grad_pool_weights)",
    ),
}


def _fake(features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, mask, pools):
    B, N, C = features.shape
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        features.new_empty(B, C),
        features.new_empty(B, len(pools), C, dtype=wide),
        features.new_empty((B, C) if MAX in pools else (0,), dtype=torch.int32),
        features.new_empty((B, N) if ATTENTION in pools else (0,), dtype=wide),
    )


def _fake_backward(grad_out, features, proj_weight, proj_bias, score_weight, pool_weights, *rest):
    def like(x: Tensor | None) -> Tensor:
        return features.new_empty(0) if x is None else x.new_empty(x.shape)

    score_bias = features.new_empty(0 if score_weight is None else 1)
    return *(like(x) for x in (features, proj_weight, proj_bias, score_weight)), score_bias, like(pool_weights)


FAKES = {"token_pool": _fake, "token_pool_backward": _fake_backward}


def _flops(features, proj_weight, *rest, out_shape=None, **_) -> int:
    B, N, C = features
    return 2 * B * N * C * (1 + (proj_weight[0] if proj_weight is not None else 0))


def _flops_backward(grad_out, features, proj_weight, *rest, out_shape=None, **_) -> int:
    return 3 * _flops(features, proj_weight)  # the hidden layer again, its gradient to features and to weights


FLOPS = {"token_pool": _flops, "token_pool_backward": _flops_backward}
