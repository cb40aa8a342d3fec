"""Hugging Face transformers: attention named "hivilt" (dense) and "hivilt_topk" (each query keeps ``topk`` keys).

    hivilt.integrations.hf.register(topk=64)
    model.set_attn_implementation("hivilt_topk")

Key and value heads stay as few as the model has; masks come as bool (True takes part) or as an additive float bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nn.topk_attention import as_bias, check_options, dense_attention
from ..ops import topk_attention

DENSE, TOPK = "hivilt", "hivilt_topk"
REFUSED = ("softcap", "s_aux", "cache")  # they change the scores, add sinks or page the keys


def register(topk: int = 64, *, axis: str = "keys") -> tuple[str, str]:
    """Makes both names known to transformers, for attention and for masks; again: with another ``topk``.

    Args:
        topk: how many keys each query keeps under "hivilt_topk".
        axis: "keys", or "queries": each key keeps its best queries.

    Returns:
        The two names, for ``model.set_attn_implementation`` or ``from_pretrained(..., attn_implementation=...)``.

    Raises:
        ImportError: transformers is not installed, or too old.  ValueError, TypeError: a malformed option.
    """
    check_options(topk, axis, "scores", "register")
    if topk is None:
        raise TypeError('register: topk: expected an int of at least 1; got None (dense attention is named "hivilt")')
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "hivilt.integrations.hf needs transformers 5: pip install 'hivilt[hf]', or pip install 'transformers>=5'"
        ) from error
    for name, function in ((DENSE, attention_forward(None)), (TOPK, attention_forward(topk, axis))):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    return DENSE, TOPK


def attention_forward(topk: int | None, axis: str = "keys") -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls: (module, query, key, value, mask, ...) -> (out [B, N, H, D], None)."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for name in REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"hivilt attention: {name}: expected None, it is not supported; choose 'eager' or 'sdpa'"
                )
        B, _, Q, _ = query.shape
        N = key.shape[2]
        if key.shape[0] != B:  # one set of learned queries for a batch of images
            B = max(B, key.shape[0])
            query, key, value = (x.expand(B, -1, -1, -1) for x in (query, key, value))
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if attention_mask is None and is_causal and Q > 1:
            # A mask that is only causal is left out by the mask interface. Key i is then query i, whatever follows.
            attention_mask = torch.ones(Q, N, dtype=torch.bool, device=query.device).tril()[None, None]
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = as_bias(attention_mask, query.dtype)
        if position_bias is not None:
            attention_mask = add_bias(as_bias(position_bias, query.dtype), attention_mask)
        if topk is None:
            out = dense_attention(query, key, value, attention_mask, scale=scaling, dropout_p=dropout)
        else:
            out = topk_attention(
                query, key, value, topk, axis=axis, attn_mask=attention_mask, scale=scaling, dropout_p=dropout
            )
        return out.transpose(1, 2), None  # stored token by token: contiguous

    return forward


def add_bias(position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position bias and mask as one float bias."""
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, float("-inf"))
    return position_bias + attention_mask
