"""What the attention modules of this folder share: heads, projections of one input, and attention between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..topk_attention import topk_attention
from ._checks import check_size, refuse
from .topk_attention import dense_attention


def check_heads(where: str, dim: Any, num_heads: Any, name: str = "num_heads") -> None:
    check_size(where, "dim", dim)
    if dim % check_size(where, name, num_heads):
        refuse(ValueError, where, name, f"a divisor of dim = {dim}", num_heads)


def check_topk(where: str, topk: Any) -> int | None:
    return None if topk is None else check_size(where, "topk", topk)


def project(layer: nn.Module, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``parts`` projections of x, by a layer that gives them side by side, or a ModuleList with one for each."""
    if isinstance(layer, nn.ModuleList):
        return tuple(part(x) for part in layer)
    return layer(x).chunk(parts, -1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., N, heads * D] to [..., heads, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """[..., heads, N, D] to [..., N, heads * D]."""
    return x.transpose(-3, -2).flatten(-2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Dense attention, or with ``topk`` the best keys of each query: [B, H, Q, D], [B, H, N, D], [B, H, N, E] to
    [B, H, Q, E].

    attn_mask: bool, broadcastable to [B, H, Q, N]; key_mask: bool [B, N].  A query without a key gives 0.
    """
    masks = {"attn_mask": attn_mask, "key_mask": key_mask, "dropout_p": dropout_p}
    if topk is None:
        return dense_attention(query, key, value, **masks)
    if dropout_p > 0.0:
        masks["seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    return topk_attention(query, key, value, topk, **masks)
