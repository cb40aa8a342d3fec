"""Gradients of attention over all pairs, or over those that a bitmask keeps, on the GPU.

``_delta_kernel``           delta_i = <g_i, out_i> - dL/d lse_i
``_query_gradient_kernel``  dq of a block of queries
``_key_gradient_kernel``    dk and dv of a block of keys, head after head of the group: no atomics
``_bias_gradient_kernel``   d bias of a block of it, summed over what it broadcasts to
"""

import triton
import triton.language as tl

from .bitmask import kept_pairs
from .tiles import (
    LOG2E,
    Place,
    Rules,
    biased,
    dots,
    dropout_factor,
    fitted_product,
    is_finite,
    load_rows,
    narrow,
    no_more_than_0,
    permitted,
    product,
    segment,
    slice_of,
    some_wild,
    spoiled,
    wide,
)


@triton.jit
def _delta_kernel(
    grad_out, out, grad_lse, delta, heads, tokens, blocks, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] in fp32; packed calls need no segments here."""
    task = tl.program_id(0)
    b, h = ((task // blocks) // heads).to(tl.int64), ((task // blocks) % heads).to(tl.int64)
    rows = (task % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    g = load_rows(grad_out[0] + b * grad_out[1] + h * grad_out[2], grad_out[3], rows, tokens, 0, VALUE_WIDTH, BLOCK_E)
    o = load_rows(out[0] + b * out[1] + h * out[2], out[3], rows, tokens, 0, VALUE_WIDTH, BLOCK_E)
    result = tl.sum(wide(g) * wide(o), 1)
    if grad_lse is not None:
        at = grad_lse[0] + b * grad_lse[1] + h * grad_lse[2] + rows.to(tl.int64) * grad_lse[3]
        result -= tl.load(at, mask=rows < tokens, other=0.0)
    tl.store(delta + (b * heads + h) * tokens + rows, result, mask=rows < tokens)


@triton.jit
def load_queries(
    query, grad_out, lse, delta, at, rows,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(q, g, lse, delta) of the rows."""
    q = load_rows(slice_of(query, at.batch, at.h, at.first), query[3], rows, at.n_rows, 0, WIDTH, BLOCK_D)
    g = load_rows(slice_of(grad_out, at.batch, at.h, at.first), grad_out[3], rows, at.n_rows, 0, VALUE_WIDTH, BLOCK_E)
    at_lse = at.batch * lse[1] + at.h.to(tl.int64) * lse[2] + at.first + rows
    logs = tl.load(lse[0] + at_lse, mask=rows < at.n_rows, other=0.0)
    minus = tl.load(delta + at_lse, mask=rows < at.n_rows, other=0.0)
    return q, g, logs, minus


@triton.jit
def scores_again(
    q, k, query, key, at, rows, cols,
    WIDTH: tl.constexpr, LINK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<row, column> summed as forward sums it, so that P comes out as it was: huge scores forgive no other rounding."""
    if LINK < WIDTH:
        row_ptr = slice_of(query, at.batch, at.h, at.first)
        col_ptr = slice_of(key, at.col_batch, at.h, at.col_first)
        x = load_rows(row_ptr, query[3], rows, at.n_rows, 0, WIDTH, LINK)
        return dots(
            x, row_ptr, query[3], rows, at.n_rows, col_ptr, key[3], cols, at.n_cols, WIDTH, LINK, BLOCK_R, BLOCK_C
        )
    else:
        return product(q, tl.trans(k), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))


@triton.jit
def slopes(
    q, k, v, g, logs, minus, valid, query, key, at, rules, rows, row_start, cols, col_start,
    WIDTH: tl.constexpr, LINK: tl.constexpr, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(weight after dropout, ds) of one tile, [R, C] each; 0 where a pair is not kept.  valid: of tokens that take
    part."""
    total = scores_again(q, k, query, key, at, rows, cols, WIDTH, LINK, BLOCK_R, BLOCK_C)
    scores, valid = biased(total, rules.scale, valid, rules.mask, at.b, at.h, rows[:, None], cols[None, :])
    kept = kept_pairs(valid, rules.bits, at, rows, row_start, cols, col_start, BITS, BLOCK_R, BLOCK_C)
    # A weight is at most 1; rounding may not make more of it.
    weight = tl.where(kept, tl.exp2(no_more_than_0((scores - logs[:, None]) * LOG2E)), 0.0)
    slope = product(g, tl.trans(v), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))
    thinned = weight
    if rules.seed is not None:
        factor = dropout_factor(rules.seed, rules.dropout_p, at.b, at.h, rows[:, None], cols[None, :])
        slope *= factor
        thinned = weight * factor
    return thinned, tl.where(kept, weight * (slope - minus[:, None]), 0.0)


# Queries.


@triton.jit
def query_gradient(
    query, key, value, g, logs, minus, at, rules, row_start,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """sum_j ds_ij k_j of a block of queries.  CAREFUL: entries of k that are not finite are left out."""
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    rows = row_start + tl.arange(0, BLOCK_R)
    rows_ok = permitted(rows, rules.query_mask, at.b, at.n_rows)[:, None]
    key_ptr = slice_of(key, at.col_batch, at.h, at.col_first)
    value_ptr = slice_of(value, at.col_batch, at.h, at.col_first)
    q = load_rows(slice_of(query, at.batch, at.h, at.first), query[3], rows, at.n_rows, 0, WIDTH, BLOCK_D)
    for start in range(0, at.n_cols, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        k = load_rows(key_ptr, key[3], cols, at.n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(value_ptr, value[3], cols, at.n_cols, 0, VALUE_WIDTH, BLOCK_E)
        valid = rows_ok & permitted(cols, rules.key_mask, at.b, at.n_cols)[None, :]
        _, ds = slopes(
            q, k, v, g, logs, minus, valid, query, key, at, rules, rows, row_start, cols, start, WIDTH, LINK, BITS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if CAREFUL:
            k = tl.where(is_finite(k), k, 0.0)
        sums = fitted_product(ds, k, sums)
    return sums


@triton.jit
def _query_gradient_kernel(
    query, key, value, grad_out, lse, delta, grad_query, bits, mask, query_mask, key_mask, seed, dropout_p, scale,
    heads, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j ds_ij k_j.  A first pass that yields NaN or infinity is repeated with keys made finite: a pair
    that is not kept must not bring 0 * NaN."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    row_start = (task % blocks) * BLOCK_R
    if row_start < n_rows:
        at = Place(b, h, batch, first, n_rows, col_batch, col_first, n_cols)
        rules = Rules(bits, mask, query_mask, key_mask, seed, dropout_p, scale)
        rows = row_start + tl.arange(0, BLOCK_R)
        _, g, logs, minus = load_queries(query, grad_out, lse, delta, at, rows, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E)
        sums = query_gradient(
            query, key, value, g, logs, minus, at, rules, row_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D,
            BLOCK_E, BITS, LINK, False,
        )  # fmt: skip
        if some_wild(sums):
            sums = query_gradient(
                query, key, value, g, logs, minus, at, rules, row_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D,
                BLOCK_E, BITS, LINK, True,
            )  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        to = grad_query[0] + batch * grad_query[1] + h.to(tl.int64) * grad_query[2]
        to = to + (first + rows.to(tl.int64))[:, None] * grad_query[3] + d[None, :]
        in_rows = (rows[:, None] < n_rows) & (d[None, :] < WIDTH)
        tl.store(to, narrow(sums * scale, grad_query[0].dtype.element_ty), mask=in_rows)


# Keys and values.


@triton.jit
def key_gradient(
    query, key, grad_out, lse, delta, k, v, group, at, rules, col_start,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(sum_i ds_ij q_i, sum_i d_ij p_ij g_i) of a block of keys, over the query heads of the group.

    CAREFUL: entries of q and g that are not finite are left out.
    """
    key_sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    cols = col_start + tl.arange(0, BLOCK_C)
    cols_ok = permitted(cols, rules.key_mask, at.b, at.n_cols)[None, :]
    repeats = tl.full([], 0, tl.int32) + key[5]
    steps = tl.cdiv(at.n_rows, BLOCK_R)
    for step in range(repeats * steps):
        h = group * repeats + step // steps
        here = Place(at.b, h, at.batch, at.first, at.n_rows, at.col_batch, at.col_first, at.n_cols)
        row_start = (step % steps) * BLOCK_R
        rows = row_start + tl.arange(0, BLOCK_R)
        q, g, logs, minus = load_queries(query, grad_out, lse, delta, here, rows, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E)
        valid = permitted(rows, rules.query_mask, at.b, at.n_rows)[:, None] & cols_ok
        thinned, ds = slopes(
            q, k, v, g, logs, minus, valid, query, key, here, rules, rows, row_start, cols, col_start, WIDTH, LINK,
            BITS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if CAREFUL:
            q = tl.where(is_finite(q), q, 0.0)
            g = tl.where(is_finite(g), g, 0.0)
        value_sums = fitted_product(tl.trans(thinned), g, value_sums)
        key_sums = fitted_product(tl.trans(ds), q, key_sums)
    return key_sums, value_sums


@triton.jit
def spoiled_values(
    query, key, grad_out, k, group, at, rules, col_start,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What entries of g that are not finite add to dv [C, E]; apart from the sums, which need the registers."""
    total = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    cols = col_start + tl.arange(0, BLOCK_C)
    cols_ok = permitted(cols, rules.key_mask, at.b, at.n_cols)[None, :]
    repeats = tl.full([], 0, tl.int32) + key[5]
    steps = tl.cdiv(at.n_rows, BLOCK_R)
    for step in range(repeats * steps):
        h = group * repeats + step // steps
        here = Place(at.b, h, at.batch, at.first, at.n_rows, at.col_batch, at.col_first, at.n_cols)
        row_start = (step % steps) * BLOCK_R
        rows = row_start + tl.arange(0, BLOCK_R)
        q = load_rows(slice_of(query, at.batch, h, at.first), query[3], rows, at.n_rows, 0, WIDTH, BLOCK_D)
        dot = product(q, tl.trans(k), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))
        valid = permitted(rows, rules.query_mask, at.b, at.n_rows)[:, None] & cols_ok
        _, valid = biased(dot, rules.scale, valid, rules.mask, at.b, h, rows[:, None], cols[None, :])
        kept = kept_pairs(valid, rules.bits, here, rows, row_start, cols, col_start, BITS, BLOCK_R, BLOCK_C)
        grad_ptr = slice_of(grad_out, at.batch, h, at.first)
        g = load_rows(grad_ptr, grad_out[3], rows, at.n_rows, 0, VALUE_WIDTH, BLOCK_E)
        total += spoiled(tl.trans(kept.to(tl.int32)) != 0, g)
    return total


@triton.jit
def _key_gradient_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, bits, mask, query_mask, key_mask, seed, dropout_p,
    scale, groups, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i ds_ij q_i and dv_j = sum_i d_ij p_ij g_i, over the query heads of the group in turn."""
    task = tl.program_id(0)
    b, group = (task // blocks) // groups, (task // blocks) % groups
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    col_start = (task % blocks) * BLOCK_C
    if col_start < n_cols:
        h = group * key[5]
        at = Place(b, h, batch, first, n_rows, col_batch, col_first, n_cols)
        rules = Rules(bits, mask, query_mask, key_mask, seed, dropout_p, scale)
        cols = col_start + tl.arange(0, BLOCK_C)
        k = load_rows(slice_of(key, col_batch, h, col_first), key[3], cols, n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(slice_of(value, col_batch, h, col_first), value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
        key_sums, value_sums = key_gradient(
            query, key, grad_out, lse, delta, k, v, group, at, rules, col_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C,
            BLOCK_D, BLOCK_E, BITS, LINK, False,
        )  # fmt: skip
        if some_wild(key_sums) | some_wild(value_sums):
            key_sums, value_sums = key_gradient(
                query, key, grad_out, lse, delta, k, v, group, at, rules, col_start, WIDTH, VALUE_WIDTH, BLOCK_R,
                BLOCK_C, BLOCK_D, BLOCK_E, BITS, LINK, True,
            )  # fmt: skip
            value_sums += spoiled_values(
                query, key, grad_out, k, group, at, rules, col_start, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D,
                BLOCK_E, BITS,
            )  # fmt: skip
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        at_head = group.to(tl.int64)
        token = (col_first + cols.to(tl.int64))[:, None]
        to = grad_key[0] + col_batch * grad_key[1] + at_head * grad_key[2] + token * grad_key[3] + d[None, :]
        in_keys = (cols[:, None] < n_cols) & (d[None, :] < WIDTH)
        tl.store(to, narrow(key_sums * scale, grad_key[0].dtype.element_ty), mask=in_keys)
        to = grad_value[0] + col_batch * grad_value[1] + at_head * grad_value[2] + token * grad_value[3] + e[None, :]
        in_values = (cols[:, None] < n_cols) & (e[None, :] < VALUE_WIDTH)
        tl.store(to, narrow(value_sums, grad_value[0].dtype.element_ty), mask=in_values)


# The bias.


@triton.jit
def _bias_gradient_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, bits, mask, query_mask, key_mask, seed, dropout_p, scale,
    batches, heads, bias_heads, row_blocks, col_blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr, OVER_BATCHES: tl.constexpr, OVER_HEADS: tl.constexpr,
    OVER_ROWS: tl.constexpr, OVER_COLS: tl.constexpr,
):  # fmt: skip
    """A block of the bias's gradient, fp32; OVER_x: the bias broadcasts over x and the block sums over it, in order."""
    task = tl.program_id(0)
    own_cols = 1 if OVER_COLS else col_blocks
    own_rows = 1 if OVER_ROWS else row_blocks
    col_block, task = task % own_cols, task // own_cols
    row_block, task = task % own_rows, task // own_rows
    bias_head, bias_batch = task % bias_heads, task // bias_heads
    n_batches = batches if OVER_BATCHES else 1
    n_heads = heads if OVER_HEADS else 1
    n_row_blocks = row_blocks if OVER_ROWS else 1
    n_col_blocks = col_blocks if OVER_COLS else 1
    rules = Rules(bits, mask, query_mask, key_mask, seed, dropout_p, scale)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in range(n_batches * n_heads * n_row_blocks * n_col_blocks):
        col_start = (col_block + step % n_col_blocks) * BLOCK_C
        rest = step // n_col_blocks
        row_start = (row_block + rest % n_row_blocks) * BLOCK_R
        rest = rest // n_row_blocks
        h = bias_head + rest % n_heads
        b = bias_batch + rest // n_heads
        batch, first, n_rows = segment(query, b)
        _, col_first, n_cols = segment(key, b)
        rows = row_start + tl.arange(0, BLOCK_R)
        cols = col_start + tl.arange(0, BLOCK_C)
        at = Place(b, h, batch, first, n_rows, batch, col_first, n_cols)
        k = load_rows(slice_of(key, batch, h, col_first), key[3], cols, n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(slice_of(value, batch, h, col_first), value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
        q, g, logs, minus = load_queries(query, grad_out, lse, delta, at, rows, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E)
        valid = permitted(rows, query_mask, b, n_rows)[:, None] & permitted(cols, key_mask, b, n_cols)[None, :]
        _, ds = slopes(
            q, k, v, g, logs, minus, valid, query, key, at, rules, rows, row_start, cols, col_start, WIDTH, LINK, BITS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        sums += ds
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = col_block * BLOCK_C + tl.arange(0, BLOCK_C)
    n_rows, n_cols = query[4], key[4]
    if OVER_ROWS:
        sums = tl.where(rows[:, None] == 0, tl.sum(sums, 0)[None, :], 0.0)
        n_rows = 1
    if OVER_COLS:
        sums = tl.where(cols[None, :] == 0, tl.sum(sums, 1)[:, None], 0.0)
        n_cols = 1
    bias_slice = (bias_batch * bias_heads + bias_head).to(tl.int64)
    to = grad_bias + (bias_slice * n_rows + rows[:, None]) * n_cols + cols[None, :]
    tl.store(to, sums, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols))
