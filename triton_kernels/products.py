"""Products of tokens with a weight, gradients of a weight, and sums of what programs left behind.

Splits and the order of every sum follow from the shapes alone: the same call gives the same bits on every GPU.
"""

import triton
import triton.language as tl

from .tiles import fitted_product, narrow, permitted, product


@triton.jit
def _rows_product_kernel(
    x, weight, out, count, inner, width, blocks, col_blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, n, j] = sum_k x[b, n, k] weight[k, j].  x, out: (pointer, strides of batch, token); weight: (pointer,
    strides of k, j)."""
    task = tl.program_id(0)
    b = (task // (blocks * col_blocks)).to(tl.int64)
    rows = task // col_blocks % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = task % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = x[0] + b * x[1] + rows.to(tl.int64)[:, None] * x[2]
    col_ptr = weight[0] + cols.to(tl.int64)[None, :] * weight[2]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(row_ptr + k[None, :], mask=(rows < count)[:, None] & (k < inner)[None, :], other=0.0)
        w = tl.load(col_ptr + k.to(tl.int64)[:, None] * weight[1], mask=(k < inner)[:, None] & (cols < width)[None, :],
                    other=0.0)  # fmt: skip
        total = product(a, w, total)
    to = out[0] + b * out[1] + rows.to(tl.int64)[:, None] * out[2] + cols[None, :]
    tl.store(to, narrow(total, out[0].dtype.element_ty), mask=(rows < count)[:, None] & (cols < width)[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad, x, token_mask, out, count, tiles, per_split, height, width, blocks, row_blocks, col_blocks,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split, o, c] = sum over the split's tiles of tokens of grad[b, n, o] x[b, n, c].

    grad, x: (pointer, strides of batch, token); out: (pointer, strides of split, o).  blocks: tiles of one sample.
    """
    task = tl.program_id(0)
    split = task // (row_blocks * col_blocks)
    o = task // col_blocks % row_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    c = task % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        b = (tile // blocks).to(tl.int64)
        rows = tile % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = permitted(rows, token_mask, b, count)[:, None]
        at = rows.to(tl.int64)[:, None]
        g = tl.load(grad[0] + b * grad[1] + at * grad[2] + o[None, :], mask=ok & (o < height)[None, :], other=0.0)
        y = tl.load(x[0] + b * x[1] + at * x[2] + c[None, :], mask=ok & (c < width)[None, :], other=0.0)
        if g.dtype == y.dtype:
            total = product(tl.trans(g), y, total)
        else:
            total = fitted_product(tl.trans(g), y, total)
    to = out[0] + split.to(tl.int64) * out[1] + o.to(tl.int64)[:, None] * out[2] + c[None, :]
    tl.store(to, narrow(total, out[0].dtype.element_ty), mask=(o < height)[:, None] & (c < width)[None, :])


@triton.jit
def _sum_partials_kernel(partial, out, parts, size, width, out_stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[i // width, i % width] = sum over p of partial[p, i]."""
    i = (tl.program_id(0).to(tl.int64) * BLOCK_C) + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64)[:, None] * size + i[None, :]
        total += tl.load(partial + at, mask=(p < parts)[:, None] & (i < size)[None, :], other=0.0)
    result = narrow(tl.sum(total, 0), out.dtype.element_ty)
    tl.store(out + i // width * out_stride + i % width, result, mask=i < size)
