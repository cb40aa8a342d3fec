"""Which pairs are kept, one bit each: 32 columns a word.

``_pack_lists_kernel``  lists -> bitmask

bits: None, or (pointer, strides of batch, head, row).  BITS says whose rows they are: 0 no bitmask, 1 queries (a word
holds 32 keys), 2 keys (a word holds 32 queries).
"""

import triton
import triton.language as tl


@triton.jit
def pack(kept, SIZE: tl.constexpr, BLOCK_R: tl.constexpr):
    """uint32 [R, SIZE / 32]: bit c % 32 of word c // 32 says whether column c is kept."""
    bit = tl.full([1, 1, 32], 1, tl.uint32) << tl.arange(0, 32)[None, None, :].to(tl.uint32)
    return tl.sum(tl.where(tl.reshape(kept, [BLOCK_R, SIZE // 32, 32]), bit, 0), 2)


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
    valid, bits, at, rows, row_start, cols, col_start, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """valid, without the pairs that the bitmask leaves out; at: a ``tiles.Place``."""
    if BITS == 1:
        listed = load_bits(bits, at.batch, at.h, at.first, rows, at.n_rows, col_start, at.n_cols, BLOCK_R, BLOCK_C)
        valid = valid & listed
    elif BITS == 2:
        listed = load_bits(
            bits, at.col_batch, at.h, at.col_first, cols, at.n_cols, row_start, at.n_rows, BLOCK_C, BLOCK_R
        )
        valid = valid & tl.trans(listed)
    return valid


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
