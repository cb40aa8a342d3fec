"""Question and image on hivilt.nn.MultiheadAttention, and the mean over tokens on hivilt.ops.token_pool."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import token_pool
from ..reference import modules as plain
from ._choice import kernel_exists
from .topk_attention import MultiheadAttention


class MultimodalFusion(plain.MultimodalFusion):
    """The twin; attends with hivilt.nn.MultiheadAttention, whose ``topk`` may be set: each word keeps few patches."""

    attention = MultiheadAttention


class MaskedMeanPool(plain.MaskedMeanPool):
    """The twin in one read of the tokens, where a kernel takes the call.  Second derivatives raise there."""

    def _pool(self, features: Tensor, mask: Tensor | None) -> Tensor:
        if not kernel_exists("token_pool", features.device.type, features.dtype):
            return super()._pool(features, mask)
        one = torch.ones(1, dtype=torch.float32, device=features.device)  # softmax of a single pool's logit is 1
        return token_pool(features, None, None, None, None, one, pools=("mean",), mask=mask)
