"""Multi-scale fusion on the GPU: out = dropout(act(norm(sum_s U_s f_s W_s^T + b))), and the way back to the sum.

``_scale_fusion_kernel``      projections, interpolation, norm, activation and dropout of a tile of tokens
``_finish_kernel``            norm, activation and dropout of rows too long for one program
``_row_statistics_kernel``    what the norm's gradient needs to know of such a row
``_finish_gradient_kernel``   gradient to the sum, and per-program sums for bias and norm

Interpolation and projection commute, so each scale takes the cheaper order: *interpolated* scales are interpolated
while they are loaded as an operand (or are on the output's grid already), *projected* ones were projected at their own
size and are interpolated into the sum.
"""

import triton
import triton.language as tl

from .interpolation import gathered, place, source_tap, source_taps
from .tiles import narrow, product, wide

LAYER, AFFINE = tl.constexpr(1), tl.constexpr(2)
GELU, GELU_TANH, RELU, SILU = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
HERE, STORED = tl.constexpr(1), tl.constexpr(2)  # where a row's statistics come from


# Activations.


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == RELU:
        return tl.where(x <= 0.0, 0.0, x)  # keeps NaN
    elif ACTIVATION == SILU:
        return x * sigmoid(x)
    else:
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of ``activated``."""
    if ACTIVATION == GELU:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == GELU_TANH:
        half = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return half + x * half * (1.0 - half) * inner
    elif ACTIVATION == RELU:
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == SILU:
        half = sigmoid(x)
        return half * (1.0 + x * (1.0 - half))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


# Dropout: Philox4x32-10 on the counter (c >> 3, n, 0, b), 16 bits for each of its 8 channels.


@triton.jit
def kept(seed_ptr, threshold, b, rows, start, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bool [R, C]: what stays of channels start, start + 1, ...; start is a multiple of 8."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    eight = start // 8 + tl.arange(0, BLOCK_C // 8)
    none = tl.zeros([BLOCK_R, BLOCK_C // 8], tl.int32)
    c0, c1, c2 = (none + eight[None, :]).to(tl.uint32), (none + rows[:, None]).to(tl.uint32), none.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, (none + b.to(tl.int32)).to(tl.uint32), k0, k1, 10)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., high bit of the word's number, low bit]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves.to(tl.int32) >= threshold, [BLOCK_R, BLOCK_C])


@triton.jit
def parameter(pointer, cols, ok, other: tl.constexpr):
    """[1, C] of a vector in fp32."""
    return wide(tl.load(pointer + cols, mask=ok, other=other))[None, :]


@triton.jit
def normalised(y, mean, rstd, norm_weight, norm_bias, cols, ok, NORM: tl.constexpr):
    """Of y [R, C]; mean and rstd [R] count for the layer norm alone."""
    if NORM == LAYER:
        y = (y - mean[:, None]) * rstd[:, None]
    if norm_weight is not None:
        y = y * parameter(norm_weight, cols, ok, 0.0)
    if norm_bias is not None:
        y = y + parameter(norm_bias, cols, ok, 0.0)
    return y


@triton.jit
def finished(z, seed, dropout, b, rows, start, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """dropout(act(z)); dropout: (threshold, factor of what stays)."""
    z = activated(z, ACTIVATION)
    if seed is not None:
        z = tl.where(kept(seed, dropout[0], b, rows, start, BLOCK_R, BLOCK_C), z * dropout[1], 0.0)
    return z


# Forward.


@triton.jit
def store_tile(to, tile, base, rows, count, cols, cols_ok):
    """to: (pointer, strides of batch, token)."""
    at = to[0] + base * to[1] + rows.to(tl.int64)[:, None] * to[2] + cols[None, :]
    tl.store(at, narrow(tile, to[0].dtype.element_ty), mask=(rows < count)[:, None] & cols_ok[None, :])


@triton.jit
def weight_tile(weight, first, k, inner, cols, cols_ok):
    """[K, C] of weight (pointer, strides of output, input), inputs first + k."""
    at = weight[0] + cols.to(tl.int64)[None, :] * weight[1] + (first + k)[:, None] * weight[2]
    return tl.load(at, mask=(k < inner)[:, None] & cols_ok[None, :], other=0.0)


@triton.jit
def taken(source, b, token, weight, inside, cols, cols_ok):
    """One tap of a projected scale [R, C]."""
    ok = (inside & (weight != 0.0))[:, None] & cols_ok[None, :]
    at = source[0] + b * source[1] + token.to(tl.int64)[:, None] * source[2] + cols[None, :]
    return weight[:, None] * wide(tl.load(at, mask=ok, other=0.0))


@triton.jit
def _scale_fusion_kernel(
    weight, interpolated, projected, bias, norm_weight, norm_bias, seed, dropout, eps, out, linear, count, prefix,
    cells, height, width, blocks, col_blocks,
    INTERPOLATED: tl.constexpr, PROJECTED: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, PREFIX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
):  # fmt: skip
    """interpolated: INTERPOLATED times (source, channels, first column of weight); projected: PROJECTED sources.  out,
    linear: None or (pointer, strides of batch, token).

    The columns of a program are BLOCK_0 and behind them BLOCK_1 (0: none): two powers of two waste less than one.
    """
    task = tl.program_id(0)
    b = (task // (blocks * col_blocks)).to(tl.int64)
    rows = task // col_blocks % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < count
    z, y, x = place(rows, prefix, cells, height, width)
    start_0 = task % col_blocks * (BLOCK_0 + BLOCK_1)
    start_1 = start_0 + BLOCK_0
    cols_0 = start_0 + tl.arange(0, BLOCK_0)
    ok_0 = cols_0 < WIDTH
    sum_0 = tl.zeros([BLOCK_R, BLOCK_0], tl.float32)
    if BLOCK_1 > 0:
        cols_1 = start_1 + tl.arange(0, BLOCK_1)
        ok_1 = cols_1 < WIDTH
        sum_1 = tl.zeros([BLOCK_R, BLOCK_1], tl.float32)

    for s in tl.static_range(INTERPOLATED):
        source = interpolated[s][0]
        base = source[0] + b * source[1]
        for start in range(0, interpolated[s][1], BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_ok = k < interpolated[s][1]
            if source[4] is None and source[5] is None and source[6] is None:  # on the output's grid already
                token = rows
                ok = inside
                if PREFIX:
                    token = rows - prefix + source[3]
                    ok = inside & (token >= 0)
                at = token.to(tl.int64)[:, None] * source[2] + k[None, :]
                a = tl.load(base + at, mask=ok[:, None] & k_ok[None, :], other=0.0)
            else:
                a = gathered(source, base, rows, inside, z, y, x, prefix, k, k_ok, PREFIX, BLOCK_R, BLOCK_K)
                a = narrow(a, source[0].dtype.element_ty)
            w = weight_tile(weight, interpolated[s][2], k, interpolated[s][1], cols_0, ok_0)
            sum_0 = product(a, w, sum_0)
            if BLOCK_1 > 0:
                w = weight_tile(weight, interpolated[s][2], k, interpolated[s][1], cols_1, ok_1)
                sum_1 = product(a, w, sum_1)

    for s in tl.static_range(PROJECTED):
        for t in range(source_taps(projected[s])):
            token, part = source_tap(projected[s], rows, z, y, x, t, prefix, PREFIX)
            sum_0 += taken(projected[s], b, token, part, inside, cols_0, ok_0)
            if BLOCK_1 > 0:
                sum_1 += taken(projected[s], b, token, part, inside, cols_1, ok_1)

    if bias is not None:
        sum_0 += parameter(bias, cols_0, ok_0, 0.0)
        if BLOCK_1 > 0:
            sum_1 += parameter(bias, cols_1, ok_1, 0.0)
    if linear is not None:
        store_tile(linear, sum_0, b, rows, count, cols_0, ok_0)
        if BLOCK_1 > 0:
            store_tile(linear, sum_1, b, rows, count, cols_1, ok_1)
    if out is not None:
        mean = tl.zeros([BLOCK_R], tl.float32)
        rstd = mean
        if NORM == LAYER:
            mean = tl.sum(sum_0, 1)
            if BLOCK_1 > 0:
                mean += tl.sum(sum_1, 1)
            mean = mean / WIDTH
            off = tl.where(ok_0[None, :], sum_0 - mean[:, None], 0.0)
            variance = tl.sum(off * off, 1)
            if BLOCK_1 > 0:
                off = tl.where(ok_1[None, :], sum_1 - mean[:, None], 0.0)
                variance += tl.sum(off * off, 1)
            rstd = 1.0 / tl.sqrt(variance / WIDTH + eps)
        tile = normalised(sum_0, mean, rstd, norm_weight, norm_bias, cols_0, ok_0, NORM)
        tile = finished(tile, seed, dropout, b, rows, start_0, ACTIVATION, BLOCK_R, BLOCK_0)
        store_tile(out, tile, b, rows, count, cols_0, ok_0)
        if BLOCK_1 > 0:
            tile = normalised(sum_1, mean, rstd, norm_weight, norm_bias, cols_1, ok_1, NORM)
            tile = finished(tile, seed, dropout, b, rows, start_1, ACTIVATION, BLOCK_R, BLOCK_1)
            store_tile(out, tile, b, rows, count, cols_1, ok_1)


# Rows longer than a program: a layer norm in loops over columns.


@triton.jit
def load_tile(x, b, rows, count, cols, WIDTH: tl.constexpr):
    """fp32 [R, C] of x (pointer, strides of batch, token); zeros outside."""
    at = x[0] + b * x[1] + rows.to(tl.int64)[:, None] * x[2] + cols[None, :]
    return wide(tl.load(at, mask=(rows < count)[:, None] & (cols < WIDTH)[None, :], other=0.0))


@triton.jit
def moments(linear, b, rows, count, eps, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, 1 / deviation) of rows."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        total += load_tile(linear, b, rows, count, start + tl.arange(0, BLOCK_C), WIDTH)
    mean = tl.sum(total, 1) / WIDTH
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        off = load_tile(linear, b, rows, count, cols, WIDTH) - mean[:, None]
        total += tl.where((cols < WIDTH)[None, :], off * off, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(total, 1) / WIDTH + eps)


@triton.jit
def _finish_kernel(
    linear, norm_weight, norm_bias, seed, dropout, eps, out, count, blocks,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    b = (task // blocks).to(tl.int64)
    rows = task % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mean, rstd = moments(linear, b, rows, count, eps, WIDTH, BLOCK_R, BLOCK_C)
    for start in range(0, WIDTH, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        tile = load_tile(linear, b, rows, count, cols, WIDTH)
        tile = normalised(tile, mean, rstd, norm_weight, norm_bias, cols, cols < WIDTH, NORM)
        tile = finished(tile, seed, dropout, b, rows, start, ACTIVATION, BLOCK_R, BLOCK_C)
        store_tile(out, tile, b, rows, count, cols, cols < WIDTH)


# Backward.


@triton.jit
def before_activation(
    grad_out, y, norm_weight, norm_bias, seed, dropout, mean, rstd, b, rows, start, count,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(gradient to what the activation was applied to, what the norm's weight is multiplied with) [R, C].  y: tile of
    the sum, or None where neither norm nor activation looks at it."""
    cols = start + tl.arange(0, BLOCK_C)
    g = load_tile(grad_out, b, rows, count, cols, WIDTH)
    if seed is not None:
        g = tl.where(kept(seed, dropout[0], b, rows, start, BLOCK_R, BLOCK_C), g * dropout[1], 0.0)
    if y is None:
        return g, tl.zeros_like(g)
    else:
        if NORM == LAYER:
            y = tl.where((cols < WIDTH)[None, :], (y - mean[:, None]) * rstd[:, None], 0.0)
        z = normalised(y, mean, rstd, norm_weight, norm_bias, cols, cols < WIDTH, AFFINE)
        return g * slope(z, ACTIVATION), y


@triton.jit
def _row_statistics_kernel(
    grad_out, linear, norm_weight, norm_bias, seed, dropout, eps, statistics, count, blocks,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """statistics [B, N, 4]: mean, 1 / deviation, mean of the gradient to the normalised row, mean of it times the
    row."""
    task = tl.program_id(0)
    b = (task // blocks).to(tl.int64)
    rows = task % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mean, rstd = moments(linear, b, rows, count, eps, WIDTH, BLOCK_R, BLOCK_C)
    plain, times = tl.zeros([BLOCK_R, BLOCK_C], tl.float32), tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        y = load_tile(linear, b, rows, count, start + tl.arange(0, BLOCK_C), WIDTH)
        d, y = before_activation(
            grad_out, y, norm_weight, norm_bias, seed, dropout, mean, rstd, b, rows, start, count, WIDTH, NORM,
            ACTIVATION, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if norm_weight is not None:
            cols = start + tl.arange(0, BLOCK_C)
            d = d * parameter(norm_weight, cols, cols < WIDTH, 0.0)
        plain += d
        times += d * y
    to = statistics + (b * count + rows) * 4
    tl.store(to, mean, mask=rows < count)
    tl.store(to + 1, rstd, mask=rows < count)
    tl.store(to + 2, tl.sum(plain, 1) / WIDTH, mask=rows < count)
    tl.store(to + 3, tl.sum(times, 1) / WIDTH, mask=rows < count)


@triton.jit
def _finish_gradient_kernel(
    grad_out, linear, norm_weight, norm_bias, seed, dropout, eps, statistics, grad, partial, count, blocks, tiles,
    per_program, col_blocks,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad [B, N, O]: gradient to the sum.  partial [programs, 3, O] or None: each program's sums of it, of the
    gradient to the norm's weight and of that to its bias; a program takes ``per_program`` tiles, one after the
    other.

    STATISTICS: 0 the norm needs none, HERE the tile holds whole rows, STORED ``_row_statistics_kernel`` left them.
    """
    task = tl.program_id(0)
    part, start = task // col_blocks, task % col_blocks * BLOCK_C
    cols = start + tl.arange(0, BLOCK_C)
    to_bias, to_weight, to_shift = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), tl.zeros(
        [BLOCK_C], tl.float32)  # fmt: skip
    for tile in range(part * per_program, tl.minimum((part + 1) * per_program, tiles)):
        b = (tile // blocks).to(tl.int64)
        rows = tile % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        mean = tl.zeros([BLOCK_R], tl.float32)
        rstd = mean
        if linear is None:
            y = None
        else:
            y = load_tile(linear, b, rows, count, cols, WIDTH)
        if STATISTICS == HERE:
            mean = tl.sum(y, 1) / WIDTH
            off = tl.where((cols < WIDTH)[None, :], y - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / WIDTH + eps)
        elif STATISTICS == STORED:
            at = statistics + (b * count + rows) * 4
            mean, rstd = tl.load(at, mask=rows < count, other=0.0), tl.load(at + 1, mask=rows < count, other=0.0)
        d, y = before_activation(
            grad_out, y, norm_weight, norm_bias, seed, dropout, mean, rstd, b, rows, start, count, WIDTH, NORM,
            ACTIVATION, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        inside = (rows < count)[:, None]
        if partial is not None:
            to_weight += tl.sum(tl.where(inside, d * y, 0.0), 0)
            to_shift += tl.sum(tl.where(inside, d, 0.0), 0)
        if norm_weight is not None:
            d = d * parameter(norm_weight, cols, cols < WIDTH, 0.0)
        if STATISTICS == HERE:
            plain, times = tl.sum(d, 1) / WIDTH, tl.sum(d * y, 1) / WIDTH
            d = rstd[:, None] * (d - plain[:, None] - y * times[:, None])
        elif STATISTICS == STORED:
            plain, times = tl.load(at + 2, mask=rows < count, other=0.0), tl.load(at + 3, mask=rows < count, other=0.0)
            d = rstd[:, None] * (d - plain[:, None] - y * times[:, None])
        if partial is not None:
            to_bias += tl.sum(tl.where(inside, d, 0.0), 0)
        store_tile(grad, d, b, rows, count, cols, cols < WIDTH)
    if partial is not None:
        to = partial + part.to(tl.int64) * 3 * WIDTH + cols
        tl.store(to, to_bias, mask=cols < WIDTH)
        tl.store(to + WIDTH, to_weight, mask=cols < WIDTH)
        tl.store(to + 2 * WIDTH, to_shift, mask=cols < WIDTH)
