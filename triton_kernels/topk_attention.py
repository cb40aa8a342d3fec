"""Top-k selection on the GPU, with attention fused to it where a whole row of scores fits into registers.

``_topk_attention_kernel``  a block of rows against all columns in one tile: QK^T, threshold by counting, then (ATTEND)
                            softmax and PV.  Nothing but out, lse and the lists is written.
``_stream_select_kernel``   rows longer than a tile: candidates above a sampled bar are appended to a buffer and, when
                            it fills up, cut back to the topk best.  A count proves the sampled bar, or the rows run
                            again.
``_merge_lists_kernel``     the best of the lists that several programs made of parts of one row.

Rows are queries and columns keys with axis="keys", the other way round with axis="queries".  Formulas and the cost
model: docs/topk_attention.md.
"""

import triton
import triton.language as tl

from .bitmask import pack
from .tiles import (
    INF,
    LN2,
    LOG2E,
    biased,
    chosen,
    cut,
    dots,
    dropout_factor,
    fitted_product,
    greatest,
    is_finite,
    load_rows,
    lost,
    narrow,
    next_above,
    permitted,
    ranking,
    search,
    segment,
    slice_of,
    some_wild,
    spoiled,
)


@triton.jit
def store_lists(start, row_ok, topk, words, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Writes the columns that ``words`` keep to start [R], ascending, and -1 behind them."""
    held = words - ((words >> 1) & 0x55555555)  # how many bits, in the manner of Hacker's Delight, 5-1
    held = (held & 0x33333333) + ((held >> 2) & 0x33333333)
    held = (held + (held >> 4)) & 0x0F0F0F0F
    held = ((held + (held >> 8) + (held >> 16) + (held >> 24)) & 0x3F).to(tl.int32)
    slot = tl.cumsum(held, 1) - held
    filled = tl.sum(held, 1)
    column = tl.arange(0, WORDS)[None, :] * 32
    for _ in range(32):
        here = ((words & 1) != 0) & row_ok[:, None]
        tl.store(start[:, None] + slot, tl.broadcast_to(column, slot.shape), mask=here)
        slot += (words & 1).to(tl.int32)
        words = words >> 1
        column += 1
    tail = tl.arange(0, BLOCK_K)[None, :]
    tl.store(start[:, None] + tail, -1, mask=(tail >= filled[:, None]) & (tail < topk) & row_ok[:, None])


@triton.jit
def _topk_attention_kernel(
    row, col, value, out, lse, lists, bits, mask, row_mask, col_mask, seed, dropout_p, topk, scale, heads, blocks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, GUESS: tl.constexpr, ATTEND: tl.constexpr,
):  # fmt: skip
    """lists, bits: (pointer, strides of batch, head, row); bits may be None."""
    task = tl.program_id(0)
    b, h = (task // blocks) // heads, (task // blocks) % heads
    batch, first, n_rows = segment(row, b)
    col_batch, col_first, n_cols = segment(col, b)
    row_start = (task % blocks) * BLOCK_R
    rows = row_start + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    if row_start < n_rows:
        row_ptr = slice_of(row, batch, h, first)
        x = load_rows(row_ptr, row[3], rows, n_rows, 0, WIDTH, BLOCK_D)
        total = dots(
            x, row_ptr, row[3], rows, n_rows, slice_of(col, col_batch, h, col_first), col[3], cols, n_cols,
            WIDTH, BLOCK_D, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        valid = permitted(rows, row_mask, b, n_rows)[:, None] & permitted(cols, col_mask, b, n_cols)[None, :]
        scores, valid = biased(total, scale, valid, mask, b, h, rows[:, None], cols[None, :])
        rank = ranking(scores, valid)
        bar, last = cut(rank, cols[None, :], topk, GUESS, BLOCK_C)
        kept = chosen(rank, cols[None, :], bar, last)
        words = pack(kept, BLOCK_C, BLOCK_R)
        token = first + rows.to(tl.int64)
        start = lists[0] + batch * lists[1] + h.to(tl.int64) * lists[2] + token * lists[3]
        store_lists(start, rows < n_rows, topk, words, BLOCK_C // 32, BLOCK_K)
        if bits is not None:
            word = tl.arange(0, BLOCK_C // 32)[None, :]
            start = bits[0] + batch * bits[1] + h.to(tl.int64) * bits[2] + token * bits[3]
            in_bits = (rows[:, None] < n_rows) & (word * 32 < n_cols)
            tl.store(start[:, None] + word, words.to(tl.int32, bitcast=True), mask=in_bits)

        if ATTEND:
            gone = lost(rank)
            top = tl.max(tl.where(kept, rank, -INF), 1)
            top = tl.where(tl.abs(top) < INF, top, 0.0)
            weight = tl.where(kept & ~gone[:, None], tl.exp2((rank - top[:, None]) * LOG2E), 0.0)
            norm = tl.sum(weight, 1)
            norm_or_1 = tl.where(norm > 0.0, norm, 1.0)
            # Normalised before they meet the values, so that no sum overflows where their mean does not.
            weight = weight / norm_or_1[:, None]
            if seed is not None:
                weight *= dropout_factor(seed, dropout_p, b, h, rows[:, None], cols[None, :])
            blank = tl.where(gone, float("nan"), 0.0)
            value_ptr = slice_of(value, col_batch, h, col_first)
            out_ptr = out[0] + batch * out[1] + h.to(tl.int64) * out[2] + first * out[3]
            out_rows = out_ptr + rows.to(tl.int64)[:, None] * out[3]
            for start in tl.static_range(0, VALUE_WIDTH, BLOCK_E):
                e = start + tl.arange(0, BLOCK_E)
                v_at = cols.to(tl.int64)[:, None] * value[3] + e[None, :]
                v_in = (cols[:, None] < n_cols) & (e[None, :] < VALUE_WIDTH)
                v = tl.load(value_ptr + v_at, mask=v_in, other=0.0)
                zeros = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
                sums = fitted_product(weight, v, zeros)
                if some_wild(sums):
                    clean = tl.where(is_finite(v), v, 0.0)
                    sums = fitted_product(weight, clean, zeros) + spoiled(kept, v)
                out_in = (rows[:, None] < n_rows) & (e[None, :] < VALUE_WIDTH)
                tl.store(out_rows + e[None, :], narrow(sums + blank[:, None], v.dtype), mask=out_in)
            logs = tl.where(norm > 0.0, top + tl.log2(norm_or_1) * LN2, -INF) + blank
            lse_ptr = lse[0] + batch * lse[1] + h.to(tl.int64) * lse[2] + first
            tl.store(lse_ptr + rows, logs, mask=rows < n_rows)


@triton.jit
def _stream_select_kernel(
    row, col, lists, bests, marks, rank_scratch, column_scratch, mask, row_mask, col_mask,
    topk, sampled, scale, heads, blocks, splits, tasks,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CAPACITY: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """The topk best columns of each row (splits > 1: of each of so many parts of it, with their ranks in ``bests``).

    SAMPLE: columns of the sample whose ``sampled``-th best value is the first bar; 0 starts without one.
    marks: None, or floats like lse, NaN where a valid score of the row is NaN or +inf, else 0.
    """
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        split = task % splits
        row_task = task // splits
        block, head_task = row_task % blocks, row_task // blocks
        b, h = head_task // heads, head_task % heads
        batch, first, n_rows = segment(row, b)
        col_batch, col_first, n_cols = segment(col, b)
        if block * BLOCK_R < n_rows:
            rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
            row_ptr = slice_of(row, batch, h, first)
            col_ptr = slice_of(col, col_batch, h, col_first)
            x = load_rows(row_ptr, row[3], rows, n_rows, 0, WIDTH, BLOCK_D)
            rows_ok = permitted(rows, row_mask, b, n_rows)
            share = tl.cdiv(tl.cdiv(n_cols, splits), BLOCK_C) * BLOCK_C
            begin = split * share
            end = tl.minimum(n_cols, begin + share)
            room = tl.program_id(0).to(tl.int64) * (BLOCK_R * CAPACITY)
            ranks, columns = rank_scratch + room, column_scratch + room
            at = tl.arange(0, BLOCK_R)[:, None] * CAPACITY
            place = tl.arange(0, CAPACITY)[None, :]

            start_bar = tl.full([BLOCK_R], float("-inf"), tl.float32)
            if SAMPLE > 0:
                if end - begin >= 2 * SAMPLE:
                    cols = begin + tl.arange(0, SAMPLE) * ((end - begin) // SAMPLE)
                    total = dots(
                        x, row_ptr, row[3], rows, n_rows, col_ptr, col[3], cols, end, WIDTH, BLOCK_D, BLOCK_R, SAMPLE
                    )
                    valid = rows_ok[:, None] & permitted(cols, col_mask, b, end)[None, :]
                    scores, valid = biased(total, scale, valid, mask, b, h, rows[:, None], cols[None, :])
                    bar, count, _ = search(ranking(scores, valid), sampled, sampled + sampled // 4, True)
                    start_bar = tl.where(count >= sampled, bar, start_bar)

            filled = tl.zeros([BLOCK_R], tl.int32)
            bad = tl.zeros([BLOCK_R], tl.int32)
            tries = 0
            while tries < 2:
                bar = start_bar
                filled = tl.zeros([BLOCK_R], tl.int32)
                for c in range(begin, end, BLOCK_C):
                    cols = c + tl.arange(0, BLOCK_C)
                    total = dots(
                        x, row_ptr, row[3], rows, n_rows, col_ptr, col[3], cols, end, WIDTH, BLOCK_D, BLOCK_R, BLOCK_C
                    )
                    valid = rows_ok[:, None] & permitted(cols, col_mask, b, end)[None, :]
                    scores, valid = biased(total, scale, valid, mask, b, h, rows[:, None], cols[None, :])
                    rank = ranking(scores, valid)
                    bad = tl.maximum(bad, lost(rank).to(tl.int32))
                    some = rank >= bar[:, None]
                    slot = filled[:, None] + tl.cumsum(some.to(tl.int32), 1) - 1
                    tl.store(ranks + (at + slot), rank, mask=some)
                    tl.store(columns + (at + slot), tl.broadcast_to(cols[None, :], rank.shape), mask=some)
                    filled += tl.sum(some.to(tl.int32), 1)
                    if (greatest(filled) > CAPACITY - BLOCK_C) | (c + BLOCK_C >= end):
                        tl.debug_barrier()
                        few = tl.load(ranks + (at + place), mask=place < filled[:, None], other=float("nan"))
                        lowest, last = cut(few, place, topk, False, CAPACITY)
                        held = tl.zeros([BLOCK_R], tl.int32)
                        # What is kept moves to the front, never over what is not read yet.
                        for part in range(0, CAPACITY, BLOCK_C):
                            there = part + tl.arange(0, BLOCK_C)[None, :]
                            fewer = tl.load(ranks + (at + there), mask=there < filled[:, None], other=float("nan"))
                            column = tl.load(columns + (at + there), mask=there < filled[:, None], other=-1)
                            kept = chosen(fewer, there, lowest, last)
                            to = at + held[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
                            held += tl.sum(kept.to(tl.int32), 1)
                            tl.debug_barrier()
                            tl.store(ranks + to, fewer, mask=kept)
                            tl.store(columns + to, column, mask=kept)
                            tl.debug_barrier()
                        # Whoever comes later must beat the lowest: an equal one has the larger index.
                        bar = tl.where(filled >= topk, next_above(lowest), bar)
                        filled = held
                # The sampled bar was too high for a row that it left with fewer than topk: those run without one.
                short = (filled < topk) & (start_bar > float("-inf"))
                start_bar = tl.where(short, float("-inf"), start_bar)
                tries = tl.where((tries == 0) & (greatest(short.to(tl.int32)) > 0), 1, 2)

            to = batch * lists[1] + h.to(tl.int64) * lists[2] + (first + rows.to(tl.int64)) * lists[3] + split * topk
            for part in range(0, topk, BLOCK_C):  # all at once, the addresses would take too many registers
                slots = part + tl.arange(0, BLOCK_C)[None, :]
                here = (rows[:, None] < n_rows) & (slots < topk)
                listed = tl.load(columns + (at + slots), mask=slots < filled[:, None], other=-1)
                tl.store(lists[0] + (to[:, None] + slots), listed, mask=here)
                if bests is not None:
                    best = tl.load(ranks + (at + slots), mask=slots < filled[:, None], other=float("nan"))
                    tl.store(bests + (to[:, None] + slots), best, mask=here)
            if marks is not None:
                at_marks = marks[0] + batch * marks[1] + h.to(tl.int64) * marks[2] + (first + rows) * marks[3] + split
                tl.store(at_marks, tl.where(bad > 0, float("nan"), 0.0), mask=rows < n_rows)
            tl.debug_barrier()  # the next task writes where this one has read


@triton.jit
def _merge_lists_kernel(
    bests, columns, lists, part_marks, marks, topk, splits, rows_in_all, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The topk best of splits * topk candidates per row.  Parts stand in order, so a lower slot is a lower index."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows[:, None] < rows_in_all) & (place < splits * topk)
    at = rows.to(tl.int64)[:, None] * (splits * topk) + place
    rank = tl.load(bests + at, mask=inside, other=float("nan"))
    column = tl.load(columns + at, mask=inside, other=-1)
    bar, last = cut(rank, place, topk, False, BLOCK_C)
    kept = chosen(rank, place, bar, last)
    start = lists + rows.to(tl.int64)[:, None] * topk
    slot = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(start + slot, column, mask=kept)
    tail = tl.arange(0, BLOCK_K)[None, :]
    empty = (tail >= tl.sum(kept.to(tl.int32), 1)[:, None]) & (tail < topk) & (rows[:, None] < rows_in_all)
    tl.store(start + tail, -1, mask=empty)
    if marks is not None:
        part = tl.arange(0, BLOCK_S)[None, :]
        seen = (rows[:, None] < rows_in_all) & (part < splits)
        mark = tl.load(part_marks + rows.to(tl.int64)[:, None] * splits + part, mask=seen, other=0.0)
        tl.store(marks + rows, tl.sum(mark, 1), mask=rows < rows_in_all)
