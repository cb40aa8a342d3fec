"""Attention over lists on the GPU: only the listed keys and values are read, forward and backward.  For long rows that
keep few; where a sixteenth or more is kept, ``dense_attention.py`` with a bitmask does less work.

``_gather_forward_kernel``          rows of queries, each with its list of keys
``_gather_query_gradient_kernel``   the same lists: dq
``_gather_key_gradient_kernel``     rows of keys, each with the run of queries that list it: dk and dv, no atomics

The order of a sum depends on the list alone, so it is the same in every call that lists the same pairs.
"""

import triton
import triton.language as tl

from .tiles import (
    INF,
    LN2,
    LOG2E,
    biased,
    dropout_factor,
    greatest,
    load_rows,
    narrow,
    no_more_than_0,
    segment,
    slice_of,
    some_wild,
    wide,
)


@triton.jit
def gather_rows(pointer, stride, tokens, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [R, K, BLOCK] of tokens [R, K]; zeros where not ok."""
    d = tl.arange(0, BLOCK)
    at = tokens.to(tl.int64)[:, :, None] * stride + d[None, None, :]
    return wide(tl.load(pointer + at, mask=ok[:, :, None] & (d[None, None, :] < WIDTH), other=0.0))


@triton.jit
def attend_lists(
    q, key_ptr, key_stride, value_ptr, value_stride, list_start, length, rows, n_rows, n_cols, mask, seed, dropout_p,
    b, h, scale, shrink, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(sums [R, E], norm [R], top [R], gone [R]) of one block of rows; values are multiplied by ``shrink``."""
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_R], tl.float32)
    gone = tl.zeros([BLOCK_R], tl.int32)
    sums = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(0, length, BLOCK_L):
        slots = start + tl.arange(0, BLOCK_L)[None, :]
        here = (rows[:, None] < n_rows) & (slots < length)
        j = tl.load(list_start[:, None] + slots, mask=here, other=-1)
        ok = (j >= 0) & (j < n_cols)
        k = gather_rows(key_ptr, key_stride, j, ok, WIDTH, BLOCK_D)
        scores, ok = biased(tl.sum(q[:, None, :] * k, 2), scale, ok, mask, b, h, rows[:, None], j)
        gone = tl.maximum(gone, tl.max((ok & ~(scores < INF)).to(tl.int32), 1))
        fine = ok & (scores < INF)
        new_top = tl.maximum(top, tl.max(tl.where(fine, scores, -INF), 1))
        base = tl.where(new_top > -INF, new_top, 0.0)
        weight = tl.where(fine, tl.exp2((scores - base[:, None]) * LOG2E), 0.0)
        fade = tl.exp2((top - base) * LOG2E)
        norm = norm * fade + tl.sum(weight, 1)
        if seed is not None:
            weight *= dropout_factor(seed, dropout_p, b, h, rows[:, None], j)
        v = gather_rows(value_ptr, value_stride, j, ok, VALUE_WIDTH, BLOCK_E) * shrink
        sums = sums * fade[:, None] + tl.sum(weight[:, :, None] * v, 1)
        top = new_top
    return sums, norm, top, gone


@triton.jit
def _gather_forward_kernel(
    query, key, value, lists, out, lse, marks, mask, seed, dropout_p, length, scale, heads, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """marks: None, or floats laid out like lse, NaN for rows whose selection met a NaN or +inf."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    rows = (task % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (task % blocks) * BLOCK_R < n_rows:
        ok_rows = rows < n_rows
        q = wide(load_rows(slice_of(query, batch, h, first), query[3], rows, n_rows, 0, WIDTH, BLOCK_D))
        key_ptr = slice_of(key, col_batch, h, col_first)
        value_ptr = slice_of(value, col_batch, h, col_first)
        list_start = lists[0] + batch * lists[1] + h.to(tl.int64) * lists[2] + (first + rows.to(tl.int64)) * lists[3]
        sums, norm, top, gone = attend_lists(
            q, key_ptr, key[3], value_ptr, value[3], list_start, length, rows, n_rows, n_cols, mask, seed, dropout_p,
            b, h, scale, 1.0, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_L, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        some = norm > 0.0
        norm = tl.where(some, norm, 1.0)
        mean = sums / norm[:, None]
        wild = ~(tl.abs(mean) < INF)
        if some_wild(mean):
            # A sum of huge values may overflow where their mean does not; then it is taken of smaller ones.
            sums, _, _, _ = attend_lists(
                q, key_ptr, key[3], value_ptr, value[3], list_start, length, rows, n_rows, n_cols, mask, seed,
                dropout_p, b, h, scale, 5.9604644775390625e-08, WIDTH, VALUE_WIDTH, BLOCK_R, BLOCK_L, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            mean = tl.where(wild, sums / norm[:, None] * 16777216.0, mean)
        at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows
        blank = tl.where(gone > 0, float("nan"), 0.0)
        if marks is not None:
            blank += tl.load(marks + at_lse, mask=ok_rows, other=0.0)
        logs = tl.where(some, top + tl.log2(norm) * LN2, -INF) + blank
        tl.store(lse[0] + at_lse, logs, mask=ok_rows)
        e = tl.arange(0, BLOCK_E)
        out_ptr = out[0] + batch * out[1] + h.to(tl.int64) * out[2] + (first + rows.to(tl.int64)) * out[3]
        mean = narrow(mean + blank[:, None], out[0].dtype.element_ty)
        tl.store(out_ptr[:, None] + e[None, :], mean, mask=ok_rows[:, None] & (e[None, :] < VALUE_WIDTH))


@triton.jit
def _gather_query_gradient_kernel(
    query, key, value, grad_out, lists, lse, delta, grad_query, mask, seed, dropout_p, length, scale, heads, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j ds_ij k_j over the list of i."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(query, b)
    col_batch, col_first, n_cols = segment(key, b)
    rows = (task % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (task % blocks) * BLOCK_R < n_rows:
        ok_rows = rows < n_rows
        q = wide(load_rows(slice_of(query, batch, h, first), query[3], rows, n_rows, 0, WIDTH, BLOCK_D))
        g = wide(load_rows(slice_of(grad_out, batch, h, first), grad_out[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E))
        key_ptr = slice_of(key, col_batch, h, col_first)
        value_ptr = slice_of(value, col_batch, h, col_first)
        list_start = lists[0] + batch * lists[1] + h.to(tl.int64) * lists[2] + (first + rows.to(tl.int64)) * lists[3]
        at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first + rows
        logs = tl.load(lse[0] + at_lse, mask=ok_rows, other=0.0)
        minus = tl.load(delta + at_lse, mask=ok_rows, other=0.0)
        sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(0, length, BLOCK_L):
            slots = start + tl.arange(0, BLOCK_L)[None, :]
            j = tl.load(list_start[:, None] + slots, mask=ok_rows[:, None] & (slots < length), other=-1)
            ok = (j >= 0) & (j < n_cols)
            k = gather_rows(key_ptr, key[3], j, ok, WIDTH, BLOCK_D)
            scores, ok = biased(tl.sum(q[:, None, :] * k, 2), scale, ok, mask, b, h, rows[:, None], j)
            weight = tl.exp2(no_more_than_0((scores - logs[:, None]) * LOG2E))
            v = gather_rows(value_ptr, value[3], j, ok, VALUE_WIDTH, BLOCK_E)
            slope = tl.sum(g[:, None, :] * v, 2)
            if seed is not None:
                slope *= dropout_factor(seed, dropout_p, b, h, rows[:, None], j)
            ds = tl.where(ok, weight * (slope - minus[:, None]), 0.0)
            k = tl.where(ok[:, :, None], k, 0.0)
            sums += tl.sum(ds[:, :, None] * k, 1)
        d = tl.arange(0, BLOCK_D)
        to = grad_query[0] + batch * grad_query[1] + h.to(tl.int64) * grad_query[2]
        to = to + (first + rows.to(tl.int64))[:, None] * grad_query[3] + d[None, :]
        tl.store(to, narrow(sums * scale, grad_query[0].dtype.element_ty), mask=ok_rows[:, None] & (d[None, :] < WIDTH))


@triton.jit
def _gather_key_gradient_kernel(
    query, key, value, grad_out, runs, entries, lse, delta, grad_key, grad_value, mask, seed, dropout_p, length,
    list_heads, scale, groups, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk_j, dv_j over the queries that list key j, head after head of the group.

    entries[runs[s] : runs[s + 1]], s = slice * keys + j: positions in the flat lists (``length`` columns), ascending;
    list_heads: slices per batch, 1 where all heads share the lists.
    """
    task = tl.program_id(0)
    b, group = (task // blocks) // groups, (task // blocks) % groups
    batch, first, n_queries = segment(query, b)
    col_batch, col_first, n_rows = segment(key, b)
    repeats = key[5]
    rows = (task % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (task % blocks) * BLOCK_R < n_rows:
        ok_rows = rows < n_rows
        h = group * repeats
        k = wide(load_rows(slice_of(key, col_batch, h, col_first), key[3], rows, n_rows, 0, WIDTH, BLOCK_D))
        v = wide(load_rows(slice_of(value, col_batch, h, col_first), value[3], rows, n_rows, 0, VALUE_WIDTH, BLOCK_E))
        key_sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        value_sums = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        for repeat in range(repeats):
            h = group * repeats + repeat
            query_ptr = slice_of(query, batch, h, first)
            grad_ptr = slice_of(grad_out, batch, h, first)
            at_lse = batch * lse[1] + h.to(tl.int64) * lse[2] + first
            list_slice = batch * list_heads + tl.where(list_heads == 1, 0, h).to(tl.int64)
            run = list_slice * key[4] + col_first + rows
            begin = tl.load(runs + run, mask=ok_rows, other=0)
            end = tl.load(runs + run + 1, mask=ok_rows, other=0)
            longest = greatest(end - begin)
            flat = list_slice * query[4] + first
            for start in range(0, longest, BLOCK_L):
                at = begin[:, None] + start + tl.arange(0, BLOCK_L)[None, :]
                ok = at < end[:, None]
                i = tl.load(entries + at, mask=ok, other=0) // length - flat
                i = tl.where(ok, i, 0).to(tl.int32)
                q = gather_rows(query_ptr, query[3], i, ok, WIDTH, BLOCK_D)
                scores, ok = biased(tl.sum(q * k[:, None, :], 2), scale, ok, mask, b, h, i, rows[:, None])
                logs = tl.load(lse[0] + at_lse + i, mask=ok, other=0.0)
                minus = tl.load(delta + at_lse + i, mask=ok, other=0.0)
                weight = tl.where(ok, tl.exp2(no_more_than_0((scores - logs) * LOG2E)), 0.0)
                g = gather_rows(grad_ptr, grad_out[3], i, ok, VALUE_WIDTH, BLOCK_E)
                slope = tl.sum(g * v[:, None, :], 2)
                thinned = weight
                if seed is not None:
                    factor = dropout_factor(seed, dropout_p, b, h, i, rows[:, None])
                    slope *= factor
                    thinned = weight * factor
                ds = tl.where(ok, weight * (slope - minus), 0.0)
                key_sums += tl.sum(ds[:, :, None] * tl.where(ok[:, :, None], q, 0.0), 1)
                value_sums += tl.sum(thinned[:, :, None] * g, 1)
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        at_head = group.to(tl.int64)
        token = (col_first + rows.to(tl.int64))[:, None]
        to = grad_key[0] + col_batch * grad_key[1] + at_head * grad_key[2] + token * grad_key[3] + d[None, :]
        tl.store(
            to, narrow(key_sums * scale, grad_key[0].dtype.element_ty), mask=ok_rows[:, None] & (d[None, :] < WIDTH)
        )
        to = grad_value[0] + col_batch * grad_value[1] + at_head * grad_value[2] + token * grad_value[3] + e[None, :]
        in_value = ok_rows[:, None] & (e[None, :] < VALUE_WIDTH)
        tl.store(to, narrow(value_sums, grad_value[0].dtype.element_ty), mask=in_value)
