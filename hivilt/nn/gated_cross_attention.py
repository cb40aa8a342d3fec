"""Flamingo's gated cross-attention on hivilt.ops.topk_attention.

Text that reads the last image before it is packed sequences: the tokens from one image to the next are one sequence and
its keys are that image's.  No mask is written and no pair that takes no part is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import topk_attention_varlen
from ..reference import modules as plain
from ._heads import attend
from .topk_attention import kernel_exists


class MaskedCrossAttention(plain.MaskedCrossAttention):
    """The twin.

    Cost: without ``attn_mask`` and with only_attend_immediate_media 4 B L n D H flops, T times less than attention to T
    images under a mask.
    """

    _attend = staticmethod(attend)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, text_time, attn_mask, dropout_p: float) -> Tensor:
        packs = text_time is not None and attn_mask is None and self.only_attend_immediate_media
        if not packs or q.numel() == 0 or not kernel_exists(q.device.type, q.dtype, q.shape[-1]):
            return super()._read(q, k, v, text_time, attn_mask, dropout_p)
        B, L = q.shape[:2]
        T, n = k.shape[1:3]
        # For each sample T + 2 sequences: text before the first image, after each one, and after images that were not
        # passed. The first and the last have no keys.
        counts = (text_time.clamp(max=T + 1)[..., None] == torch.arange(T + 2, device=q.device)).sum(1)
        lengths = torch.full((T + 2,), n, device=q.device)
        lengths[0] = lengths[-1] = 0
        cu_seqlens = [torch.cat([x.new_zeros(1), x.flatten().cumsum(0)]).int() for x in (counts, lengths.expand(B, -1))]
        q, k, v = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2)
        out = topk_attention_varlen(q, k, v, *cu_seqlens, L, max(n, 1), self.topk, dropout_p=dropout_p)
        return out.unflatten(0, (B, L))


class GatedCrossAttentionBlock(plain.GatedCrossAttentionBlock):
    """The twin; its attention is hivilt.nn.MaskedCrossAttention."""

    attention = MaskedCrossAttention
