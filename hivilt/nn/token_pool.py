"""Adaptive pooling on hivilt.ops.token_pool: mean, maximum and attention in one read of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import token_pool
from ..reference import modules as plain
from ._choice import Inner, kernel_exists, why_changed


class AdaptiveGlobalPooling(plain.AdaptiveGlobalPooling):
    """The twin in one operator.

    Cost: one read of the features and 2 B N C (C / 4) flops; backward reads and writes them once.  Second derivatives
    raise.  Where a module of ``attn_pool`` was replaced, hooked or parametrized, or no kernel takes the call, the twin
    works.
    """

    def _pool(self, features: Tensor, mask: Tensor | None) -> Tensor:
        attends = "attention" in self.pool_types
        changed = attends and why_changed(attention_parts(self))
        if changed or not kernel_exists("token_pool", features.device.type, features.dtype):
            return super()._pool(features, mask)
        project, _, score = self.attn_pool
        of_scores = (project.weight, project.bias, score.weight, score.bias) if attends else (None,) * 4
        out = token_pool(features, *of_scores, self.pool_weights, pools=self.pool_types, mask=mask)
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(features.device.type):
            return out.to(torch.promote_types(out.dtype, torch.float32))  # the softmax that weighs is that wide
        return out


def attention_parts(module: plain.AdaptiveGlobalPooling) -> list[Inner]:
    """What the operator reads of ``attn_pool``."""
    if len(module.attn_pool) != 3:
        return [Inner("attn_pool", module.attn_pool, ())]
    kinds = nn.Linear, nn.Tanh, nn.Linear
    parts = [
        Inner(f"attn_pool.{i}", m, (kind,)) for i, (m, kind) in enumerate(zip(module.attn_pool, kinds, strict=True))
    ]
    return [Inner("attn_pool", module.attn_pool, (nn.Sequential,)), *parts]
