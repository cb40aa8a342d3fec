"""The reference row of token_pool: the specification, and its gradients by autograd in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.token_pool import mix, pool_all
from ._token_pool_schema import ATTENTION, MAX, POOLS


def token_pool(features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, mask, pools):
    names = [POOLS[p] for p in pools]
    pooled, first, attention = pool_all(
        features.double(), proj_weight, proj_bias, score_weight, score_bias, names, mask
    )
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        mix(pooled, pool_weights).to(features.dtype),
        pooled.to(wide),
        first.int() if MAX in pools else features.new_empty(0, dtype=torch.int32),
        attention.to(wide) if ATTENTION in pools else features.new_empty(0, dtype=wide),
    )


def token_pool_backward(grad_out, features, proj_weight, proj_bias, score_weight, pool_weights, mask, pooled, first,
                        attention, pools):  # fmt: skip
    given = [features, proj_weight, proj_bias, score_weight, pool_weights]
    with torch.enable_grad():
        x, w, b, s, p = (None if t is None else t.detach().double().requires_grad_() for t in given)
        bias = None if s is None else s.new_zeros(1).requires_grad_()  # its value moves no softmax
        again, _, _ = pool_all(x, w, b, s, bias, [POOLS[i] for i in pools], mask)
        out = mix(again, p)
    asked = [x, w, b, s, bias, p]
    present = [t for t in asked if t is not None]
    found = iter(torch.autograd.grad(out, present, grad_out.double(), allow_unused=True))
    likes = [features, proj_weight, proj_bias, score_weight, score_weight, pool_weights]

    def cast(t: Tensor | None, like: Tensor | None) -> Tensor:
        if t is None:
            return features.new_empty(0)
        grad = next(found)
        return torch.zeros_like(t, dtype=like.dtype) if grad is None else grad.to(like.dtype)

    return tuple(cast(t, like) for t, like in zip(asked, likes, strict=True))
