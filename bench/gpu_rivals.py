"""The rivals of the GPU's races, beside those of rivals.py.

flash, efficient, cudnn, math   dense scaled_dot_product_attention on that backend alone, which runs or refuses
..._masked                      the same with the mask of the top-k pairs, made by plain PyTorch as part of the call
flex                            FlexAttention, compiled, told the threshold of every row beforehand: it selects nothing
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from device import REHEARSED
from rivals import INF, MAY_REFUSE, RIVALS, Case, hivilt_backend, top_pairs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hivilt
from hivilt.testing import pairs_from_indices

FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def fused(backend: SDPBackend, masked: bool) -> Callable:
    """The rival that runs on this backend of scaled_dot_product_attention or raises."""

    def rival(case: Case, x: dict[str, Tensor]) -> Callable:
        scale = 1 / math.sqrt(case.D)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kept = None
            if masked:
                with torch.no_grad():
                    kept = top_pairs(case, x, query if case.shared else (query @ key.mT) * scale)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, kept)

        return attend

    return rival


def flex(case: Case, x: dict[str, Tensor]) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    bars, by_keys = thresholds(case, x), case.axis == "keys"

    def above(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(score >= bars[b, h, i if by_keys else j], score, -INF)

    attend = flex_attention if REHEARSED else torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda query, key, value: attend(query, key, value, score_mod=above)


@torch.no_grad()
def thresholds(case: Case, x: dict[str, Tensor]) -> Tensor:
    """fp32 [B, H, rows]: halfway between the worst kept and the best other score of every row, from our indices."""
    query, key = x["query"], x["key"]
    indices = hivilt.ops.topk_select(query, key, case.topk, axis=case.axis, backend=hivilt_backend(case.device))
    bars = torch.empty(indices.shape[:3], device=indices.device)
    for b in range(case.B):
        for h in range(case.H):
            scores = query[b, h].double() @ key[b, h].double().mT / math.sqrt(case.D)
            kept = pairs_from_indices(indices[b : b + 1, h : h + 1], case.Q, case.N, 1, case.axis)[0, 0]
            if case.axis == "queries":
                scores, kept = scores.mT, kept.mT
            worst, best = scores.masked_fill(~kept, INF).amin(1), scores.masked_fill(kept, -INF).amax(1)
            bars[b, h] = (worst + best) / 2
    return bars


RIVALS |= {name: fused(backend, False) for name, backend in FUSED.items()}
RIVALS |= {f"{name}_masked": fused(backend, True) for name, backend in FUSED.items()}
RIVALS["flex"] = flex
MAY_REFUSE |= {*FUSED, *(f"{name}_masked" for name in FUSED), "flex"}
