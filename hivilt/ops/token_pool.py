"""Pooling of tokens in one read: mean, maximum and attention-weighted mean, mixed by learned weights.

The public function ``token_pool``: checks, fills in defaults and calls.  Meaning: hivilt/reference/token_pool.py; why:
docs/token_pool.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._checks import Said, autocast, check_tensor, check_token_mask, check_vector, refuse
from ._running import eager, record, records, run
from ._token_pool_autograd import TokenPool
from ._token_pool_rows import TOKEN_POOL
from ._token_pool_schema import POOLS


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
    backend: str | None = None,
) -> Tensor:
    """sum over p of softmax(pool_weights)_p pool_p(features): what AdaptiveGlobalPooling computes.

    Args:
        features: float32, bfloat16, float16 or float64 [B, N, C], any strides.
        proj_weight, proj_bias: same dtype [K, C], [K] or None; score_weight, score_bias: [1, K], [1] or None.  The
            scores of "attention" are tanh(x proj_weight^T + proj_bias) score_weight^T + score_bias; weights are None
            exactly when "attention" is not among the pools.
        pool_weights: float32 or same dtype [len(pools)]; entry p belongs to pools[p].
        pools: any of "mean", "max", "attention", each once.
        mask: bool [B, N], True takes part.  A row without a token that takes part gives zeros and no gradient.

    Returns:
        [B, C] in the features' dtype.  A tied maximum sends its gradient to the token of the lowest index.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: one read of the features, 2 B N C K flops for the scores; backward reads and writes them once more.  Second
    derivatives raise.
    """
    args, _ = _bind_token_pool(features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, pools, mask,
                               backend)  # fmt: skip
    if not records(*args[:6]):
        return run(TOKEN_POOL, backend, args)[0]
    chosen = _backends.choose(TOKEN_POOL, backend, args) if eager(args[0]) else backend or ""
    return record(TokenPool, (*args, chosen))[0]


def _bind_token_pool(features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, pools=POOLS, mask=None,
                     backend=None):  # fmt: skip
    op = "token_pool"
    if proj_weight is not None and torch._C._is_any_autocast_enabled():  # mean and maximum alone stay as they are
        features, proj_weight, proj_bias, score_weight, score_bias = autocast(
            features, proj_weight, proj_bias, score_weight, score_bias
        )
    check_tensor(op, "features", features, 3, "(B, N, C)")
    _, N, C = features.shape
    pools = _check_pools(op, pools)
    same = (features.dtype,)
    if 2 in pools:
        check_tensor(op, "proj_weight", proj_weight, 2, "(K, C)", features, "features")
        K = proj_weight.shape[0]
        if proj_weight.shape[1] != C or K == 0:
            refuse(ValueError, op, "proj_weight", f"shape (K, {C}), K at least 1", proj_weight)
        check_tensor(op, "score_weight", score_weight, 2, "(1, K)", features, "features")
        if tuple(score_weight.shape) != (1, K):
            refuse(ValueError, op, "score_weight", f"shape (1, {K})", score_weight)
        for name, x, size in (("proj_bias", proj_bias, K), ("score_bias", score_bias, 1)):
            if x is not None:
                check_vector(op, name, x, size, features, same)
    else:
        for name, x in (("proj_weight", proj_weight), ("proj_bias", proj_bias), ("score_weight", score_weight),
                        ("score_bias", score_bias)):  # fmt: skip
            if x is not None:
                refuse(ValueError, op, name, "None, because pools have no 'attention'", x)
    check_vector(op, "pool_weights", pool_weights, len(pools), features, (*same, torch.float32))
    if mask is not None:
        check_token_mask(op, "mask", mask, features, N, "(B, N)")
    _backends.check_name(backend, f"{op}: backend")
    return (features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, mask, pools), None


def _check_pools(op: str, pools: Any) -> list[int]:
    if isinstance(pools, Tensor | str) or not isinstance(pools, Sequence):
        refuse(TypeError, op, "pools", f"a tuple out of {', '.join(map(repr, POOLS))}", pools)
    for pool in pools:
        if not isinstance(pool, str) or pool not in POOLS:
            refuse(ValueError, op, "pools", f"names out of {', '.join(map(repr, POOLS))}", pool)
    if not pools or len(set(pools)) != len(pools):
        refuse(ValueError, op, "pools", "at least one pool, each once", Said(f"{list(pools)}"))
    return [POOLS.index(pool) for pool in pools]


_backends.explainable(TOKEN_POOL, token_pool, _bind_token_pool)
