"""From the operators of family A to kernels: which ones run a call, with which tiles, and the memory they write.

The four functions take the arguments of their operators (hivilt/ops), checked, with cu_seqlens as a ``Packed``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import configs, launch
from .dense_attention import (
    _attention_forward_kernel,
    _bias_gradient_kernel,
    _delta_kernel,
    _key_gradient_kernel,
    _pack_lists_kernel,
    _query_gradient_kernel,
)
from .selected_attention import (
    _gather_forward_kernel,
    _gather_key_gradient_kernel,
    _gather_query_gradient_kernel,
)
from .topk_attention import _merge_lists_kernel, _stream_select_kernel, _topk_attention_kernel

TOPK_LONG = 928  # most that a row longer than a tile may keep: its candidates have to fit into a program
GATHER_FROM = 32  # columns per kept one from which lists beat a bitmask (docs/topk_attention.md)
FUSED = 128  # columns up to which one kernel selects and attends in a half type; more would need too many registers
SAMPLE = 256  # columns looked at for the first bar
SAMPLE_SINGLE = 64  # the same for float32 and wide heads, whose products take registers
INF = float("inf")


class Packed(NamedTuple):
    """Segments of packed sequences: where they start, on the device, and the longest."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int

    @property
    def batches(self) -> int:
        return self.starts_q.shape[0] - 1


class Problem(NamedTuple):
    """What the kernels need to know about a call beside its tensors."""

    batches: int
    heads: int
    queries: int  # the longest segment's
    keys: int
    starts_q: Tensor | None
    starts_k: Tensor | None


def why_not(part: str, dtype: torch.dtype, topk: int, columns: int) -> str | None:
    """The reason why a selection of ``topk`` from ``columns`` does not fit, or None."""
    tile = one_tile(part, dtype, True)
    if topk <= TOPK_LONG or topk >= columns or columns <= tile:
        return None
    return f"topk = {topk} of {columns}: the kernels keep up to {TOPK_LONG} of rows longer than {tile}"


def one_tile(part: str, dtype: torch.dtype, heavy: bool) -> int:
    """Columns up to which a row is selected from in one tile; ``heavy`` calls have wide heads or masks."""
    limits = configs.limits(part)
    if dtype == torch.float32:
        return limits.one_tile_single
    return min(512, limits.one_tile_half) if heavy else limits.one_tile_half


def in_one_tile(x: Tensor, columns: int, *masks: Tensor | None) -> bool:
    """Whether rows of so many columns, selected from with the queries x under these masks, fit into a tile."""
    part, _ = launch.part_of(x)
    heavy = x.shape[-1] > 64 or any(mask is not None for mask in masks)
    return columns <= one_tile(part, x.dtype, heavy)


def tiles(x: Tensor, kernel: str, widths: tuple[int, ...], extras: tuple = ()) -> configs.Config:
    """The configuration of a kernel for the dtype of x and these head widths.

    Where any of ``extras`` (masks, a bias, a seed) is there, the kernel needs more registers and may have another.
    """
    part, _ = launch.part_of(x)
    name = kernel if all(extra is None for extra in extras) else f"{kernel}_heavy"
    return configs.lookup(part, name, kind(x.dtype), min(256, max(1, *widths)))


def kind(dtype: torch.dtype) -> str:
    """The dtype's name in the table of configurations."""
    return str(dtype).removeprefix("torch.")


def power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def link(width: int, dtype: torch.dtype) -> int:
    """Elements of a head that one product of scores takes; the interpreter sums as float32 does in either type."""
    return min(16 if dtype == torch.float32 or launch.INTERPRETED else 64, power(width))


def backward_link(width: int, dtype: torch.dtype) -> int:
    """The link with which backward repeats forward's sums; a matrix instruction's chain does not depend on it."""
    return link(width, dtype) if dtype == torch.float32 or launch.INTERPRETED else power(width)


# The operators.


def topk_attention(query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, packed,
                   seed,
                   scale, dropout_p):  # fmt: skip
    """Operator ``hivilt::topk_attention``: (out, lse, indices)."""
    p = problem(query, key, packed)
    out, lse = _blank_results(query, value, packed)
    masks = (attn_mask, key_mask, query_mask)
    if topk < 0:
        _dense(p, query, key, value, None, 0, masks, seed, scale, dropout_p, out, lse)
        return out, lse, query.new_empty(0, dtype=torch.int32)
    lists = _blank_lists(query, key, topk, axis, select_query is not None, packed)
    if axis == 0 and select_query is None and p.keys <= FUSED and query.dtype != torch.float32:
        _one_tile(p, launch.side(query, p.heads, p.starts_q), launch.side(key, p.heads, p.starts_k), query.dtype, topk,
                  launch.mask(attn_mask), query_mask, key_mask, scale, p.heads, lists, None,
                  (value, out, lse, seed, dropout_p))  # fmt: skip
        return out, lse, lists
    gather = (
        axis == 0 and select_query is None and p.keys >= GATHER_FROM * topk and not in_one_tile(query, p.keys, *masks)
    )
    marks = torch.zeros_like(lse) if gather else None
    bits = _select(
        p, query, key, topk, axis, masks, select_query, select_key, scale, lists, marks, want_bits=not gather
    )
    if gather:
        _gather(p, query, key, value, lists, marks, attn_mask, seed, scale, dropout_p, out, lse)
    else:
        _dense(
            p, query, key, value, bits or _bits(p, lists, axis + 1), axis + 1, masks, seed, scale, dropout_p, out, lse
        )
    return out, lse, lists


def topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, packed, scale):
    """Operator ``hivilt::topk_select``: indices."""
    p = problem(query, key, packed)
    lists = _blank_lists(query, key, topk, axis, select_query is not None, packed)
    masks = (attn_mask, key_mask, query_mask)
    _select(p, query, key, topk, axis, masks, select_query, select_key, scale, lists)
    return lists


def selected_attention(query, key, value, indices, axis, attn_mask, packed, seed, scale, dropout_p):
    """Operator ``hivilt::selected_attention``: (out, lse)."""
    p = problem(query, key, packed)
    out, lse = _blank_results(query, value, packed)
    indices = indices.contiguous()
    if axis == 0 and p.keys >= GATHER_FROM * indices.shape[3]:
        _gather(p, query, key, value, indices, None, attn_mask, seed, scale, dropout_p, out, lse)
    else:
        masks = (attn_mask, None, None)
        bits = _bits(p, indices, axis + 1)
        _dense(p, query, key, value, bits, axis + 1, masks, seed, scale, dropout_p, out, lse, listed_only=True)
    return out, lse


def topk_attention_backward(grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask,
                            query_mask,
                            packed, seed, scale, dropout_p, bias_grad):  # fmt: skip
    """Operator ``hivilt::topk_attention_backward``: gradients of query, key, value and the bias."""
    p = problem(query, key, packed)
    sparse = indices.dim() > 1
    if sparse:  # the lists already honour every mask; a float bias still enters the scores
        key_mask = query_mask = None
        attn_mask = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
    masks = (attn_mask, key_mask, query_mask)
    grads = [_token_major(x, x.shape[3], packed) for x in (query, key, value)]
    delta = _delta(grad_out, grad_lse, out)
    lse = lse.contiguous()
    indices = indices.contiguous()
    gather = sparse and axis == 0 and packed is None and p.keys >= GATHER_FROM * max(1, indices.shape[3])
    orientation = axis + 1 if sparse else 0
    bits = _bits(p, indices, orientation) if sparse and (bias_grad or not gather) else None
    rest = (lse, delta, masks, seed, scale, dropout_p)
    if gather:
        _gather_backward(p, query, key, value, grad_out, indices, *rest, grads)
    else:
        _dense_backward(p, query, key, value, grad_out, bits, orientation, *rest, grads)
    grad_bias = query.new_empty(0)
    if bias_grad:
        grad_bias = _bias_gradient(p, query, key, value, grad_out, bits, orientation, *rest)
    return (*grads, grad_bias)


def problem(query: Tensor, key: Tensor, packed: Packed | None) -> Problem:
    if packed is None:
        return Problem(query.shape[0], query.shape[1], query.shape[2], key.shape[2], None, None)
    return Problem(packed.batches, query.shape[1], packed.longest_q, packed.longest_k, packed.starts_q, packed.starts_k)


# Results. In packed calls tokens behind the last segment belong to nobody: no kernel writes them.


def _token_major(like: Tensor, width: int, packed: Packed | None) -> Tensor:
    """[B, H, T, width] whose memory is [B, T, H, width]."""
    B, H, T, _ = like.shape
    new = like.new_empty if packed is None else like.new_zeros
    return new(B, T, H, width).transpose(1, 2)


def _blank_results(query: Tensor, value: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor]:
    out = _token_major(query, value.shape[3], packed)
    if packed is None:
        return out, query.new_empty(query.shape[:3], dtype=torch.float32)
    return out, query.new_full(query.shape[:3], -INF, dtype=torch.float32)


def _blank_lists(query: Tensor, key: Tensor, topk: int, axis: int, shared: bool, packed: Packed | None) -> Tensor:
    shape = (query.shape[0], 1 if shared else query.shape[1], (query, key)[axis].shape[2], topk)
    if packed is None:
        return query.new_empty(shape, dtype=torch.int32)
    return query.new_full(shape, -1, dtype=torch.int32)


# Selection.


def _select(
    p, query, key, topk, axis, masks, select_query, select_key, scale, lists, marks=None, want_bits=False
) -> tuple | None:
    """Fills lists; marks (like lse), where given, with NaN for rows that a NaN or +inf score ruins and 0 for others.

    Returns the same selection as a bitmask where that is wanted and costs nothing, else None.
    """
    attn_mask, key_mask, query_mask = masks
    heads = p.heads
    if select_query is not None:
        if select_query.dtype != select_key.dtype:
            select_query, select_key = select_query.float(), select_key.float()
        dtype, heads, scale = select_query.dtype, 1, 1.0
        sides = [launch.shared_side(select_query, p.starts_q), launch.shared_side(select_key, p.starts_k)]
        if attn_mask is not None and attn_mask.dtype != torch.bool:  # a bias takes part as a mask alone
            attn_mask = attn_mask != -INF
    else:
        dtype = query.dtype
        sides = [launch.side(query, heads, p.starts_q), launch.side(key, heads, p.starts_k)]
    token_masks = [query_mask, key_mask]
    if axis == 1:
        sides.reverse()
        token_masks.reverse()
        p = Problem(p.batches, p.heads, p.keys, p.queries, p.starts_k, p.starts_q)
    mask = launch.mask(attn_mask, axis == 1)
    bits = None
    if in_one_tile(sides[0][0], p.keys, attn_mask, *token_masks):
        bits = _blank_bits(lists, p.keys) if want_bits else None
        _one_tile(p, *sides, dtype, topk, mask, *token_masks, scale, heads, lists, bits, None)
    else:
        _stream_select(p, *sides, dtype, topk, mask, *token_masks, scale, heads, lists, marks)
    return bits


def _one_tile(p, row, col, dtype, topk, mask, row_mask, col_mask, scale, heads, lists, bits, attend) -> None:
    """attend: None, or (value, out, lse, seed, dropout_p): attention with what was selected, in the same kernel."""
    like = row[0]
    width = like.shape[-1]
    value_width = 0 if attend is None else attend[0].shape[3]
    block_c = power(p.keys, 32)
    config = tiles(like, f"one_tile_{max(128, block_c)}", (width, value_width), (mask, row_mask, col_mask))
    blocks = triton.cdiv(p.queries, config.rows)
    tasks = p.batches * heads * blocks
    if tasks == 0:
        return
    value = out = lse = seed = drop = None
    if attend is not None:
        value, out, lse, seed, dropout_p = attend
        value = launch.side(value, heads, p.starts_k)
        out, lse = launch.strided(out), launch.strided(lse)
        drop = launch.dropout(dropout_p) if seed is not None else None
    launch.launch(
        _topk_attention_kernel, tasks,
        (row, col, value, out, lse, launch.strided(lists), bits, mask, launch.token_mask(row_mask),
         launch.token_mask(col_mask), seed, drop, topk, scale, heads, blocks),
        config.warps, config.stages,
        WIDTH=width, VALUE_WIDTH=value_width, BLOCK_R=config.rows, BLOCK_C=block_c, BLOCK_D=link(width, dtype),
        BLOCK_E=min(64, power(value_width)), BLOCK_K=power(topk), GUESS=block_c >= 128, ATTEND=attend is not None,
    )  # fmt: skip


def _stream_select(p, row, col, dtype, topk, mask, row_mask, col_mask, scale, heads, lists, marks) -> None:
    like = row[0]
    part, multiprocessors = launch.part_of(like)
    width = like.shape[-1]
    config = tiles(like, "stream_select", (width,), (mask, row_mask, col_mask))
    block_c = config.cols if topk <= 256 else 32  # a larger buffer leaves fewer registers
    capacity = power(topk + 3 * block_c)
    block_r = max(16, min(config.rows, config.rows * 256 // capacity))
    warps = config.warps if capacity < 1024 else 16
    blocks = triton.cdiv(p.queries, block_r)
    slots = multiprocessors * configs.limits(part).programs
    tasks = p.batches * heads * blocks
    if tasks == 0:
        return
    # Few rows: several programs share one, as long as each has enough columns and the merge fits into a tile.
    splits = max(1, min(slots // tasks, p.keys // (8 * block_c), 2048 // power(topk)))
    programs = min(tasks * splits, slots)
    out_lists, bests, part_marks = lists, None, marks
    if splits > 1:
        out_lists = lists.new_full((*lists.shape[:3], splits * topk), -1)
        bests = lists.new_full(out_lists.shape, float("nan"), dtype=torch.float32)
        part_marks = None if marks is None else marks.new_zeros((*marks.shape, splits))
    # A bar that the e-th best of the sample clears on average would leave half of the rows short; 4 deviations more
    # leave almost none.
    sample = SAMPLE_SINGLE if dtype == torch.float32 or width > 64 else SAMPLE
    expected = topk * sample * splits / p.keys
    sampled = int(expected + 4 * expected**0.5) + 1
    if sampled > sample // 4 or p.keys < 2 * sample * splits or capacity >= 512:
        sample = 0
    at_marks = None if part_marks is None else (*launch.strided(part_marks)[:3], splits)
    launch.launch(
        _stream_select_kernel, programs,
        (row, col, launch.strided(out_lists), bests, at_marks,
         like.new_empty(programs * block_r * capacity, dtype=torch.float32),
         like.new_empty(programs * block_r * capacity, dtype=torch.int32),
         mask, launch.token_mask(row_mask), launch.token_mask(col_mask), topk, sampled, scale, heads, blocks, splits,
         tasks * splits),
        warps, config.stages,
        WIDTH=width, BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_D=link(width, dtype),
        BLOCK_K=power(topk), CAPACITY=capacity, SAMPLE=sample,
    )  # fmt: skip
    if splits > 1:
        rows = lists.shape[0] * lists.shape[1] * lists.shape[2]
        config = tiles(like, "merge_lists", (64,))
        launch.launch(
            _merge_lists_kernel, triton.cdiv(rows, config.rows),
            (bests, out_lists, lists, part_marks, marks, topk, splits, rows), config.warps, config.stages,
            BLOCK_R=config.rows, BLOCK_C=power(splits * topk), BLOCK_K=power(topk), BLOCK_S=power(splits),
        )  # fmt: skip


# Attention over lists.


def _gather(p, query, key, value, lists, marks, attn_mask, seed, scale, dropout_p, out, lse) -> None:
    width, value_width = query.shape[3], value.shape[3]
    config = tiles(query, "gather_forward", (width, value_width))
    blocks = triton.cdiv(p.queries, config.rows)
    if p.batches * p.heads * blocks == 0:
        return
    launch.launch(
        _gather_forward_kernel, p.batches * p.heads * blocks,
        (launch.side(query, p.heads, p.starts_q), launch.side(key, p.heads, p.starts_k),
         launch.side(value, p.heads, p.starts_k), _list_strides(lists), launch.strided(out), launch.strided(lse), marks,
         launch.mask(attn_mask), seed, launch.dropout(dropout_p) if seed is not None else None, lists.shape[3], scale,
         p.heads, blocks),
        config.warps, config.stages,
        WIDTH=width, VALUE_WIDTH=value_width, BLOCK_R=config.rows, BLOCK_L=config.cols, BLOCK_D=power(width),
        BLOCK_E=power(value_width),
    )  # fmt: skip


def _list_strides(lists: Tensor) -> tuple:
    """(pointer, strides of batch, head, row); one head's lists serve all."""
    return (lists, lists.stride(0), lists.stride(1) if lists.shape[1] > 1 else 0, lists.shape[3])


def _gather_backward(p, query, key, value, grad_out, lists, lse, delta, masks, seed, scale, dropout_p, grads) -> None:
    width, value_width, length = query.shape[3], value.shape[3], lists.shape[3]
    config = tiles(query, "gather_backward", (width, value_width), (seed,))
    sides = [launch.side(x, p.heads) for x in (query, key, value, grad_out)]
    at_lse, mask = launch.strided(lse), launch.mask(masks[0])
    drop = launch.dropout(dropout_p) if seed is not None else None
    widths = {"WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_R": config.rows, "BLOCK_L": config.cols,
             "BLOCK_D": power(width), "BLOCK_E": power(value_width)}  # fmt: skip
    blocks = triton.cdiv(p.queries, config.rows)
    if p.batches * p.heads * blocks:
        launch.launch(
            _gather_query_gradient_kernel, p.batches * p.heads * blocks,
            (*sides, _list_strides(lists), at_lse, delta, launch.strided(grads[0]), mask, seed, drop, length, scale,
            p.heads,
             blocks),
            config.warps, config.stages, **widths,
        )  # fmt: skip
    blocks = triton.cdiv(p.keys, config.rows)
    groups = key.shape[1]
    if p.batches * groups * blocks:
        runs, entries = _inverse(lists, p.keys)
        launch.launch(
            _gather_key_gradient_kernel, p.batches * groups * blocks,
            (*sides, runs, entries, at_lse, delta, launch.strided(grads[1]), launch.strided(grads[2]), mask, seed, drop,
             max(1, length), lists.shape[1], scale, groups, blocks),
            config.warps, config.stages, **widths,
        )  # fmt: skip


def _inverse(lists: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(runs, entries): flat positions of the lists sorted by slice and column, and where the run of each column starts.

    The sort is stable, so a column's rows come in ascending order and its sum has one order only.
    """
    slices = lists.shape[0] * lists.shape[1]
    number = torch.arange(slices, device=lists.device).view(*lists.shape[:2], 1, 1) * columns
    column = torch.where(lists < 0, slices * columns, lists + number).flatten()
    if slices * columns < 2**31 - 1:
        column = column.to(torch.int32)
    column, entries = column.sort(stable=True)
    every = torch.arange(slices * columns + 1, device=lists.device, dtype=column.dtype)
    return torch.searchsorted(column, every), entries


# Attention over all pairs, or over those of a bitmask.


def _blank_bits(lists: Tensor, columns: int) -> tuple:
    """(pointer, strides of batch, head, row) of a bitmask for lists of ``columns``; one head's bits serve all."""
    bits = lists.new_empty((*lists.shape[:3], max(1, triton.cdiv(columns, 32))))
    return (bits, bits.stride(0), bits.stride(1) if bits.shape[1] > 1 else 0, bits.stride(2))


def _bits(p: Problem, lists: Tensor, orientation: int) -> tuple:
    """The bitmask of lists. orientation 1: rows are queries, 2: rows are keys."""
    bits = _blank_bits(lists, p.keys if orientation == 1 else p.queries)
    words = bits[0].shape[3]
    part, _ = launch.part_of(lists)
    config = configs.lookup(part, "pack_lists", "bfloat16", 64)
    rows = bits[0].numel() // words
    block_w = min(config.cols, power(words, 1))
    word_blocks = triton.cdiv(words, block_w)
    tasks = triton.cdiv(rows, config.rows) * word_blocks
    if tasks:
        launch.launch(
            _pack_lists_kernel, tasks, (lists, bits[0], rows, lists.shape[3], words, word_blocks), config.warps,
            config.stages, BLOCK_R=config.rows, BLOCK_W=block_w, BLOCK_L=8,
        )  # fmt: skip
    return bits


def _dense(p, query, key, value, bits, orientation, masks, seed, scale, dropout_p, out, lse, listed_only=False) -> None:
    width, value_width = query.shape[3], value.shape[3]
    config = tiles(query, "dense_forward", (width, value_width))
    blocks = triton.cdiv(p.queries, config.rows)
    tasks = p.batches * p.heads * blocks
    if tasks == 0:
        return
    attn_mask, key_mask, query_mask = masks
    launch.launch(
        _attention_forward_kernel, tasks,
        (launch.side(query, p.heads, p.starts_q), launch.side(key, p.heads, p.starts_k),
         launch.side(value, p.heads, p.starts_k), launch.strided(out), launch.strided(lse), bits,
         launch.mask(attn_mask), launch.token_mask(query_mask), launch.token_mask(key_mask), seed,
         launch.dropout(dropout_p) if seed is not None else None, scale, p.heads, blocks),
        config.warps, config.stages,
        WIDTH=width, VALUE_WIDTH=value_width, BLOCK_R=config.rows, BLOCK_C=config.cols, BLOCK_D=link(width,
        query.dtype),
        BLOCK_E=power(value_width), BITS=orientation, LISTED_ONLY=listed_only,
    )  # fmt: skip


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    B, H, T, width = out.shape
    delta = out.new_empty((B, H, T), dtype=torch.float32)
    config = tiles(out, "delta", (64,))
    blocks = triton.cdiv(T, config.rows)
    if B * H * blocks:
        grad_lse = None if grad_lse is None else (grad_lse, *grad_lse.stride())
        launch.launch(
            _delta_kernel, B * H * blocks,
            (launch.strided(launch.rows(grad_out)), launch.strided(launch.rows(out)), grad_lse, delta, H, T, blocks),
            config.warps, config.stages, VALUE_WIDTH=width, BLOCK_R=config.rows, BLOCK_E=power(width),
        )  # fmt: skip
    return delta


def _dense_backward(
    p, query, key, value, grad_out, bits, orientation, lse, delta, masks, seed, scale, dropout_p, grads
) -> None:
    width, value_width = query.shape[3], value.shape[3]
    attn_mask, key_mask, query_mask = masks
    sides = (launch.side(query, p.heads, p.starts_q), launch.side(key, p.heads, p.starts_k),
             launch.side(value, p.heads, p.starts_k), launch.side(grad_out, p.heads, p.starts_q))  # fmt: skip
    rest = (launch.mask(attn_mask), launch.token_mask(query_mask), launch.token_mask(key_mask), seed,
            launch.dropout(dropout_p) if seed is not None else None, scale)  # fmt: skip
    widths = {"WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_D": power(width), "BLOCK_E": power(value_width),
              "BITS": orientation, "LINK": backward_link(width, query.dtype)}  # fmt: skip
    at_lse = launch.strided(lse)
    config = tiles(query, "dense_query_gradient", (width, value_width), (seed,))
    blocks = triton.cdiv(p.queries, config.rows)
    if p.batches * p.heads * blocks:
        launch.launch(
            _query_gradient_kernel, p.batches * p.heads * blocks,
            (*sides, at_lse, delta, launch.strided(grads[0]), bits, *rest, p.heads, blocks),
            config.warps, config.stages, BLOCK_R=config.rows, BLOCK_C=config.cols, **widths,
        )  # fmt: skip
    config = tiles(query, "dense_key_gradient", (width, value_width), (seed,))
    blocks, groups = triton.cdiv(p.keys, config.cols), key.shape[1]
    if p.batches * groups * blocks:
        launch.launch(
            _key_gradient_kernel, p.batches * groups * blocks,
            (*sides, at_lse, delta, launch.strided(grads[1]), launch.strided(grads[2]), bits, *rest, groups, blocks),
            config.warps, config.stages, BLOCK_R=config.rows, BLOCK_C=config.cols, **widths,
        )  # fmt: skip


def _bias_gradient(
    p, query, key, value, grad_out, bits, orientation, lse, delta, masks, seed, scale, dropout_p
) -> Tensor:
    attn_mask, key_mask, query_mask = masks
    width, value_width = query.shape[3], value.shape[3]
    config = tiles(query, "bias_gradient", (width, value_width))
    row_blocks, col_blocks = triton.cdiv(p.queries, config.rows), triton.cdiv(p.keys, config.cols)
    # An axis of size 1 needs no summing where the call has one element of it as well.
    over = [
        own == 1 and all_ > 1
        for own, all_ in zip(attn_mask.shape, (p.batches, p.heads, p.queries, p.keys), strict=True)
    ]
    grad = attn_mask.new_empty(attn_mask.shape, dtype=torch.float32)
    own_blocks = (1 if over[2] else row_blocks) * (1 if over[3] else col_blocks)
    tasks = attn_mask.shape[0] * attn_mask.shape[1] * own_blocks
    if tasks * p.batches * p.heads == 0:
        return torch.zeros_like(grad).to(attn_mask.dtype)
    launch.launch(
        _bias_gradient_kernel, tasks,
        (launch.side(query, p.heads), launch.side(key, p.heads), launch.side(value, p.heads), launch.side(grad_out,
        p.heads),
         launch.strided(lse), delta, grad, bits, launch.mask(attn_mask),
         launch.token_mask(query_mask), launch.token_mask(key_mask), seed,
         launch.dropout(dropout_p) if seed is not None else None, scale, p.batches, p.heads, attn_mask.shape[1],
         row_blocks,
         col_blocks),
        config.warps, config.stages,
        WIDTH=width, VALUE_WIDTH=value_width, BLOCK_R=config.rows, BLOCK_C=config.cols, BLOCK_D=power(width),
        BLOCK_E=power(value_width), BITS=orientation,
        LINK=backward_link(width, query.dtype), OVER_BATCHES=over[0], OVER_HEADS=over[1],
        OVER_ROWS=over[2], OVER_COLS=over[3],
    )  # fmt: skip
    return grad.to(attn_mask.dtype)
