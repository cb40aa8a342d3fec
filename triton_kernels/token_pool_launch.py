"""Which kernels run a call of token_pool: tensors in, tensors out.

forward    one read of the tokens where a program holds them whole, two where their scores are computed first; parts of
           a sample are merged by a second kernel
backward   two reads and one write of the tokens, two more reads for the gradient of proj_weight
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch as launching
from . import token_pool as kernels
from .configs import ANY
from .fusion_tiles import lookup, power
from .scale_fusion_launch import sum_partials, weight_gradient

POOLS = ("mean", "max", "attention")
# Channels up to which scores are computed beside the pools; a product of float32 that wide would fill the registers.
WHOLE_TOKENS = {torch.float32: 0, torch.bfloat16: 256, torch.float16: 256}
PROGRAMS = 264  # that sums over all tokens are split into, if there are so many
PARTS = 16  # of a sample at most, which meet in its pools
MIXED = 4  # numbers per sample


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _strided(x: Tensor) -> tuple:
    return (x, x.stride(0), x.stride(1))


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _places(pools) -> dict[str, int]:
    """Where each pool stands among those of a call; -1: it does not."""
    return {name.upper(): list(pools).index(i) if i in pools else -1 for i, name in enumerate(POOLS)}


def token_pool(features, proj_weight, proj_bias, score_weight, score_bias, pool_weights, mask, pools):
    """Operator ``hivilt::token_pool`` without its backend argument."""
    B, N, C = features.shape
    places, device = _places(pools), features.device
    scored = places["ATTENTION"] >= 0
    out = torch.empty(B, C, dtype=features.dtype, device=device)
    pooled = torch.empty(B, len(pools), C, dtype=torch.float32, device=device)
    first = torch.empty((B, C) if places["MAX"] >= 0 else (0,), dtype=torch.int32, device=device)
    attention = torch.empty((B, N) if scored else (0,), dtype=torch.float32, device=device)
    if not (B and N and C):
        return out.zero_(), pooled.zero_(), first.zero_(), attention
    x, token_mask = launching.rows(features), launching.token_mask(mask)
    layer = [_optional(t) for t in (proj_weight, proj_bias, score_weight, score_bias)]
    K = proj_weight.shape[0] if scored else 0
    here = scored and C <= WHOLE_TOKENS[features.dtype]
    if scored and not here:
        tile = lookup(x, "token_scores", C)
        blocks = _cdiv(N, tile.rows)
        launching.launch(
            kernels._token_scores_kernel, B * blocks, (_strided(x), *layer, token_mask, attention, N, C, K, blocks),
            tile.warps, tile.stages, BLOCK_R=tile.rows, BLOCK_C=tile.cols, BLOCK_K=min(tile.inner, power(K)),
        )  # fmt: skip
    tile = lookup(x, "pool", C if here else ANY)
    cols = power(C) if here else min(tile.cols, power(C))
    col_blocks = _cdiv(C, cols)
    parts = min(_cdiv(N, 4 * tile.rows), PARTS)  # whatever the batch, so that no sample's bits depend on the others
    per_part = _cdiv(_cdiv(N, parts), tile.rows) * tile.rows
    parts = _cdiv(N, per_part)
    tops = torch.empty(B, parts, 4, dtype=torch.float32, device=device)
    sums = torch.empty(B, parts, 2, C, dtype=torch.float32, device=device)
    maxima = torch.empty(B, parts, 2, C, dtype=torch.int32, device=device)
    launching.launch(
        kernels._pool_kernel, B * parts * col_blocks,
        (_strided(x), *layer, token_mask, attention, tops, sums, maxima, N, C, K, parts, per_part, col_blocks),
        tile.warps, tile.stages, **places, SCORES=here, BLOCK_R=tile.rows, BLOCK_C=cols,
        BLOCK_K=min(tile.inner, power(K)),
    )  # fmt: skip
    cols, rows = min(256, power(C)), 256
    col_blocks, token_blocks = _cdiv(C, cols), _cdiv(N, rows) if scored else 0
    launching.launch(
        kernels._merge_pools_kernel, B * (col_blocks + token_blocks),
        (token_mask, pool_weights.contiguous(), tops, sums, maxima, out, pooled, first, attention, N, C, parts,
         col_blocks, token_blocks),
        4, 1, POOLS=len(pools), **places, BLOCK_C=cols, BLOCK_R=rows,
    )  # fmt: skip
    return out, pooled, first, attention


def token_pool_backward(grad_out, features, proj_weight, proj_bias, score_weight, pool_weights, mask, pooled, first,
                        attention, pools):  # fmt: skip
    """Operator ``hivilt::token_pool_backward`` without its backend argument."""
    B, N, C = features.shape
    places, device, dtype = _places(pools), features.device, features.dtype
    grad = torch.empty(B, N, C, dtype=dtype, device=device)
    grad_pools = torch.zeros_like(pool_weights, memory_format=torch.contiguous_format)
    layer = [_optional(t) for t in (proj_weight, proj_bias, score_weight)]
    of_layer = [features.new_empty(0) if t is None else torch.zeros_like(t) for t in layer]
    # Added to every score, the bias moves no softmax.
    of_score_bias = features.new_empty(0) if score_weight is None else score_weight.new_zeros(1)
    if not (B and N and C):
        return grad.zero_(), *of_layer, of_score_bias, grad_pools
    x, token_mask, pool_weights = launching.rows(features), launching.token_mask(mask), pool_weights.contiguous()
    upstream = _strided(grad_out)
    dots = torch.empty(B, MIXED, dtype=torch.float32, device=device)
    launching.launch(
        kernels._pool_dots_kernel, B, (upstream, pooled, token_mask, dots, N, C), 4, 1, POOLS=len(pools),
        BLOCK_C=min(256, power(C)), BLOCK_R=min(256, power(N)),
    )  # fmt: skip
    launching.launch(
        kernels._mixture_gradient_kernel, 1, (pool_weights, dots, grad_pools, B), 4, 1, POOLS=len(pools), BLOCK=64
    )
    K, to_hidden = 0, None
    if places["ATTENTION"] >= 0:
        K = proj_weight.shape[0]
        # Shares of a softmax are small: float16 would lose them.
        to_hidden = torch.empty(B, N, K, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)
        tile = lookup(x, "score_gradient", C)
        inner = min(tile.inner, power(K))
        blocks, k_blocks = _cdiv(N, tile.rows), _cdiv(K, inner)
        per_program = _cdiv(B * blocks, PROGRAMS)
        parts = _cdiv(B * blocks, per_program)
        partial = torch.empty(parts, 2 * K, dtype=torch.float32, device=device)
        launching.launch(
            kernels._score_gradient_kernel, parts * k_blocks,
            (upstream, _strided(x), *layer, pool_weights, token_mask, dots, attention, to_hidden, partial, N, C, K,
             blocks, B * blocks, per_program, k_blocks),
            tile.warps, tile.stages, POOLS=len(pools), ATTENTION=places["ATTENTION"], BLOCK_R=tile.rows,
            BLOCK_C=tile.cols, BLOCK_K=inner,
        )  # fmt: skip
        sums = sum_partials(partial, torch.empty(2 * K, dtype=torch.float32, device=device))
        weight_gradient(to_hidden, x, of_layer[0], mask)
        if proj_bias is not None:
            of_layer[1] = sums[:K].to(proj_bias.dtype)
        of_layer[2] = sums[K:].to(score_weight.dtype).view(1, K)
    tile = lookup(x, "pool_gradient", C)
    cols = min(tile.cols, power(C))
    blocks, col_blocks = _cdiv(N, tile.rows), _cdiv(C, cols)
    launching.launch(
        kernels._pool_gradient_kernel, B * blocks * col_blocks,
        (upstream, layer[0], pool_weights, token_mask, dots, first, attention, to_hidden, grad, N, C, K, blocks,
         col_blocks),
        tile.warps, tile.stages, POOLS=len(pools), **places, BLOCK_R=tile.rows, BLOCK_C=cols,
        BLOCK_K=min(tile.inner, power(K)),
    )  # fmt: skip
    return grad, *of_layer, of_score_bias, grad_pools
