"""Attention over all pairs, or over those that a bitmask keeps, on the GPU: tiles of scores that never leave a program.

``_attention_forward_kernel``  a block of queries against all keys, online softmax (arXiv 2307.08691)
"""

import triton
import triton.language as tl

from .bitmask import kept_pairs
from .tiles import (
    INF,
    LN2,
    LOG2E,
    Place,
    Rules,
    biased,
    dots,
    dropout_factor,
    fitted_product,
    grown,
    is_finite,
    load_rows,
    narrow,
    permitted,
    segment,
    shrunk,
    slice_of,
    some_wild,
    spoiled,
)


@triton.jit
def judged_tile(
    x, rows_ok, query, key, at, rules, rows, row_start, start,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """(scores, valid, kept) of the rows and the columns from ``start`` on."""
    cols = start + tl.arange(0, BLOCK_C)
    row_ptr = slice_of(query, at.batch, at.h, at.first)
    col_ptr = slice_of(key, at.col_batch, at.h, at.col_first)
    total = dots(
        x, row_ptr, query[3], rows, at.n_rows, col_ptr, key[3], cols, at.n_cols, WIDTH, BLOCK_D, BLOCK_R, BLOCK_C
    )
    valid = rows_ok & permitted(cols, rules.key_mask, at.b, at.n_cols)[None, :]
    scores, valid = biased(total, rules.scale, valid, rules.mask, at.b, at.h, rows[:, None], cols[None, :])
    return scores, valid, kept_pairs(valid, rules.bits, at, rows, row_start, cols, start, BITS, BLOCK_R, BLOCK_C)


@triton.jit
def attend_block(
    query, key, value, at, rules, row_start,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LISTED_ONLY: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(sums, norm, top, gone) of a block of queries.

    CAREFUL: values that are not finite are left out, the others shrunk; otherwise the same steps, so that a value that
    no row keeps changes no bit.
    """
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_R], tl.float32)
    gone = tl.zeros([BLOCK_R], tl.int32)
    sums = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    rows = row_start + tl.arange(0, BLOCK_R)
    rows_ok = permitted(rows, rules.query_mask, at.b, at.n_rows)[:, None]
    value_ptr = slice_of(value, at.col_batch, at.h, at.col_first)
    x = load_rows(slice_of(query, at.batch, at.h, at.first), query[3], rows, at.n_rows, 0, WIDTH, BLOCK_D)
    for start in range(0, at.n_cols, BLOCK_C):
        scores, valid, kept = judged_tile(
            x, rows_ok, query, key, at, rules, rows, row_start, start, WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BITS
        )
        judged = kept if LISTED_ONLY else valid
        gone = tl.maximum(gone, tl.max((judged & ~(scores < INF)).to(tl.int32), 1))
        kept = kept & (scores < INF)
        new_top = tl.maximum(top, tl.max(tl.where(kept, scores, -INF), 1))
        base = tl.where(new_top > -INF, new_top, 0.0)
        weight = tl.where(kept, tl.exp2((scores - base[:, None]) * LOG2E), 0.0)
        fade = tl.exp2((top - base) * LOG2E)
        norm = norm * fade + tl.sum(weight, 1)
        cols = start + tl.arange(0, BLOCK_C)
        if rules.seed is not None:
            weight *= dropout_factor(rules.seed, rules.dropout_p, at.b, at.h, rows[:, None], cols[None, :])
        v = load_rows(value_ptr, value[3], cols, at.n_cols, 0, VALUE_WIDTH, BLOCK_E)
        sums = sums * fade[:, None]
        if CAREFUL:
            clean = tl.where(is_finite(v), v, 0.0)
            sums = fitted_product(weight, shrunk(clean), sums)
        else:
            sums = fitted_product(weight, v, sums)
        top = new_top
    return sums, norm, top, gone


@triton.jit
def spoiled_rows(
    query, key, value, at, rules, row_start,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What the values that are not finite add to the rows that keep them [R, E]; apart, to spare registers."""
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    rows = row_start + tl.arange(0, BLOCK_R)
    rows_ok = permitted(rows, rules.query_mask, at.b, at.n_rows)[:, None]
    value_ptr = slice_of(value, at.col_batch, at.h, at.col_first)
    x = load_rows(slice_of(query, at.batch, at.h, at.first), query[3], rows, at.n_rows, 0, WIDTH, BLOCK_D)
    for start in range(0, at.n_cols, BLOCK_C):
        _, _, kept = judged_tile(
            x, rows_ok, query, key, at, rules, rows, row_start, start, WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BITS
        )
        cols = start + tl.arange(0, BLOCK_C)
        total += spoiled(kept, load_rows(value_ptr, value[3], cols, at.n_cols, 0, VALUE_WIDTH, BLOCK_E))
    return total


@triton.jit
def _attention_forward_kernel(
    query, key, value, out, lse, bits, mask, query_mask, key_mask, seed, dropout_p, scale, heads, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LISTED_ONLY: tl.constexpr,
):  # fmt: skip
    """LISTED_ONLY: a NaN or +inf score loses its row only where the bitmask keeps it."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    row_start = (task % blocks) * BLOCK_R
    if row_start < n_rows:
        at = Place(b, h, batch, first, n_rows, col_batch, col_first, n_cols)
        rules = Rules(bits, mask, query_mask, key_mask, seed, dropout_p, scale)
        sums, norm, top, gone = attend_block(
            query, key, value, at, rules, row_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS,
            LISTED_ONLY, False,
        )  # fmt: skip
        some = norm > 0.0
        norm = tl.where(some, norm, 1.0)
        mean = sums / norm[:, None]
        wild = ~is_finite(mean)
        if some_wild(mean):
            sums, _, _, _ = attend_block(
                query, key, value, at, rules, row_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS,
                LISTED_ONLY, True,
            )  # fmt: skip
            mean = tl.where(wild, grown(sums / norm[:, None], value[0].dtype.element_ty), mean)
            mean += spoiled_rows(
                query, key, value, at, rules, row_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS
            )
        blank = tl.where(gone > 0, float("nan"), 0.0)
        logs = tl.where(some, top + tl.log2(norm) * LN2, -INF) + blank
        rows = row_start + tl.arange(0, BLOCK_R)
        tl.store(lse[0] + batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows, logs, mask=rows < n_rows)
        e = tl.arange(0, BLOCK_E)
        to = out[0] + batch * out[1] + h.to(tl.int64) * out[2] + (first + rows.to(tl.int64))[:, None] * out[3]
        mean = narrow(mean + blank[:, None], out[0].dtype.element_ty)
        tl.store(to + e[None, :], mean, mask=(rows[:, None] < n_rows) & (e[None, :] < VALUE_WIDTH))
