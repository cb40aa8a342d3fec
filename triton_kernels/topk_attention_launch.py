"""From the forward operators of family A to kernels: which ones run a call, and the memory they write.

The functions take the arguments of their operators (hivilt/ops), checked, with cu_seqlens as a ``Packed``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, launch
from . import topk_attention_plan as plan
from .bitmask import _pack_lists_kernel
from .dense_attention import _attention_forward_kernel
from .selected_attention import _gather_forward_kernel
from .topk_attention import _merge_lists_kernel, _stream_select_kernel, _topk_attention_kernel
from .topk_attention_plan import Call, Masks, Packed, Problem, cdiv, power

INF = float("inf")


# The operators.


def topk_attention(
    query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, packed, seed, scale,
    dropout_p,
):  # fmt: skip
    """Operator ``hivilt::topk_attention``: (out, lse, indices)."""
    p = plan.problem(query, key, packed)
    call = Call(p, query, key, value, Masks(attn_mask, key_mask, query_mask), seed, scale, dropout_p)
    out, lse = _blank_results(query, value, packed)
    if topk < 0:
        _dense(call, None, 0, out, lse)
        return out, lse, query.new_empty(0, dtype=torch.int32)
    lists = _blank_lists(query, key, topk, axis, select_query is not None, packed)
    own_rows = axis == 0 and select_query is None  # each query of each head selects keys
    if own_rows and p.keys <= plan.FUSED and query.dtype != torch.float32:
        _one_tile(_selection(call, topk, axis, None, None, lists), None, (call, out, lse))
        return out, lse, lists
    gather = own_rows and p.keys >= plan.GATHER_FROM * topk and not plan.in_one_tile(query, p.keys, call.masks)
    marks = torch.zeros_like(lse) if gather else None
    bits = _select(_selection(call, topk, axis, select_query, select_key, lists), marks, want_bits=not gather)
    if gather:
        _gather(call, lists, marks, out, lse)
    else:
        _dense(call, bits or bits_of(p, lists, axis + 1), axis + 1, out, lse)
    return out, lse, lists


def topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, packed, scale):
    """Operator ``hivilt::topk_select``: indices."""
    masks = Masks(attn_mask, key_mask, query_mask)
    call = Call(plan.problem(query, key, packed), query, key, key, masks, None, scale, 0.0)
    lists = _blank_lists(query, key, topk, axis, select_query is not None, packed)
    _select(_selection(call, topk, axis, select_query, select_key, lists))
    return lists


def selected_attention(query, key, value, indices, axis, attn_mask, packed, seed, scale, dropout_p):
    """Operator ``hivilt::selected_attention``: (out, lse)."""
    p = plan.problem(query, key, packed)
    call = Call(p, query, key, value, Masks(attn_mask), seed, scale, dropout_p)
    out, lse = _blank_results(query, value, packed)
    indices = indices.contiguous()
    if axis == 0 and p.keys >= plan.GATHER_FROM * indices.shape[3]:
        _gather(call, indices, None, out, lse)
    else:
        _dense(call, bits_of(p, indices, axis + 1), axis + 1, out, lse, listed_only=True)
    return out, lse


# Results.


def _blank_results(query: Tensor, value: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor]:
    out = plan.token_major(query, value.shape[3], packed)
    if packed is None:
        return out, query.new_empty(query.shape[:3], dtype=torch.float32)
    return out, query.new_full(query.shape[:3], -INF, dtype=torch.float32)


def _blank_lists(query: Tensor, key: Tensor, topk: int, axis: int, shared: bool, packed: Packed | None) -> Tensor:
    shape = (query.shape[0], 1 if shared else query.shape[1], (query, key)[axis].shape[2], topk)
    if packed is None:
        return query.new_empty(shape, dtype=torch.int32)
    return query.new_full(shape, -1, dtype=torch.int32)


# Selection.


class Selection(NamedTuple):
    """Rows that each select from all columns: queries from keys, with axis="queries" keys from queries."""

    problem: Problem  # its queries are the rows
    row: tuple
    col: tuple
    mask: tuple | None
    row_mask: Tensor | None
    col_mask: Tensor | None
    topk: int
    scale: float
    lists: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor of the source's dtype, head width and device."""
        return self.row[0]

    @property
    def masks(self) -> tuple:
        return self.mask, self.row_mask, self.col_mask

    def mask_arguments(self) -> tuple:
        return self.mask, launch.token_mask(self.row_mask), launch.token_mask(self.col_mask)


def _selection(
    call: Call, topk: int, axis: int, select_query: Tensor | None, select_key: Tensor | None, lists: Tensor
) -> Selection:
    p, scale, (attn_mask, key_mask, query_mask) = call.problem, call.scale, call.masks
    if select_query is None:
        row, col = launch.side(call.query, p.heads, p.starts_q), launch.side(call.key, p.heads, p.starts_k)
    else:
        if select_query.dtype != select_key.dtype:
            select_query, select_key = select_query.float(), select_key.float()
        row, col = launch.shared_side(select_query, p.starts_q), launch.shared_side(select_key, p.starts_k)
        p, scale = p._replace(heads=1), 1.0
        if attn_mask is not None and attn_mask.dtype != torch.bool:  # a bias takes part as a mask alone
            attn_mask = attn_mask != -INF
    if axis == 0:
        return Selection(p, row, col, launch.mask(attn_mask), query_mask, key_mask, topk, scale, lists)
    return Selection(p.reversed(), col, row, launch.mask(attn_mask, True), key_mask, query_mask, topk, scale, lists)


def _select(s: Selection, marks: Tensor | None = None, want_bits: bool = False) -> tuple | None:
    """Fills the lists; marks (like lse), where given, with NaN for rows that a NaN or +inf score ruins, else with 0.

    Returns the same selection as a bitmask where that is wanted and costs nothing, else None.
    """
    if not plan.in_one_tile(s.like, s.problem.keys, s.masks):
        _stream_select(s, marks)
        return None
    bits = _blank_bits(s.lists, s.problem.keys) if want_bits else None
    _one_tile(s, bits, None)
    return bits


def _one_tile(s: Selection, bits: tuple | None, attend: tuple[Call, Tensor, Tensor] | None) -> None:
    """attend: None, or (call, out, lse): attention with what was selected, in the same kernel."""
    p, width = s.problem, s.like.shape[-1]
    value_width = 0 if attend is None else attend[0].value_width
    block_c = power(p.keys, 32)
    config = plan.tiles(s.like, f"one_tile_{max(128, block_c)}", (width, value_width), s.masks)
    blocks = cdiv(p.queries, config.rows)
    tasks = p.batches * p.heads * blocks
    if tasks == 0:
        return
    value = out = lse = None
    dropout: tuple = (None, None)
    if attend is not None:
        call, out, lse = attend
        value, dropout = launch.side(call.value, p.heads, p.starts_k), call.dropout()
        out, lse = launch.strided(out), launch.strided(lse)
    launch.launch(
        _topk_attention_kernel, tasks,
        (s.row, s.col, value, out, lse, launch.strided(s.lists), bits, *s.mask_arguments(), *dropout, s.topk, s.scale,
         p.heads, blocks),
        config.warps, config.stages,
        WIDTH=width, VALUE_WIDTH=value_width, BLOCK_R=config.rows, BLOCK_C=block_c,
        BLOCK_D=plan.link(width, s.like.dtype), BLOCK_E=min(64, power(value_width)), BLOCK_K=power(s.topk),
        GUESS=block_c >= 128, ATTEND=attend is not None,
    )  # fmt: skip


def _stream_select(s: Selection, marks: Tensor | None) -> None:
    p, like, lists, width, topk = s.problem, s.like, s.lists, s.like.shape[-1], s.topk
    part, multiprocessors = launch.part_of(like)
    config = plan.tiles(like, "stream_select", (width,), s.masks)
    # A buffer of candidates takes registers when it is searched: a larger one leaves them to smaller tiles.
    block_c = config.cols if topk <= 256 else 32
    capacity = power(topk + 3 * block_c)
    block_r = 8 if capacity >= 1024 else max(16, min(config.rows, config.rows * 256 // capacity))
    blocks = cdiv(p.queries, block_r)
    slots = multiprocessors * configs.limits(part).programs
    tasks = p.batches * p.heads * blocks
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
    sample, sampled = _sample(s, splits, capacity)
    at_marks = None if part_marks is None else (*launch.strided(part_marks)[:3], splits)
    launch.launch(
        _stream_select_kernel, programs,
        (s.row, s.col, launch.strided(out_lists), bests, at_marks,
         like.new_empty(programs * block_r * capacity, dtype=torch.float32),
         like.new_empty(programs * block_r * capacity, dtype=torch.int32),
         *s.mask_arguments(), topk, sampled, s.scale, p.heads, blocks, splits, tasks * splits),
        config.warps, config.stages,
        WIDTH=width, BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_D=plan.link(width, like.dtype), CAPACITY=capacity,
        SAMPLE=sample,
    )  # fmt: skip
    if splits > 1:
        rows = lists.shape[0] * lists.shape[1] * lists.shape[2]
        config = plan.tiles(like, "merge_lists", (64,))
        launch.launch(
            _merge_lists_kernel, cdiv(rows, config.rows),
            (bests, out_lists, lists, part_marks, marks, topk, splits, rows),
            config.warps, config.stages,
            BLOCK_R=config.rows, BLOCK_C=power(splits * topk), BLOCK_K=power(topk), BLOCK_S=power(splits),
        )  # fmt: skip


def _sample(s: Selection, splits: int, capacity: int) -> tuple[int, int]:
    """(columns of the sample, which of its best values is the first bar); (0, n) where a row starts without a bar."""
    width, topk = s.like.shape[-1], s.topk
    sample = plan.SAMPLE_SINGLE if s.like.dtype == torch.float32 or width > 64 else plan.SAMPLE
    # A bar that the e-th best of the sample clears on average would leave half of the rows short; 4 deviations more
    # leave almost none.
    expected = topk * sample * splits / s.problem.keys
    sampled = int(expected + 4 * expected**0.5) + 1
    short = s.problem.keys < 2 * sample * splits
    # Scores of wide sources, which all heads share, and large buffers leave no registers for a sample.
    if sampled > sample // 4 or short or capacity >= 512 or width > 256:
        sample = 0
    return sample, sampled


# Attention over lists.


def _gather(call: Call, lists: Tensor, marks: Tensor | None, out: Tensor, lse: Tensor) -> None:
    config = call.tiles("gather_forward")
    tasks, blocks = call.query_tasks(config.rows)
    if tasks == 0:
        return
    launch.launch(
        _gather_forward_kernel, tasks,
        (*call.sides(), plan.list_strides(lists), launch.strided(out), launch.strided(lse), marks,
         launch.mask(call.masks.attn_mask), *call.dropout(), lists.shape[3], call.scale, call.problem.heads, blocks),
        config.warps, config.stages,
        WIDTH=call.width, VALUE_WIDTH=call.value_width, BLOCK_R=config.rows, BLOCK_L=config.cols,
        BLOCK_D=power(call.width), BLOCK_E=power(call.value_width),
    )  # fmt: skip


# Attention over all pairs, or over those of a bitmask.


def _blank_bits(lists: Tensor, columns: int) -> tuple:
    """(pointer, strides of batch, head, row) of a bitmask for lists of ``columns``; one head's bits serve all."""
    bits = lists.new_empty((*lists.shape[:3], max(1, cdiv(columns, 32))))
    return (bits, bits.stride(0), bits.stride(1) if bits.shape[1] > 1 else 0, bits.stride(2))


def bits_of(p: Problem, lists: Tensor, orientation: int) -> tuple:
    """The bitmask of lists. orientation 1: rows are queries, 2: rows are keys."""
    bits = _blank_bits(lists, p.keys if orientation == 1 else p.queries)
    words = bits[0].shape[3]
    part, _ = launch.part_of(lists)
    config = configs.lookup(part, "pack_lists", "bfloat16", 64)
    rows = bits[0].numel() // words
    block_w = min(config.cols, power(words, 1))
    word_blocks = cdiv(words, block_w)
    tasks = cdiv(rows, config.rows) * word_blocks
    if tasks:
        launch.launch(
            _pack_lists_kernel, tasks, (lists, bits[0], rows, lists.shape[3], words, word_blocks),
            config.warps, config.stages, BLOCK_R=config.rows, BLOCK_W=block_w, BLOCK_L=8,
        )  # fmt: skip
    return bits


def _dense(
    call: Call, bits: tuple | None, orientation: int, out: Tensor, lse: Tensor, listed_only: bool = False
) -> None:
    config = call.tiles("dense_forward")
    tasks, blocks = call.query_tasks(config.rows)
    if tasks == 0:
        return
    launch.launch(
        _attention_forward_kernel, tasks,
        (*call.sides(), launch.strided(out), launch.strided(lse), bits, *call.masks.arguments(), *call.dropout(),
         call.scale, call.problem.heads, blocks),
        config.warps, config.stages,
        WIDTH=call.width, VALUE_WIDTH=call.value_width, BLOCK_R=config.rows, BLOCK_C=config.cols,
        BLOCK_D=plan.link(call.width, call.query.dtype), BLOCK_E=power(call.value_width), BITS=orientation,
        LISTED_ONLY=listed_only,
    )  # fmt: skip
