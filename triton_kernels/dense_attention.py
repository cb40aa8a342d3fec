"""Attention over all pairs, or over those that a bitmask keeps, on the GPU: tiles of scores that never leave a program.

``_attention_forward_kernel``       a block of queries against all keys, online softmax (arXiv 2307.08691)
``_delta_kernel``                   delta_i = <g_i, out_i> - dL/d lse_i
``_query_gradient_kernel``          dq of a block of queries
``_key_gradient_kernel``            dk and dv of a block of keys, head after head of the group: no atomics
``_bias_gradient_kernel``           d bias of a block of it, summed over what it broadcasts to
``_pack_lists_kernel``              lists -> bitmask, 32 columns a word

bits: None, or (pointer, strides of batch, head, row).  BITS says whose rows they are: 0 no bitmask, 1 queries (a word
holds 32 keys), 2 keys (a word holds 32 queries).
"""

import triton
import triton.language as tl

from .tiles import (
    INF,
    LN2,
    LOG2E,
    biased,
    dots,
    dropout_factor,
    fitted_product,
    grown,
    is_finite,
    load_rows,
    narrow,
    no_more_than_0,
    permitted,
    product,
    segment,
    shrunk,
    slice_of,
    some_wild,
    spoiled,
    wide,
)


@triton.jit
def load_bits(bits, batch, h, first, rows, n_rows, start, n_cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bool [R, C]: the bits of columns start .. start + BLOCK_C of the rows; start is a multiple of BLOCK_C."""
    base = bits[0] + batch * bits[1] + h.to(tl.int64) * bits[2]
    at = (first + rows.to(tl.int64))[:, None] * bits[3]
    if BLOCK_C < 32:
        cols = start + tl.arange(0, BLOCK_C)
        words = tl.load(base + at + start // 32, mask=(rows[:, None] < n_rows) & (start < n_cols), other=0)
        return ((words >> (cols & 31)[None, :]) & 1) != 0
    else:
        word = start // 32 + tl.arange(0, BLOCK_C // 32)
        inside = (rows[:, None] < n_rows) & (word[None, :] * 32 < n_cols)
        words = tl.load(base + at + word[None, :], mask=inside, other=0)
        bit = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        return tl.reshape(bit, [BLOCK_R, BLOCK_C]) != 0


@triton.jit
def kept_pairs(
    valid, bits, batch, col_batch, h, first, col_first, rows, row_start, n_rows, cols, col_start, n_cols,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """valid, without the pairs that the bitmask leaves out."""
    if BITS == 1:
        valid = valid & load_bits(bits, batch, h, first, rows, n_rows, col_start, n_cols, BLOCK_R, BLOCK_C)
    elif BITS == 2:
        listed = load_bits(bits, col_batch, h, col_first, cols, n_cols, row_start, n_rows, BLOCK_C, BLOCK_R)
        valid = valid & tl.trans(listed)
    return valid


@triton.jit
def attend_block(
    row_ptr, query, key_ptr, key, value_ptr, value, bits, batch, col_batch, b, h, first, col_first, rows, row_start,
    n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LISTED_ONLY: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(sums, norm, top, gone) of a block of queries.  CAREFUL: values that are not finite are left out, the others
    shrunk;
    otherwise the same steps, so that a value that no row keeps changes no bit."""
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_R], tl.float32)
    gone = tl.zeros([BLOCK_R], tl.int32)
    sums = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    rows_ok = permitted(rows, query_mask, b, n_rows)[:, None]
    x = load_rows(row_ptr, query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
    for start in range(0, n_cols, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        total = dots(
            x, row_ptr, query[3], rows, n_rows, key_ptr, key[3], cols, n_cols, WIDTH, BLOCK_D, BLOCK_R, BLOCK_C
        )
        valid = rows_ok & permitted(cols, key_mask, b, n_cols)[None, :]
        scores, valid = biased(total, scale, valid, mask, b, h, rows[:, None], cols[None, :])
        kept = kept_pairs(
            valid, bits, batch, col_batch, h, first, col_first, rows, row_start, n_rows, cols, start, n_cols, BITS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        judged = kept if LISTED_ONLY else valid
        gone = tl.maximum(gone, tl.max((judged & ~(scores < INF)).to(tl.int32), 1))
        kept = kept & (scores < INF)
        new_top = tl.maximum(top, tl.max(tl.where(kept, scores, -INF), 1))
        base = tl.where(new_top > -INF, new_top, 0.0)
        weight = tl.where(kept, tl.exp2((scores - base[:, None]) * LOG2E), 0.0)
        fade = tl.exp2((top - base) * LOG2E)
        norm = norm * fade + tl.sum(weight, 1)
        if seed is not None:
            weight *= dropout_factor(seed, dropout_p, b, h, rows[:, None], cols[None, :])
        v = load_rows(value_ptr, value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
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
    x, row_ptr, query, key_ptr, key, value_ptr, value, bits, batch, col_batch, b, h, first, col_first, rows, row_start,
    n_rows, n_cols, query_mask, key_mask, mask, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What the values that are not finite add to the rows that keep them [R, E]; apart, to spare registers."""
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    rows_ok = permitted(rows, query_mask, b, n_rows)[:, None]
    for start in range(0, n_cols, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        dot = dots(x, row_ptr, query[3], rows, n_rows, key_ptr, key[3], cols, n_cols, WIDTH, BLOCK_D, BLOCK_R, BLOCK_C)
        valid = rows_ok & permitted(cols, key_mask, b, n_cols)[None, :]
        _, valid = biased(dot, scale, valid, mask, b, h, rows[:, None], cols[None, :])
        kept = kept_pairs(
            valid, bits, batch, col_batch, h, first, col_first, rows, row_start, n_rows, cols, start, n_cols, BITS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        total += spoiled(kept, load_rows(value_ptr, value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E))
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
    rows = row_start + tl.arange(0, BLOCK_R)
    if row_start < n_rows:
        row_ptr = slice_of(query, batch, h, first)
        key_ptr = slice_of(key, col_batch, h, col_first)
        value_ptr = slice_of(value, col_batch, h, col_first)
        sums, norm, top, gone = attend_block(
            row_ptr, query, key_ptr, key, value_ptr, value, bits, batch, col_batch, b, h, first, col_first, rows,
            row_start, n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH, VALUE_WIDTH, BLOCK_R,
            BLOCK_C, BLOCK_D, BLOCK_E, BITS, LISTED_ONLY, False,
        )  # fmt: skip
        some = norm > 0.0
        norm = tl.where(some, norm, 1.0)
        mean = sums / norm[:, None]
        wild = ~is_finite(mean)
        if some_wild(mean):
            sums, _, _, _ = attend_block(
                row_ptr, query, key_ptr, key, value_ptr, value, bits, batch, col_batch, b, h, first, col_first, rows,
                row_start, n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH, VALUE_WIDTH,
                BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS, LISTED_ONLY, True,
            )  # fmt: skip
            mean = tl.where(wild, grown(sums / norm[:, None], value[0].dtype.element_ty), mean)
            x = load_rows(row_ptr, query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
            mean += spoiled_rows(
                x, row_ptr, query, key_ptr, key, value_ptr, value, bits, batch, col_batch, b, h, first, col_first, rows,
                row_start, n_rows, n_cols, query_mask, key_mask, mask, scale, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C,
                BLOCK_D,
                BLOCK_E, BITS,
            )  # fmt: skip
        blank = tl.where(gone > 0, float("nan"), 0.0)
        logs = tl.where(some, top + tl.log2(norm) * LN2, -INF) + blank
        tl.store(lse[0] + batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows, logs, mask=rows < n_rows)
        e = tl.arange(0, BLOCK_E)
        to = out[0] + batch * out[1] + h.to(tl.int64) * out[2] + (first + rows.to(tl.int64))[:, None] * out[3]
        mean = narrow(mean + blank[:, None], out[0].dtype.element_ty)
        tl.store(to + e[None, :], mean, mask=(rows[:, None] < n_rows) & (e[None, :] < VALUE_WIDTH))


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
def slopes(
    total, scale, valid, mask, bits, seed, dropout_p, g, v, logs, minus, batch, col_batch, b, h, first, col_first, rows,
    row_start, n_rows, cols, col_start, n_cols, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(weight after dropout, ds) of one tile, [R, C] each; 0 where a pair is not kept."""
    scores, valid = biased(total, scale, valid, mask, b, h, rows[:, None], cols[None, :])
    kept = kept_pairs(
        valid, bits, batch, col_batch, h, first, col_first, rows, row_start, n_rows, cols, col_start, n_cols, BITS,
        BLOCK_R, BLOCK_C,
    )  # fmt: skip
    # A weight is at most 1; rounding may not make more of it.
    weight = tl.where(kept, tl.exp2(no_more_than_0((scores - logs[:, None]) * LOG2E)), 0.0)
    zeros = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    slope = product(g, tl.trans(v), zeros)
    thinned = weight
    if seed is not None:
        factor = dropout_factor(seed, dropout_p, b, h, rows[:, None], cols[None, :])
        slope *= factor
        thinned = weight * factor
    return thinned, tl.where(kept, weight * (slope - minus[:, None]), 0.0)


@triton.jit
def scores_again(
    q, k, row_ptr, row_stride, rows, n_rows, col_ptr, col_stride, cols, n_cols,
    WIDTH: tl.constexpr, LINK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<row, column> summed as forward sums it, so that P comes out as it was: huge scores forgive no other rounding."""
    if LINK < WIDTH:
        x = load_rows(row_ptr, row_stride, rows, n_rows, 0, WIDTH, LINK)
        return dots(
            x, row_ptr, row_stride, rows, n_rows, col_ptr, col_stride, cols, n_cols, WIDTH, LINK, BLOCK_R, BLOCK_C
        )
    else:
        return product(q, tl.trans(k), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))


@triton.jit
def query_gradient(
    query_ptr, query, key_ptr, key, value_ptr, value, g, logs, minus, bits, batch, col_batch, b, h, first, col_first,
    rows, row_start, n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    rows_ok = permitted(rows, query_mask, b, n_rows)[:, None]
    q = load_rows(query_ptr, query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
    for start in range(0, n_cols, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        k = load_rows(key_ptr, key[3], cols, n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(value_ptr, value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
        total = scores_again(
            q, k, query_ptr, query[3], rows, n_rows, key_ptr, key[3], cols, n_cols, WIDTH, LINK, BLOCK_R, BLOCK_C
        )
        valid = rows_ok & permitted(cols, key_mask, b, n_cols)[None, :]
        _, ds = slopes(
            total, scale, valid, mask, bits, seed, dropout_p, g, v, logs, minus, batch, col_batch, b, h, first,
            col_first, rows, row_start, n_rows, cols, start, n_cols, BITS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if CAREFUL:
            k = tl.where(is_finite(k), k, 0.0)
        sums = fitted_product(ds, k, sums)
    return sums


@triton.jit
def _query_gradient_kernel(
    query, key, value, grad_out, lse, delta, grad_query, bits, mask, query_mask, key_mask, seed, dropout_p, scale,
    heads,
    blocks, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j ds_ij k_j.  A first pass that yields NaN or infinity is repeated with keys made finite: a pair
    that is not kept must not bring 0 * NaN."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    row_start = (task % blocks) * BLOCK_R
    rows = row_start + tl.arange(0, BLOCK_R)
    if row_start < n_rows:
        query_ptr = slice_of(query, batch, h, first)
        key_ptr = slice_of(key, col_batch, h, col_first)
        value_ptr = slice_of(value, col_batch, h, col_first)
        grad_ptr = slice_of(grad_out, batch, h, first)
        g = load_rows(grad_ptr, grad_out[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E)
        at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows
        logs = tl.load(lse[0] + at_lse, mask=rows < n_rows, other=0.0)
        minus = tl.load(delta + at_lse, mask=rows < n_rows, other=0.0)
        sums = query_gradient(
            query_ptr, query, key_ptr, key, value_ptr, value, g, logs, minus, bits, batch, col_batch, b, h, first,
            col_first, rows, row_start, n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH,
            VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS, LINK, False,
        )  # fmt: skip
        if some_wild(sums):
            sums = query_gradient(
                query_ptr, query, key_ptr, key, value_ptr, value, g, logs, minus, bits, batch, col_batch, b, h, first,
                col_first, rows, row_start, n_rows, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH,
                VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS, LINK, True,
            )  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        to = grad_query[0] + batch * grad_query[1] + h.to(tl.int64) * grad_query[2]
        to = to + (first + rows.to(tl.int64))[:, None] * grad_query[3] + d[None, :]
        in_rows = (rows[:, None] < n_rows) & (d[None, :] < WIDTH)
        tl.store(to, narrow(sums * scale, grad_query[0].dtype.element_ty), mask=in_rows)


@triton.jit
def key_gradient(
    query, key, grad_out, lse, delta, k, v, bits, batch, col_batch, b, group, repeats, first, col_first, n_rows, cols,
    col_start, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    key_sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    cols_ok = permitted(cols, key_mask, b, n_cols)[None, :]
    steps = tl.cdiv(n_rows, BLOCK_R)
    for step in range(repeats * steps):
        h = group * repeats + step // steps
        row_start = (step % steps) * BLOCK_R
        rows = row_start + tl.arange(0, BLOCK_R)
        q = load_rows(slice_of(query, batch, h, first), query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
        g = load_rows(slice_of(grad_out, batch, h, first), grad_out[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E)
        at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows
        logs = tl.load(lse[0] + at_lse, mask=rows < n_rows, other=0.0)
        minus = tl.load(delta + at_lse, mask=rows < n_rows, other=0.0)
        total = scores_again(
            q, k, slice_of(query, batch, h, first), query[3], rows, n_rows, slice_of(key, col_batch, h, col_first),
            key[3], cols, n_cols, WIDTH, LINK, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        valid = permitted(rows, query_mask, b, n_rows)[:, None] & cols_ok
        thinned, ds = slopes(
            total, scale, valid, mask, bits, seed, dropout_p, g, v, logs, minus, batch, col_batch, b, h, first,
            col_first, rows, row_start, n_rows, cols, col_start, n_cols, BITS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if CAREFUL:
            q = tl.where(is_finite(q), q, 0.0)
            g = tl.where(is_finite(g), g, 0.0)
        value_sums = fitted_product(tl.trans(thinned), g, value_sums)
        key_sums = fitted_product(tl.trans(ds), q, key_sums)
    return key_sums, value_sums


@triton.jit
def spoiled_values(
    query, key, grad_out, k, bits, batch, col_batch, b, group, repeats, first, col_first, n_rows, cols, col_start,
    n_cols,
    query_mask, key_mask, mask, scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What entries of g that are not finite add to dv [C, E]; apart from the sums, which need the registers."""
    total = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    cols_ok = permitted(cols, key_mask, b, n_cols)[None, :]
    steps = tl.cdiv(n_rows, BLOCK_R)
    for step in range(repeats * steps):
        h = group * repeats + step // steps
        row_start = (step % steps) * BLOCK_R
        rows = row_start + tl.arange(0, BLOCK_R)
        q = load_rows(slice_of(query, batch, h, first), query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
        dot = product(q, tl.trans(k), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))
        valid = permitted(rows, query_mask, b, n_rows)[:, None] & cols_ok
        _, valid = biased(dot, scale, valid, mask, b, h, rows[:, None], cols[None, :])
        kept = kept_pairs(
            valid, bits, batch, col_batch, h, first, col_first, rows, row_start, n_rows, cols, col_start, n_cols, BITS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        g = load_rows(slice_of(grad_out, batch, h, first), grad_out[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E)
        total += spoiled(tl.trans(kept.to(tl.int32)) != 0, g)
    return total


@triton.jit
def _key_gradient_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, bits, mask, query_mask, key_mask, seed, dropout_p,
    scale, groups, blocks, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr, LINK: tl.constexpr,
):  # fmt: skip
    """dk_j = scale sum_i ds_ij q_i and dv_j = sum_i d_ij p_ij g_i, over the query heads of the group in turn."""
    task = tl.program_id(0)
    b, group = (task // blocks) // groups, (task // blocks) % groups
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    col_start = (task % blocks) * BLOCK_C
    cols = col_start + tl.arange(0, BLOCK_C)
    repeats = tl.full([], 0, tl.int32) + key[5]
    if col_start < n_cols:
        h = group * repeats
        k = load_rows(slice_of(key, col_batch, h, col_first), key[3], cols, n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(slice_of(value, col_batch, h, col_first), value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
        key_sums, value_sums = key_gradient(
            query, key, grad_out, lse, delta, k, v, bits, batch, col_batch, b, group, repeats, first, col_first, n_rows,
            cols, col_start, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH, VALUE_WIDTH, BLOCK_R,
            BLOCK_C, BLOCK_D, BLOCK_E, BITS, LINK, False,
        )  # fmt: skip
        if some_wild(key_sums) | some_wild(value_sums):
            key_sums, value_sums = key_gradient(
                query, key, grad_out, lse, delta, k, v, bits, batch, col_batch, b, group, repeats, first, col_first,
                n_rows, cols, col_start, n_cols, query_mask, key_mask, mask, seed, dropout_p, scale, WIDTH, VALUE_WIDTH,
                BLOCK_R, BLOCK_C, BLOCK_D, BLOCK_E, BITS, LINK, True,
            )  # fmt: skip
            value_sums += spoiled_values(
                query, key, grad_out, k, bits, batch, col_batch, b, group, repeats, first, col_first, n_rows, cols,
                col_start, n_cols, query_mask, key_mask, mask, scale, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_C, BLOCK_D,
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
        q = load_rows(slice_of(query, batch, h, first), query[3], rows, n_rows, 0, WIDTH, BLOCK_D)
        k = load_rows(slice_of(key, batch, h, col_first), key[3], cols, n_cols, 0, WIDTH, BLOCK_D)
        v = load_rows(slice_of(value, batch, h, col_first), value[3], cols, n_cols, 0, VALUE_WIDTH, BLOCK_E)
        g = load_rows(slice_of(grad_out, batch, h, first), grad_out[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E)
        at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows
        logs = tl.load(lse[0] + at_lse, mask=rows < n_rows, other=0.0)
        minus = tl.load(delta + at_lse, mask=rows < n_rows, other=0.0)
        total = scores_again(
            q, k, slice_of(query, batch, h, first), query[3], rows, n_rows, slice_of(key, batch, h, col_first), key[3],
            cols, n_cols, WIDTH, LINK, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        valid = permitted(rows, query_mask, b, n_rows)[:, None] & permitted(cols, key_mask, b, n_cols)[None, :]
        _, ds = slopes(
            total, scale, valid, mask, bits, seed, dropout_p, g, v, logs, minus, batch, batch, b, h, first, col_first,
            rows, row_start, n_rows, cols, col_start, n_cols, BITS, BLOCK_R, BLOCK_C,
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
    to = (
        grad_bias
        + ((bias_batch * bias_heads + bias_head).to(tl.int64) * n_rows + rows[:, None]) * n_cols
        + cols[None, :]
    )
    tl.store(to, sums, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols))


@triton.jit
def _pack_lists_kernel(
    lists, bits, rows_in_all, length, words, word_blocks, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A block of words of a block of rows of the bitmask, each word the sum of the bits that the row lists."""
    task = tl.program_id(0)
    rows = (task // word_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    word = (task % word_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_R, BLOCK_W], tl.uint32)
    at = rows.to(tl.int64)[:, None] * length
    for start in range(0, length, BLOCK_L):
        slots = start + tl.arange(0, BLOCK_L)[None, :]
        j = tl.load(lists + at + slots, mask=(rows[:, None] < rows_in_all) & (slots < length), other=-1)
        bit = tl.full(j.shape, 1, tl.uint32) << (j & 31).to(tl.uint32)
        mine = (j >= 0)[:, None, :] & ((j >> 5)[:, None, :] == word[None, :, None])
        total += tl.sum(tl.where(mine, bit[:, None, :], 0), 2)
    to = bits + rows.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(to, total.to(tl.int32, bitcast=True), mask=(rows[:, None] < rows_in_all) & (word[None, :] < words))
