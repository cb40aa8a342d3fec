"""Pooling of tokens by mean, maximum and attention, mixed by learned weights, in plain PyTorch.

The meaning of each pool is that of hivilt/reference/token_pool.py; here the features are read once per pool and more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_mask, check_size, check_tensor, refuse

POOLS = ("mean", "max", "attention")


class AdaptiveGlobalPooling(nn.Module):
    """sum_p softmax(pool_weights)_p pool_p(x) over the tokens of x.

    Args:
        hidden_dim: C.
        pool_types: any of "mean", "max", "attention", each once; entry p of ``pool_weights`` belongs to pool_types[p].
        compat: None, or "seed": the pools are taken in the order mean, max, attention, whatever order they are named
            in, as in the layer as first written.

    Parameters: ``attn_pool.0`` and ``attn_pool.2`` score the tokens for "attention" (without it they are kept, so that
    checkpoints fit, but ask for no gradient); ``pool_weights``, one logit per pool.
    """

    def __init__(self, hidden_dim: int, pool_types: Sequence[str] = POOLS, *, compat: str | None = None) -> None:
        super().__init__()
        where = "AdaptiveGlobalPooling"
        check_size(where, "hidden_dim", hidden_dim)
        if isinstance(pool_types, str | Tensor) or not isinstance(pool_types, Sequence):
            refuse(TypeError, where, "pool_types", f"a tuple out of {', '.join(map(repr, POOLS))}", pool_types)
        for pool in pool_types:
            if pool not in POOLS:
                refuse(ValueError, where, "pool_types", f"names out of {', '.join(map(repr, POOLS))}", pool)
        if not pool_types or len(set(pool_types)) != len(pool_types):
            refuse(ValueError, where, "pool_types", "at least one pool, each once", list(pool_types))
        if compat is not None:
            check_choice(where, "compat", compat, ("seed",))
            pool_types = [pool for pool in POOLS if pool in pool_types]
        self.hidden_dim, self.pool_types = hidden_dim, tuple(pool_types)
        width = max(1, hidden_dim // 4)
        self.attn_pool = nn.Sequential(nn.Linear(hidden_dim, width), nn.Tanh(), nn.Linear(width, 1))
        if "attention" not in self.pool_types:
            self.attn_pool.requires_grad_(False)
        self.pool_weights = nn.Parameter(torch.ones(len(self.pool_types)) / len(self.pool_types))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C] to [B, C].

        Args:
            features: any floating dtype.
            mask: bool or integer [B, N], True or 1 takes part; what other tokens hold does not matter, NaN included.  A
                row without a token that takes part gives zeros and no gradient.

        Raises:
            ValueError, TypeError: an argument that does not fit.

        A tied maximum sends its gradient to the token of the lowest index.
        """
        where = "AdaptiveGlobalPooling"
        check_tensor(where, "features", features, "(B, N, C)", 3)
        if features.shape[2] != self.hidden_dim:
            refuse(ValueError, where, "features", f"{self.hidden_dim} channels", features)
        if mask is not None:
            mask = check_mask(where, "mask", mask, tuple(features.shape[:2]))
        return self._pool(features, mask)

    def _pool(self, features: Tensor, mask: Tensor | None) -> Tensor:
        if features.shape[1] == 0:
            return features.sum(1)
        some, kept = None, None
        wide = torch.promote_types(features.dtype, torch.float32)  # the sum of many halves may not fit a half
        if mask is not None:
            kept, some = mask[..., None], mask.any(1)[:, None]
            features = torch.where(kept, features, 0.0)  # hidden NaN must not meet a factor of 0
        pooled = []
        for pool in self.pool_types:
            if pool == "mean":
                count = features.shape[1] if mask is None else kept.sum(1).clamp(min=1)
                pooled.append((features.sum(1, dtype=wide) / count).to(features.dtype))
            elif pool == "max":
                pooled.append((features if mask is None else torch.where(kept, features, -torch.inf)).max(1)[0])
            else:
                scores = self.attn_pool(features)
                if mask is not None:  # a row that keeps nothing keeps its scores: softmax of -inf alone is NaN
                    scores = scores.masked_fill(some[..., None] & ~kept, -torch.inf)
                pooled.append((features * scores.softmax(1)).sum(1))
        if mask is not None:
            pooled = [torch.where(some, x, 0.0) for x in pooled]
        weights = self.pool_weights.softmax(0).view(-1, 1, 1)
        return (torch.stack(pooled) * weights).sum(0)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, pool_types={self.pool_types}"
