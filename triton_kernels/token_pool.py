"""Pooling of tokens on the GPU: mean, maximum and attention-weighted mean, mixed by learned weights.

``_pool_kernel``              a part of the tokens of a sample: sums, maxima, an online softmax (arXiv 1805.02867)
``_token_scores_kernel``      scores, where a program of the former does not hold whole tokens
``_merge_pools_kernel``       all parts of a sample in order, the mixture; and the attention weights
``_pool_dots_kernel``         <gradient, pool> and the number of kept tokens of each sample
``_score_gradient_kernel``    gradient to the hidden layer, and per-program sums for what comes behind it
``_pool_gradient_kernel``     gradient to the tokens
``_mixture_gradient_kernel``  gradient to the mixing weights

MEAN, MAX, ATTENTION: which of the pools they are, or -1.  proj, score_weight and the biases are contiguous.
"""

import triton
import triton.language as tl

from .tiles import INF, fitted_product, greatest, narrow, ordered, permitted, product, unordered, wide

LOWEST, HIGHEST = tl.constexpr(-2147483648), tl.constexpr(2147483647)  # no token; NaN


@triton.jit
def tanh(x):
    """The quotient loses the digits of small x, where the series has them all."""
    y = x * x
    series = x + x * y * (
        -0.3333333333333333 + y * (0.13333333333333333 + y * (-0.05396825396825397 + y * 0.021869489))
    )
    return tl.where(tl.abs(x) < 0.3, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def total_of(x):
    """The sum of a vector, by way of a matrix like ``greatest``."""
    return tl.sum(x[:, None])


@triton.jit
def mixture(pool_weights, p, POOLS: tl.constexpr):
    """softmax(pool_weights)_p."""
    i = tl.arange(0, 4)
    logits = wide(tl.load(pool_weights + i, mask=i < POOLS, other=-INF))
    e = tl.exp(logits - tl.max(logits, 0))
    return tl.sum(tl.where(i == p, e, 0.0), 0) / tl.sum(e, 0)


@triton.jit
def tile_of(x, b, rows, ok, start, channels, BLOCK_C: tl.constexpr):
    """[R, C] of x (pointer, strides of batch, token); zeros for tokens that are not ``ok``."""
    c = start + tl.arange(0, BLOCK_C)
    at = x[0] + b * x[1] + rows.to(tl.int64)[:, None] * x[2] + c[None, :]
    return tl.load(at, mask=ok[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def proj_tile(proj, k, width, start, channels, BLOCK_C: tl.constexpr):
    """[K, C] of proj [width, channels]."""
    c = start + tl.arange(0, BLOCK_C)
    at = proj + k.to(tl.int64)[:, None] * channels + c[None, :]
    return tl.load(at, mask=(k < width)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def hidden_of(sums, proj_bias, k, width):
    """tanh(sums + proj_bias) [R, K]."""
    if proj_bias is not None:
        sums += wide(tl.load(proj_bias + k, mask=k < width, other=0.0))[None, :]
    return tanh(sums)


@triton.jit
def scores_of(hidden, score_weight, k, width):
    return tl.sum(hidden * wide(tl.load(score_weight + k, mask=k < width, other=0.0))[None, :], 1)


@triton.jit
def _token_scores_kernel(
    x, proj, proj_bias, score_weight, score_bias, token_mask, scores, count, channels, width, blocks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scores [B, N] in fp32."""
    task = tl.program_id(0)
    b = (task // blocks).to(tl.int64)
    rows = task % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = permitted(rows, token_mask, b, count)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(0, channels, BLOCK_C):
            y = tile_of(x, b, rows, ok, start, channels, BLOCK_C)
            sums = product(y, tl.trans(proj_tile(proj, k, width, start, channels, BLOCK_C)), sums)
        total += scores_of(hidden_of(sums, proj_bias, k, width), score_weight, k, width)
    if score_bias is not None:
        total += wide(tl.load(score_bias))
    tl.store(scores + b * count + rows, total, mask=rows < count)


@triton.jit
def _pool_kernel(
    x, proj, proj_bias, score_weight, score_bias, token_mask, scores, tops, sums, maxima, count, channels, width, parts,
    per_part, col_blocks,
    MEAN: tl.constexpr, MAX: tl.constexpr, ATTENTION: tl.constexpr, SCORES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tops [B, parts, 4]: largest score, sum of exponentials, kept tokens; sums fp32 and maxima int32 [B, parts, 2, C]:
    sum and weighted sum, largest value and its token.  SCORES: they are computed here and stored, not loaded."""
    task = tl.program_id(0)
    part, start = task // col_blocks, task % col_blocks * BLOCK_C
    b = (part // parts).to(tl.int64)
    c = start + tl.arange(0, BLOCK_C)
    top, norm, tokens = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    total, weighted = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    best, first = tl.full([BLOCK_C], LOWEST, tl.int32), tl.zeros([BLOCK_C], tl.int32)
    begin = part % parts * per_part
    for row in range(begin, tl.minimum(begin + per_part, count), BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        ok = permitted(rows, token_mask, b, count)
        y = tile_of(x, b, rows, ok, start, channels, BLOCK_C)
        tokens += total_of(ok.to(tl.float32))
        if MEAN >= 0:
            total += tl.sum(wide(y), 0)
        if MAX >= 0:
            rank = tl.where(y == y, ordered(wide(y)), HIGHEST)
            rank = tl.where(ok[:, None], rank, LOWEST)
            found = tl.max(rank, 0)
            at = tl.min(tl.where(rank == found[None, :], rows[:, None], HIGHEST), 0)
            first = tl.where(found > best, at, first)
            best = tl.maximum(best, found)
        if ATTENTION >= 0:
            if SCORES:
                s = tl.zeros([BLOCK_R], tl.float32)
                for begin_k in range(0, width, BLOCK_K):
                    k = begin_k + tl.arange(0, BLOCK_K)
                    hidden = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
                    hidden = product(y, tl.trans(proj_tile(proj, k, width, 0, channels, BLOCK_C)), hidden)
                    s += scores_of(hidden_of(hidden, proj_bias, k, width), score_weight, k, width)
                if score_bias is not None:
                    s += wide(tl.load(score_bias))
                tl.store(scores + b * count + rows, s, mask=rows < count)
            else:
                s = tl.load(scores + b * count + rows, mask=rows < count, other=0.0)
            new = tl.maximum(top, greatest(tl.where(ok & (s == s), s, -INF)))
            base = tl.where(new > -INF, new, 0.0)
            weight = tl.where(ok, tl.exp(s - base), 0.0)
            fade = tl.exp(top - base)
            norm = norm * fade + total_of(weight)
            weighted = weighted * fade + tl.sum(weight[:, None] * wide(y), 0)
            top = new
    i = tl.arange(0, 4)
    tl.store(tops + part.to(tl.int64) * 4 + i, tl.where(i == 0, top, tl.where(i == 1, norm, tokens)),
             mask=(i < 3) & (start == 0))  # fmt: skip
    to = part.to(tl.int64) * 2 * channels + c
    if MEAN >= 0:
        tl.store(sums + to, total, mask=c < channels)
    if ATTENTION >= 0:
        tl.store(sums + to + channels, weighted, mask=c < channels)
    if MAX >= 0:
        tl.store(maxima + to, best, mask=c < channels)
        tl.store(maxima + to + channels, first, mask=c < channels)


@triton.jit
def _merge_pools_kernel(
    token_mask, pool_weights, tops, sums, maxima, out, pooled, first, attention, count, channels, parts, col_blocks,
    token_blocks,
    POOLS: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, ATTENTION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [B, C], pooled [B, pools, C], first [B, C]; attention [B, N] holds scores, which become weights."""
    task = tl.program_id(0)
    b = (task // (col_blocks + token_blocks)).to(tl.int64)
    block = task % (col_blocks + token_blocks)
    top, tokens = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
    for p in range(parts):
        top = tl.maximum(top, tl.load(tops + (b * parts + p) * 4))
        tokens += tl.load(tops + (b * parts + p) * 4 + 2)
    base = tl.where(top > -INF, top, 0.0)
    norm = tl.full([], 0.0, tl.float32)
    if ATTENTION >= 0:
        for p in range(parts):
            of_part = tops + (b * parts + p) * 4
            norm += tl.load(of_part + 1) * tl.exp(tl.load(of_part) - base)
    some = tokens > 0.0
    norm = tl.where(some, norm, 1.0)
    if block < col_blocks:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = c < channels
        mixed = tl.zeros([BLOCK_C], tl.float32)
        if MEAN >= 0:
            total = tl.zeros([BLOCK_C], tl.float32)
            for p in range(parts):
                total += tl.load(sums + (b * parts + p) * 2 * channels + c, mask=inside, other=0.0)
            value = total / tl.where(some, tokens, 1.0)
            tl.store(pooled + (b * POOLS + MEAN) * channels + c, value, mask=inside)
            mixed += mixture(pool_weights, MEAN, POOLS) * value
        if MAX >= 0:
            best, token = tl.full([BLOCK_C], LOWEST, tl.int32), tl.zeros([BLOCK_C], tl.int32)
            for p in range(parts):
                from_part = maxima + (b * parts + p) * 2 * channels + c
                found = tl.load(from_part, mask=inside, other=LOWEST)
                token = tl.where(found > best, tl.load(from_part + channels, mask=inside, other=0), token)
                best = tl.maximum(best, found)
            value = tl.where(best == HIGHEST, float("nan"), tl.where(best == LOWEST, 0.0, unordered(best)))
            tl.store(pooled + (b * POOLS + MAX) * channels + c, value, mask=inside)
            tl.store(first + b * channels + c, token, mask=inside)
            mixed += mixture(pool_weights, MAX, POOLS) * value
        if ATTENTION >= 0:
            total = tl.zeros([BLOCK_C], tl.float32)
            for p in range(parts):
                part = b * parts + p
                fade = tl.exp(tl.load(tops + part * 4) - base)
                total += fade * tl.load(sums + (part * 2 + 1) * channels + c, mask=inside, other=0.0)
            value = total / norm
            tl.store(pooled + (b * POOLS + ATTENTION) * channels + c, value, mask=inside)
            mixed += mixture(pool_weights, ATTENTION, POOLS) * value
        # Weights that are not finite must not reach a sample without tokens.
        mixed = tl.where(some, mixed, 0.0)
        tl.store(out + b * channels + c, narrow(mixed, out.dtype.element_ty), mask=inside)
    else:
        rows = (block - col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = attention + b * count + rows
        ok = permitted(rows, token_mask, b, count)
        weight = tl.exp(tl.load(at, mask=rows < count, other=0.0) - base) / norm
        tl.store(at, tl.where(ok, weight, 0.0), mask=rows < count)


# Backward.


@triton.jit
def gradient_of(grad_out, b, c, channels):
    """fp32 [C] of grad_out (pointer, strides of sample, channel)."""
    at = grad_out[0] + b * grad_out[1] + c.to(tl.int64) * grad_out[2]
    return wide(tl.load(at, mask=c < channels, other=0.0))


@triton.jit
def _pool_dots_kernel(
    grad_out, pooled, token_mask, dots, count, channels, POOLS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dots [B, 4]: <gradient, pool> of each pool, and last the number of kept tokens."""
    b = tl.program_id(0).to(tl.int64)
    for p in tl.static_range(POOLS):
        total = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            g = gradient_of(grad_out, b, c, channels)
            total += g * tl.load(pooled + (b * POOLS + p) * channels + c, mask=c < channels, other=0.0)
        tl.store(dots + b * 4 + p, tl.sum(total, 0))
    kept = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, count, BLOCK_R):
        kept += permitted(start + tl.arange(0, BLOCK_R), token_mask, b, count).to(tl.float32)
    tl.store(dots + b * 4 + 3, tl.sum(kept, 0))


@triton.jit
def _score_gradient_kernel(
    grad_out, x, proj, proj_bias, score_weight, pool_weights, token_mask, dots, attention, to_hidden, partial, count,
    channels, width, blocks, tiles, per_program, k_blocks,
    POOLS: tl.constexpr, ATTENTION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """to_hidden [B, N, K]: gradient to proj x + proj_bias.  partial [programs, 2 K]: each program's sums of it and of
    the gradient to score_weight; a program takes ``per_program`` tiles, one after the other."""
    task = tl.program_id(0)
    part = task // k_blocks
    k = task % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    share = mixture(pool_weights, ATTENTION, POOLS)
    behind = wide(tl.load(score_weight + k, mask=k < width, other=0.0))
    to_bias, to_weight = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for tile in range(part * per_program, tl.minimum((part + 1) * per_program, tiles)):
        b = (tile // blocks).to(tl.int64)
        rows = tile % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = permitted(rows, token_mask, b, count)
        along = tl.zeros([BLOCK_R], tl.float32)
        sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            y = tile_of(x, b, rows, ok, start, channels, BLOCK_C)
            g = gradient_of(grad_out, b, c, channels)
            along += tl.sum(wide(y) * g[None, :], 1)
            sums = product(y, tl.trans(proj_tile(proj, k, width, start, channels, BLOCK_C)), sums)
        weight = tl.load(attention + b * count + rows, mask=rows < count, other=0.0)
        of_score = tl.where(ok, share * weight * (along - tl.load(dots + b * 4 + ATTENTION)), 0.0)
        hidden = hidden_of(sums, proj_bias, k, width)
        of_hidden = of_score[:, None] * behind[None, :] * (1.0 - hidden * hidden)
        at = to_hidden + (b * count + rows.to(tl.int64))[:, None] * width + k[None, :]
        tl.store(at, narrow(of_hidden, to_hidden.dtype.element_ty), mask=(rows < count)[:, None] & (k < width)[None, :])
        to_bias += tl.sum(of_hidden, 0)
        to_weight += tl.sum(of_score[:, None] * hidden, 0)
    to = partial + part.to(tl.int64) * 2 * width
    tl.store(to + k, to_bias, mask=k < width)
    tl.store(to + width + k, to_weight, mask=k < width)


@triton.jit
def _pool_gradient_kernel(
    grad_out, proj, pool_weights, token_mask, dots, first, attention, to_hidden, grad, count, channels, width, blocks,
    col_blocks,
    POOLS: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, ATTENTION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad [B, N, C]."""
    task = tl.program_id(0)
    b = (task // (blocks * col_blocks)).to(tl.int64)
    start = task % col_blocks * BLOCK_C
    rows = task // col_blocks % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = start + tl.arange(0, BLOCK_C)
    ok = permitted(rows, token_mask, b, count)
    g = gradient_of(grad_out, b, c, channels)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if ATTENTION >= 0:
        for begin in range(0, width, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            at = to_hidden + (b * count + rows.to(tl.int64))[:, None] * width + k[None, :]
            d = tl.load(at, mask=(rows < count)[:, None] & (k < width)[None, :], other=0.0)
            w = proj_tile(proj, k, width, start, channels, BLOCK_C)
            if d.dtype == w.dtype:
                total = product(d, w, total)
            else:
                total = fitted_product(d, w, total)
        weight = tl.load(attention + b * count + rows, mask=rows < count, other=0.0)
        total += (mixture(pool_weights, ATTENTION, POOLS) * weight)[:, None] * g[None, :]
    if MEAN >= 0:
        kept = tl.maximum(tl.load(dots + b * 4 + 3), 1.0)
        total += (mixture(pool_weights, MEAN, POOLS) * g / kept)[None, :]
    if MAX >= 0:
        largest = tl.load(first + b * channels + c, mask=c < channels, other=-1)
        total += tl.where(largest[None, :] == rows[:, None], (mixture(pool_weights, MAX, POOLS) * g)[None, :], 0.0)
    total = tl.where(ok[:, None], total, 0.0)
    to = grad + (b * count + rows.to(tl.int64))[:, None] * channels + c[None, :]
    tl.store(to, narrow(total, grad.dtype.element_ty), mask=(rows < count)[:, None] & (c < channels)[None, :])


@triton.jit
def _mixture_gradient_kernel(pool_weights, dots, grad, batch, POOLS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, 4)
    total = tl.zeros([BLOCK, 4], tl.float32)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        at = b.to(tl.int64)[:, None] * 4 + i[None, :]
        total += tl.load(dots + at, mask=(b < batch)[:, None] & (i < POOLS)[None, :], other=0.0)
    along = tl.sum(total, 0)
    mean = tl.full([], 0.0, tl.float32)
    for p in tl.static_range(POOLS):
        mean += mixture(pool_weights, p, POOLS) * total_of(tl.where(i == p, along, 0.0))
    for p in tl.static_range(POOLS):
        value = mixture(pool_weights, p, POOLS) * (total_of(tl.where(i == p, along, 0.0)) - mean)
        tl.store(grad + p, narrow(value, grad.dtype.element_ty))
