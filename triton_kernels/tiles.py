"""Tile algebra of all kernels: where a task stands, masked loads, scores and which pairs count, the search for a
k-th best value, dropout.  Device functions only.

A *ranking* tile [R, C] holds one fp32 number per pair in which plain ``>=`` is the order of the contract: a score is
itself, a NaN score of a valid pair is -inf (below every number; a score of -inf is not valid), a pair that is not valid
is NaN (no comparison ever takes it).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Where things are. A side is (pointer, stride of batch, of head, of token, tokens, heads that share one, cu_seqlens).


@triton.jit
def segment(side, b):
    """(batch index, first token, tokens) of batch b; packed sides have one batch in memory."""
    if side[6] is None:
        return b.to(tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int32) + side[4]
    else:
        first = tl.load(side[6] + b)
        return tl.full([], 0, tl.int64), first.to(tl.int64), tl.load(side[6] + b + 1) - first


class Place(NamedTuple):
    """A head of a batch, and the tokens of its queries and keys: batch index in memory, first, how many."""

    b: Any
    h: Any
    batch: Any
    first: Any
    n_rows: Any
    col_batch: Any
    col_first: Any
    n_cols: Any


class Rules(NamedTuple):
    """What makes scores and weights of products, as arguments of a kernel.  bits: see ``bitmask.py``."""

    bits: Any
    mask: Any
    query_mask: Any
    key_mask: Any
    seed: Any
    dropout_p: Any
    scale: Any


@triton.jit
def slice_of(side, batch, h, first):
    """Pointer to token 0 of head h."""
    head = (h // side[5]).to(tl.int64)
    return side[0] + batch * side[1] + head * side[2] + first * side[3]


@triton.jit
def load_rows(pointer, stride, rows, count, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Elements start .. start + BLOCK of the rows, [R, BLOCK]; zeros outside."""
    d = start + tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointer + at, mask=(rows[:, None] < count) & (d[None, :] < WIDTH), other=0.0)


# bfloat16 in the interpreter: its dot takes the bits for integers and its casts truncate, so it is spelled out there.


@triton.jit
def wide(x):
    """x in fp32."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            return x.to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x rounded to nearest even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            i = x.to(tl.uint32, bitcast=True).to(tl.int64)
            i = tl.where(x == x, (i + 0x7FFF + ((i >> 16) & 1)) >> 16, 0x7FC0)
            return i.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def product(x, y, total):
    """total + x y, summed in fp32.  "ieee": float32 inputs are never rounded to TF32.

    Each product of float32 is a link that is summed apart, because the error of a sum grows with the length of its
    chain; a matrix instruction sums half types in short links by itself.  max_num_imprecise_acc means nothing to
    float32, but without it the compiler folds the addition into the product and makes one chain of all links.
    """
    if INTERPRETED:
        x, y = wide(x), wide(y)
    if x.dtype == tl.float32:
        return total + tl.dot(x, y, tl.zeros_like(total), input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(x, y, total)


@triton.jit
def fitted(x, dtype: tl.constexpr):
    """(x rounded to dtype, what undoes its scaling).  float16 has few exponents: there the tile is scaled by a power of
    two that makes its largest element about 2^14, so that small elements keep their digits and none overflows."""
    if dtype == tl.float16:
        largest = tl.max(tl.where(is_finite(x), tl.abs(x), 0.0))
        exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 253)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        return narrow(x * up, dtype), down
    else:
        return narrow(x, dtype), 1.0


@triton.jit
def fitted_product(x, y, total):
    """total + x y, x in fp32 and rounded to the type of y."""
    if y.dtype == tl.float16:
        small, down = fitted(x, y.dtype)
        return total + product(small, y, tl.zeros_like(total)) * down
    else:
        return product(narrow(x, y.dtype), y, total)


# Scores. A mask is None or (pointer, strides of batch, head, row, column), uint8 (1 takes part) or float (added);
# a token mask is None or (pointer to uint8, stride of batch, stride of token).


@triton.jit
def permitted(tokens, token_mask, b, count):
    """Bool [T]: tokens that exist and that the token mask allows."""
    ok = tokens < count
    if token_mask is not None:
        at = token_mask[0] + b.to(tl.int64) * token_mask[1] + tokens.to(tl.int64) * token_mask[2]
        ok = ok & (tl.load(at, mask=ok, other=0) != 0)
    return ok


@triton.jit
def dots(
    x, row_ptr, row_stride, rows, n_rows, col_ptr, col_stride, cols, n_cols,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 <row, column> [R, C], summed in products of BLOCK_D elements; x holds the first BLOCK_D of the rows."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    total = product(x, tl.trans(load_rows(col_ptr, col_stride, cols, n_cols, 0, WIDTH, BLOCK_D)), total)
    if WIDTH <= 4 * BLOCK_D:
        for start in tl.static_range(BLOCK_D, WIDTH, BLOCK_D):
            x = load_rows(row_ptr, row_stride, rows, n_rows, start, WIDTH, BLOCK_D)
            y = load_rows(col_ptr, col_stride, cols, n_cols, start, WIDTH, BLOCK_D)
            total = product(x, tl.trans(y), total)
    else:  # written out, so many products would hold the addresses of all their tiles at once
        for start in range(BLOCK_D, WIDTH, BLOCK_D):
            x = load_rows(row_ptr, row_stride, rows, n_rows, start, WIDTH, BLOCK_D)
            y = load_rows(col_ptr, col_stride, cols, n_cols, start, WIDTH, BLOCK_D)
            total = product(x, tl.trans(y), total)
    return total


@triton.jit
def biased(total, scale, valid, mask, b, h, rows, cols):
    """(scores, valid): scale * dot + bias in fp32; valid without the pairs that the mask or a score of -inf forbids."""
    scores = total * scale
    if mask is not None:
        base = mask[0] + b.to(tl.int64) * mask[1] + h.to(tl.int64) * mask[2]
        at = rows.to(tl.int64) * mask[3] + cols.to(tl.int64) * mask[4]
        if mask[0].dtype.element_ty == tl.uint8:
            valid = valid & (tl.load(base + at, mask=valid, other=0) != 0)
        else:
            bias = wide(tl.load(base + at, mask=valid, other=0.0))
            valid = valid & (bias != -INF)
            scores += bias
    return scores, valid & (scores != -INF)


@triton.jit
def ranking(scores, valid):
    return tl.where(valid, tl.where(scores == scores, scores, -INF), float("nan"))


@triton.jit
def no_more_than_0(x):
    """min(x, 0) that keeps NaN."""
    return tl.where(x > 0.0, 0.0, x)


@triton.jit
def lost(rank):
    """Bool [R]: a NaN or +inf among the valid scores."""
    return tl.max(((rank == INF) | (rank == -INF)).to(tl.int32), 1) > 0


@triton.jit
def greatest(x):
    """The largest of a vector.  By way of a matrix: on sm_100 Triton 3.7 cannot lay out a vector that was reduced
    twice."""
    return tl.max(x[:, None])


@triton.jit
def some_wild(x):
    """Whether any element of a tile is NaN or infinite."""
    return tl.max((~is_finite(x)).to(tl.int32)) > 0


# Selection. Thresholds are searched among the integers that order like floats, compared as floats.


@triton.jit
def ordered(x):
    """The int32 that orders like the float; both zeros are 0."""
    i = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, tl.where(i >= 0, i, i ^ 0x7FFFFFFF))


@triton.jit
def unordered(i):
    return tl.where(i >= 0, i, i ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def probit_tail(share):
    """z with Q(z) = share, by the rational approximation 26.2.23 of Abramowitz and Stegun, good to 4.5e-4."""
    tail = tl.maximum(tl.minimum(share, 1.0 - share), 1e-7)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(share < 0.5, z, -z)


@triton.jit
def narrowed(rank, topk, enough, middle, low, high, count, above):
    """The bracket [low, high) of the bar after a count of the row at ``middle``; rows that are done keep theirs."""
    busy = (count > enough) & (low + 1 < high)
    middle = tl.maximum(low + 1, tl.minimum(high - 1, middle))
    n = tl.sum((rank >= unordered(middle)[:, None]).to(tl.int32), 1)
    up = busy & (n >= topk)
    down = busy & (n < topk)
    low, count = tl.where(up, middle, low), tl.where(up, n, count)
    return low, tl.where(down, middle, high), count, tl.where(down, n, above)


@triton.jit
def search(rank, topk, enough, GUESS: tl.constexpr):
    """(bar [R], count [R], above [R]): count = #(rank >= bar) is in topk .. enough, or is all that is valid when less.

    Where ties make that impossible bar is the topk-th best value itself and above = #(rank > bar) < topk < count.
    GUESS starts from the two values between which the bar lies if the row is normally distributed.  Then the bracket of
    the bar is halved as a float, which a few steps end for data without ties.  What is left after them shrinks it to
    values that occur, which ends ties, and halves it as an integer, which bounds the rounds whatever the data: 32.
    """
    count = tl.sum((rank == rank).to(tl.int32), 1)
    above = tl.zeros_like(count)
    low = ordered(tl.min(tl.where(rank == rank, rank, INF), 1))
    high = ordered(tl.max(tl.where(rank == rank, rank, -INF), 1)) + 1
    going = greatest(((count > enough) & (low + 1 < high)).to(tl.int32))
    if GUESS:
        if going > 0:
            n = tl.maximum(count, 1).to(tl.float32)
            mean = tl.sum(tl.where(rank == rank, rank, 0.0), 1) / n
            off = tl.where(rank == rank, rank - mean[:, None], 0.0)
            deviation = tl.sqrt(tl.sum(off * off, 1) / n)
            guess = mean + deviation * probit_tail(1.25 * topk / n)
            low, high, count, above = narrowed(rank, topk, enough, ordered(guess), low, high, count, above)
            guess = mean + deviation * probit_tail(0.8 * topk / n)
            low, high, count, above = narrowed(rank, topk, enough, ordered(guess), low, high, count, above)
            going = greatest(((count > enough) & (low + 1 < high)).to(tl.int32))
    rounds = 0
    while (going > 0) & (rounds < 8):
        middle = ordered(0.5 * unordered(low) + 0.5 * unordered(high))
        low, high, count, above = narrowed(rank, topk, enough, middle, low, high, count, above)
        middle = ordered(0.5 * unordered(low) + 0.5 * unordered(high))
        low, high, count, above = narrowed(rank, topk, enough, middle, low, high, count, above)
        going = greatest(((count > enough) & (low + 1 < high)).to(tl.int32))
        rounds += 1
    while going > 0:
        floor, ceiling = unordered(low), unordered(high)
        below = (rank == rank) & ~(rank >= ceiling[:, None])  # the ceiling above +inf is NaN
        low = ordered(tl.min(tl.where(rank >= floor[:, None], rank, INF), 1))
        high = ordered(tl.max(tl.where(below, rank, -INF), 1)) + 1
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        low, high, count, above = narrowed(rank, topk, enough, middle, low, high, count, above)
        going = greatest(((count > enough) & (low + 1 < high)).to(tl.int32))
    return unordered(low), count, above


@triton.jit
def cut(rank, places, topk, GUESS: tl.constexpr, SIZE: tl.constexpr):
    """(bar [R], last [R]) with which ``chosen`` takes the topk best of each row, or all valid ones where there are
    fewer.

    places [1, SIZE] ascending: the lower one wins a tie.  Surplus ties are cut at a place, which is searched like
    the bar.
    """
    bar, count, above = search(rank, topk, topk, GUESS)
    last = tl.full(bar.shape, SIZE, tl.int32)
    if greatest(count) > topk:
        room = topk - above
        before = tl.where(count > topk, -1, SIZE - 1)  # at most ``room`` ties up to here, more up to ``last``
        last = tl.where(count > topk, SIZE - 1, SIZE)
        while greatest(last - before) > 1:
            middle = (before + last) // 2
            n = tl.sum(((rank == bar[:, None]) & (places <= middle[:, None])).to(tl.int32), 1)
            fits = n <= room
            before = tl.where(fits, middle, before)
            last = tl.where(fits, last, middle)
        last = tl.where(count > topk, before, SIZE)
    return bar, last


@triton.jit
def chosen(rank, places, bar, last):
    return (rank > bar[:, None]) | ((rank == bar[:, None]) & (places <= last[:, None]))


@triton.jit
def next_above(x):
    """The next larger float; NaN, which nothing reaches, above +inf."""
    return unordered(ordered(x) + 1)


# Dropout: Philox4x32-10 on the counter (j >> 2, i, h, b); pair (i, j) takes word j & 3.


@triton.jit
def dropout_factor(seed_ptr, dropout_p, b, h, i, j):
    """0 or 1 / (1 - p) for each pair; i and j broadcast against each other."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    none = (i + j) * 0
    c0, c1 = (none + (j >> 2)).to(tl.uint32), (none + i).to(tl.uint32)
    c2, c3 = (none + h).to(tl.uint32), (none + b).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, k0, k1, 10)
    word = none + (j & 3)
    drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return tl.where(drawn.to(tl.int64) >= dropout_p[0], dropout_p[1], 0.0)


# Values that are not finite. A pair that is not kept has weight 0, and 0 * NaN would spoil the sums of a dot product.


@triton.jit
def is_finite(x):
    return tl.abs(wide(x)) < INF


@triton.jit
def spoiled(kept, x):
    """What the entries of x [C, E] that are not finite add to the rows of kept [R, C]: 0, inf, -inf or NaN [R, E].

    One product counts all three kinds: +inf in units of 1, -inf of 2^9, NaN of 2^18.  C is at most 256.
    """
    x = wide(x)
    code = tl.where(x == INF, 1.0, tl.where(x == -INF, 512.0, tl.where(x != x, 262144.0, 0.0)))
    zeros = tl.zeros([kept.shape[0], x.shape[1]], tl.float32)
    total = product(narrow(kept.to(tl.float32), tl.bfloat16), narrow(code, tl.bfloat16), zeros).to(tl.int32)
    up, down, neither = (total & 511) != 0, (total & 261632) != 0, total >= 262144
    return tl.where(neither | (up & down), float("nan"), tl.where(up, INF, tl.where(down, -INF, 0.0)))


@triton.jit
def shrunk(x):
    """x * 2^-24, except that float16 stays as it is: sums of it do not overflow float32, and its small values would."""
    if x.dtype == tl.float16:
        return x
    else:
        return narrow(wide(x) * 5.9604644775390625e-08, x.dtype)


@triton.jit
def grown(x, dtype: tl.constexpr):
    """Undoes ``shrunk``; dtype is that of the values."""
    if dtype == tl.float16:
        return x
    else:
        return x * 16777216.0
