"""Contrastive losses on the GPU: logits of a tile of images and columns live in registers, serve both directions, and
are gone.

``_contrast_forward_kernel``   log-sum-exps of rows over a range of columns, and of columns over a tile of images
``_contrast_merge_kernel``     parts of a log-sum-exp into one, in order
``_contrast_pairs_kernel``     gradients of the logits of a slice of columns, from the log-sum-exps
``_contrast_product_kernel``   those times y or x

x [B R, C] and y [N, C] are (pointer, stride of rows).  A log-sum-exp in parts is a pair (largest logit, sum of
exponentials relative to it); a whole one is float64, used as a float32 and what that leaves.
"""

import triton
import triton.language as tl

from .tiles import INF, fitted_product, narrow, product, wide


@triton.jit
def softplus(x):
    """log(1 + e^x); a series where 1 + e would round away what e is."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * (0.25 - e * 0.2))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, tl.log(1.0 + e)) + (x - x)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e) + (x - x)


@triton.jit
def finite_or_zero(x):
    """What exponentials are relative to: 0 before any number has come."""
    return tl.where(x > -INF, x, 0.0)


@triton.jit
def best_dots(
    x, y, images, columns, count, width, channels, QUERIES: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """max_r <x_ir, y_j> [I, J] and which r: the first of equals, NaN before every number."""
    best, which = tl.full([BLOCK_I, BLOCK_J], -INF, tl.float32), tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    row_ptr = x[0] + images.to(tl.int64)[:, None] * (QUERIES * x[1])
    col_ptr = y[0] + columns.to(tl.int64)[None, :] * y[1]
    for r in range(QUERIES):
        dots = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            a = tl.load(row_ptr + c[None, :], mask=(images < count)[:, None] & (c < channels)[None, :], other=0.0)
            b = tl.load(col_ptr + c[:, None], mask=(c < channels)[:, None] & (columns < width)[None, :], other=0.0)
            dots = product(a, b, dots)
        if QUERIES == 1:
            best = dots
        else:
            better = (dots > best) | ((dots != dots) & (best == best))
            best, which = tl.where(better, dots, best), tl.where(better, r, which)
            row_ptr += x[1]
    return best, which


@triton.jit
def number(value, tensor, ADD: tl.constexpr):
    """A number, and what a tensor adds to it or multiplies it by."""
    if tensor is not None:
        t = wide(tl.load(tensor))
        value = value + t if ADD else value * t
    return value


@triton.jit
def labels_of(labels, images, count):
    if labels is not None:
        return tl.load(labels + images, mask=images < count, other=-1).to(tl.int32)
    else:
        return images


@triton.jit
def _contrast_forward_kernel(
    x, y, scale, scale_tensor, bias, bias_tensor, labels, row_parts, column_parts, target, count, width, channels,
    first_block, splits, per_split,
    QUERIES: tl.constexpr, SIGLIP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """row_parts [splits, B, 2], column_parts [blocks of this launch, N, 2], target [B] in float64.  Of siglip
    row_parts holds (0, sum of losses)."""
    task = tl.program_id(0)
    block, split = task // splits, task % splits
    images = (first_block + block) * BLOCK_I + tl.arange(0, BLOCK_I)
    factor, offset = number(scale, scale_tensor, False), number(bias, bias_tensor, True)
    own = labels_of(labels, images, count)
    top, total = tl.full([BLOCK_I], -INF, tl.float32), tl.zeros([BLOCK_I], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, width), BLOCK_J):
        columns = start + tl.arange(0, BLOCK_J)
        there = (images < count)[:, None] & (columns < width)[None, :]
        dots, _ = best_dots(x, y, images, columns, count, width, channels, QUERIES, BLOCK_I, BLOCK_J, BLOCK_C)
        s = dots * factor + offset
        is_own = (own[:, None] == columns[None, :]) & there
        if SIGLIP:
            total += tl.sum(tl.where(there, softplus(tl.where(is_own, -s, s)), 0.0), 1)
        else:
            s = tl.where(there, s, -INF)
            has = tl.max(is_own.to(tl.int32), 1) > 0
            mine = tl.sum(tl.where(is_own, s, 0.0), 1)
            tl.store(target + images, mine.to(tl.float64), mask=has)
            real = tl.where(s == s, s, -INF)
            new = tl.maximum(top, tl.max(real, 1))
            base = finite_or_zero(new)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)
            top = new
            if COLUMNS:
                highest = tl.max(real, 0)
                sums = tl.sum(tl.exp(s - finite_or_zero(highest)[None, :]), 0)
                to = column_parts + (block.to(tl.int64) * width + columns) * 2
                tl.store(to, highest, mask=columns < width)
                tl.store(to + 1, sums, mask=columns < width)
    to = row_parts + (split.to(tl.int64) * count + images) * 2
    tl.store(to, tl.where(images < count, top, 0.0), mask=images < count)
    tl.store(to + 1, total, mask=images < count)


@triton.jit
def _contrast_merge_kernel(
    parts, running, out, n_parts, size, FIRST: tl.constexpr, LAST: tl.constexpr, SIGLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [n_parts, size, 2] after what is in running [size, 2] (nothing yet where FIRST): to running, or where LAST
    to out [size] in float64 as the log-sum-exp."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    top, total = tl.full([BLOCK], -INF, tl.float64), tl.zeros([BLOCK], tl.float64)
    if not FIRST:
        top = tl.load(running + i * 2, mask=ok, other=0.0)
        total = tl.load(running + i * 2 + 1, mask=ok, other=0.0)
    at, step = parts + i * 2, tl.full([], 2, tl.int64) * size
    for _ in range(n_parts):
        other = tl.load(at, mask=ok, other=0.0).to(tl.float64)
        more = tl.load(at + 1, mask=ok, other=0.0).to(tl.float64)
        at += step
        if SIGLIP:
            total += more
        else:
            new = tl.maximum(top, other)
            base = finite_or_zero(new)
            total = total * tl.exp(top - base) + more * tl.exp(tl.where(other == new, 0.0, other - base))
            top = new
    if LAST:
        tl.store(out + i, total if SIGLIP else top + tl.log(tl.where(ok, total, 1.0)), mask=ok)
    else:
        tl.store(running + i * 2, top, mask=ok)
        tl.store(running + i * 2 + 1, total, mask=ok)


@triton.jit
def shares_of(grad, lse, at, ok):
    """(gradient of a log-sum-exp, it as a float32, what that leaves); 0 where nobody asks."""
    if grad is not None:
        whole = tl.load(lse + at, mask=ok, other=0.0)
        high = whole.to(tl.float32)
        low = (whole - high.to(tl.float64)).to(tl.float32)
        return tl.load(grad + at, mask=ok, other=0.0).to(tl.float32), high, low
    else:
        none = tl.where(ok, 0.0, 0.0)
        return none, none, none


@triton.jit
def _contrast_pairs_kernel(
    x, y, scale, scale_tensor, bias, bias_tensor, labels, row_lse, column_lse, grad_rows, grad_columns, grad_target,
    pairs, sums, count, width, channels, first, slice_width, col_blocks,
    QUERIES: tl.constexpr, SIGLIP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pairs [B R, slice_width]: gradients of the logits with columns first + j, in the row of the best query and 0 in
    the others.  sums [blocks, col_blocks, 2]: of gradient times dot product, of gradients."""
    task = tl.program_id(0)
    images = task // col_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    j = task % col_blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    columns = first + j
    row_ok, col_ok = images < count, (j < slice_width) & (columns < width)
    factor, offset = number(scale, scale_tensor, False), number(bias, bias_tensor, True)
    own = labels_of(labels, images, count)
    dots, which = best_dots(x, y, images, columns, count, width, channels, QUERIES, BLOCK_I, BLOCK_J, BLOCK_C)
    there = row_ok[:, None] & col_ok[None, :]
    dots = tl.where(there, dots, 0.0)
    s = dots * factor + offset
    is_own = (own[:, None] == columns[None, :]) & there
    share, high, low = shares_of(grad_rows, row_lse, images, row_ok)
    d = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if SIGLIP:
        d = share[:, None] * tl.where(is_own, -sigmoid(-s), sigmoid(s))
    else:
        if grad_rows is not None:
            d += share[:, None] * tl.exp(s - high[:, None] - low[:, None])
        if grad_columns is not None:
            share, high, low = shares_of(grad_columns, column_lse, columns, col_ok)
            d += share[None, :] * tl.exp(s - high[None, :] - low[None, :])
        if grad_target is not None:
            share = tl.load(grad_target + images, mask=row_ok, other=0.0).to(tl.float32)
            d += tl.where(is_own, share[:, None], 0.0)
    d = tl.where(there, d, 0.0)
    to = sums + task.to(tl.int64) * 2
    tl.store(to, tl.sum(tl.sum(d * dots, 1)[:, None]))
    tl.store(to + 1, tl.sum(tl.sum(d, 1)[:, None]))
    at = pairs + images.to(tl.int64)[:, None] * (QUERIES * slice_width) + j[None, :]
    for r in range(QUERIES):
        kept = d if QUERIES == 1 else tl.where(which == r, d, 0.0)
        tl.store(at, narrow(kept, pairs.dtype.element_ty), mask=row_ok[:, None] & (j < slice_width)[None, :])
        at += slice_width


@triton.jit
def _contrast_product_kernel(
    pairs, other, out, scale, scale_tensor, rows, inner, channels, first, col_blocks,
    ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, c] (+)= scale sum_k pairs[m, k] other[first + k, c].  pairs: (pointer, strides of m, k); other, out:
    (pointer, stride of rows)."""
    task = tl.program_id(0)
    m = task // col_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = task % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(pairs[0] + m.to(tl.int64)[:, None] * pairs[1] + k.to(tl.int64)[None, :] * pairs[2],
                    mask=(m < rows)[:, None] & (k < inner)[None, :], other=0.0)  # fmt: skip
        b = tl.load(other[0] + (first + k).to(tl.int64)[:, None] * other[1] + c[None, :],
                    mask=(k < inner)[:, None] & (c < channels)[None, :], other=0.0)  # fmt: skip
        if a.dtype == b.dtype:
            total = product(a, b, total)
        else:
            total = fitted_product(a, b, total)
    total *= number(scale, scale_tensor, False)
    to = out[0] + m.to(tl.int64)[:, None] * out[1] + c[None, :]
    ok = (m < rows)[:, None] & (c < channels)[None, :]
    if ADD:
        total += tl.load(to, mask=ok, other=0.0)
    tl.store(to, narrow(total, out[0].dtype.element_ty), mask=ok)
