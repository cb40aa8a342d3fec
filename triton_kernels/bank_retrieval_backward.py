"""Gradients of retrieval from a bank, from the rows that forward kept: no atomics, one order of every sum.

``_bank_score_gradient_kernel``  of the scores, with the softmax made again, and of the scale; one program per query
``_bank_query_gradient_kernel``  of the query: the kept rows, weighted
``_bank_rows_gradient_kernel``   of a bank row: what the queries that kept it give, in their order
"""

import triton
import triton.language as tl

from .bank_retrieval import scale_of, softmax_bounds, total_of
from .tiles import narrow, wide


@triton.jit
def _bank_score_gradient_kernel(
    grad_retrieved, grad_scores, rows, scores, indices, scale, shares, of_scores, of_scale, topk,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """shares, of_scores [B, topk]; of_scale [B], the gradient of the factor before all logits.

    grad_retrieved [B, E], grad_scores [B, topk]: (pointer, strides) or None; rows [B, topk, E]: the kept values.
    """
    b = tl.program_id(0).to(tl.int64)
    kept, slot = b * topk, tl.arange(0, BLOCK_L)
    factor = scale_of(scale)
    base, norm = softmax_bounds(scores + kept, indices + kept, topk, factor, BLOCK_L)
    means = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + slot
        listed = tl.load(indices + kept + t, mask=t < topk, other=-1) >= 0
        logit = factor * tl.load(scores + kept + t, mask=listed, other=0.0)
        share = tl.where(listed, tl.exp(logit - base) / norm, 0.0)
        along = tl.zeros([BLOCK_L], tl.float32)
        if grad_retrieved is not None:
            for first in range(0, WIDTH, BLOCK_E):
                e = first + tl.arange(0, BLOCK_E)
                g = wide(tl.load(grad_retrieved[0] + b * grad_retrieved[1] + e.to(tl.int64) * grad_retrieved[2],
                                 mask=e < WIDTH, other=0.0))  # fmt: skip
                at = (kept + t)[:, None] * WIDTH + e[None, :]
                v = wide(tl.load(rows + at, mask=listed[:, None] & (e < WIDTH)[None, :], other=0.0))
                along += tl.sum(v * g[None, :], 1)
        means += tl.where(listed, share * along, 0.0)
        tl.store(shares + kept + t, share, mask=t < topk)
        tl.store(of_scores + kept + t, along, mask=t < topk)
    mean = total_of(means)
    tl.debug_barrier()
    to_scale = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + slot
        listed = tl.load(indices + kept + t, mask=t < topk, other=-1) >= 0
        share = tl.load(shares + kept + t, mask=listed, other=0.0)
        score = tl.load(scores + kept + t, mask=listed, other=0.0)
        moved = share * (tl.load(of_scores + kept + t, mask=listed, other=0.0) - mean)
        to_scale += tl.where(listed, moved * score, 0.0)
        result = factor * moved
        if grad_scores is not None:
            at = b * grad_scores[1] + t.to(tl.int64) * grad_scores[2]
            result += tl.load(grad_scores[0] + at, mask=listed, other=0.0)
        tl.debug_barrier()  # a tile of 16 lies in several warps, each of which has to have read it
        tl.store(of_scores + kept + t, tl.where(listed, result, 0.0), mask=t < topk)
    tl.store(of_scale + b, total_of(to_scale))


@triton.jit
def _bank_query_gradient_kernel(
    rows, indices, of_scores, grad, topk, blocks, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr
):
    """grad [B, C] from rows [B, topk, C]."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_E
    kept = b.to(tl.int64) * topk
    d = first + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        listed = tl.load(indices + kept + t, mask=t < topk, other=-1) >= 0
        part = tl.load(of_scores + kept + t, mask=listed, other=0.0)
        at = (kept + t)[:, None] * WIDTH + d[None, :]
        x = wide(tl.load(rows + at, mask=listed[:, None] & (d < WIDTH)[None, :], other=0.0))
        total += tl.sum(tl.where(listed[:, None], part[:, None] * x, 0.0), 0)
    tl.store(grad + b.to(tl.int64) * WIDTH + d, narrow(total, grad.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def given(source, weights, entries, topk, e, ok, WIDTH: tl.constexpr):
    """What the entries [L] (query * topk + slot) give: weight times row ``query`` of source (pointer, strides)."""
    b = entries // topk
    weight = tl.load(weights + entries, mask=ok, other=0.0)
    at = b[:, None] * source[1] + e.to(tl.int64)[None, :] * source[2]
    x = wide(tl.load(source[0] + at, mask=ok[:, None] & (e < WIDTH)[None, :], other=0.0))
    return tl.sum(tl.where(ok[:, None], weight[:, None] * x, 0.0), 0)


@triton.jit
def _bank_rows_gradient_kernel(
    first_source, first_weights, second_source, second_weights, entries, starts, grad, topk, blocks,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad [M, WIDTH]: sums of weights [B, topk] times rows of sources [B, WIDTH], over the entries of each bank row.

    entries: all slots of all queries, sorted by the bank row that they keep; starts [M + 1]: where each row's begin.
    second_source: None where keys and values have gradients of their own.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    end = tl.load(starts + row + 1)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(tl.load(starts + row), end, BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        own = tl.load(entries + at, mask=at < end, other=0)
        if first_source is not None:
            total += given(first_source, first_weights, own, topk, e, at < end, WIDTH)
        if second_source is not None:
            total += given(second_source, second_weights, own, topk, e, at < end, WIDTH)
    tl.store(grad + row * WIDTH + e, narrow(total, grad.dtype.element_ty), mask=e < WIDTH)
