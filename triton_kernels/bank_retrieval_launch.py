"""Which kernels run a retrieval from a bank: tensors in, tensors out.

forward    two passes: the best two scores of every group of rows, then the exact scores of what may be among the topk
           best.  Few queries read the bank once, as a stream; a large topk, or a bank that is small for it, has every
           row scored exactly.  Scores reach memory only of queries that are searched through all rows.
backward   from the kept rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import bank_retrieval as kernels
from . import bank_retrieval_backward as backward_kernels
from . import configs
from . import launch as launching
from .fusion_tiles import lookup, power

ROWS = 128  # kernels.ROWS
MAXIMA_BYTES = 32 << 20  # of the two best scores of every group, for as many queries at a time
LOW_BYTES = 64 << 20  # of bank rows rounded to bfloat16
SCRATCH_BYTES = 32 << 20  # of scores, for queries that are searched through all rows; one row of scores at least
FEW = 8  # queries up to which the bank is a stream
HELD = 256, 64  # channels up to which a program keeps its queries, with much and with little shared memory
MUCH = 160_000  # bytes
MOST = 1024  # topk from which on every row is scored exactly
LEAST_RATIO = 32  # bank rows for each of topk, below which the same happens
# (bank rows for each of topk, tiles, lanes): larger groups leave less to read in the second pass, but more of them have
# two rows among the best.
GROUPS = (200, 1, 32), (4000, 1, 8), (float("inf"), 4, 8)
EXACT = 32, 64, 4  # rows, elements and warps of the tile of an exact score: the same everywhere, like its bits


class Plan(NamedTuple):
    """rows of a group: tiles * ROWS / lanes.  low: the dtype of the first pass, None for float32."""

    few: bool
    low: torch.dtype | None
    tiles: int
    lanes: int

    def groups(self, bank_size: int) -> int:
        return _cdiv(bank_size, self.tiles * ROWS) * self.lanes


def plan_of(query: Tensor, keys: Tensor, topk: int, precision: str) -> Plan | None:
    """None: every row is scored exactly."""
    M, C = keys.shape
    if topk > MOST or M < LEAST_RATIO * topk or not C:
        return None
    tiles, lanes = next((tiles, lanes) for most, tiles, lanes in GROUPS if M < most * topk)
    few = query.shape[0] <= FEW
    alike = query.dtype == keys.dtype and query.dtype != torch.float32  # products are exact as they are
    low = None if few else query.dtype if alike else None if precision == "fp32" else torch.bfloat16
    return Plan(few, low, tiles, lanes)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _strided(x: Tensor) -> tuple:
    return (x, x.stride(0))


def _rules(batch: int, bank_size: int, count, mask, exclude) -> tuple:
    if mask is None:
        return batch, bank_size, count, None, 0, 0, exclude
    steps = (0, mask.stride(0)) if mask.dim() == 1 else mask.stride()
    return batch, bank_size, count, mask.view(torch.uint8), *steps, exclude


def bank_retrieval(query, keys, values, topk, scale, factor, count, mask, exclude, shadow, precision, save):
    """Operator ``hivilt::bank_retrieval`` without its backend argument."""
    B, C = query.shape
    M, own = keys.shape[0], values is not None
    E = values.shape[1] if own else C
    retrieved = query.new_empty(B, E)
    scores = query.new_empty(B, topk, dtype=torch.float32)
    indices = query.new_empty(B, topk, dtype=torch.int64)
    key_rows = keys.new_empty((B, topk, C) if save else (0,))
    value_rows = values.new_empty(B, topk, E) if save and own else keys.new_empty(0)
    results = retrieved, scores, indices, key_rows, value_rows
    if not M:
        for x, blank in zip(results, (0, -float("inf"), -1, 0, 0), strict=True):
            x.fill_(blank)
        return results
    if not B:
        return results
    query, keys = launching.rows(query), launching.rows(keys)
    exclude = None if exclude is None else exclude.contiguous()
    plan = plan_of(query, keys, topk, precision)
    if plan is None:
        step, search = B, None
    else:
        search = _Search(query, keys, topk, plan, precision)
        step = max(1, min(B, MAXIMA_BYTES // (8 * search.groups)))
        step = step if step == B or step < search.tile.rows else step // search.tile.rows * search.tile.rows
    for first in range(0, B, step):
        some = slice(first, first + step)
        rules = _rules(
            min(step, B - first), M, count, mask[some] if mask is not None and mask.dim() == 2 else mask,
            None if exclude is None else exclude[some],
        )  # fmt: skip
        _list(query[some], keys, topk, rules, search, scores[some], indices[some])
    copies = (value_rows if own else key_rows) if save else None
    _weigh(launching.rows(values) if own else keys, scores, indices, (factor, scale), retrieved, copies)
    if save and own:
        torch.index_select(keys, 0, indices.clamp(min=0).flatten(), out=key_rows.view(B * topk, C))
    return results


class _Search:
    """The first pass over a bank for any queries: its tiles, and what is known of the bank's rows once measured."""

    def __init__(self, query: Tensor, keys: Tensor, topk: int, plan: Plan, precision: str):
        self.plan, self.keys, self.exact = plan, keys, precision != "bf16" or plan.low is None
        M, C = keys.shape
        part, self.multiprocessors = launching.part_of(query)
        self.warps = 4 if part.startswith("gfx") else 8  # of 64 threads or of 32: more spill
        self.held = HELD[configs.limits(part).shared_bytes < MUCH]
        kernel, dtype = ("bank_stream", torch.float32) if plan.few else ("bank_maxima", plan.low or torch.float32)
        self.tile = lookup(query, kernel, C, dtype)
        self.tile = self.tile._replace(rows=min(self.tile.rows, 1 << (query.shape[0] - 1).bit_length()))
        if not plan.few:
            self.tile = self.tile._replace(rows=max(16, self.tile.rows))
        self.groups, self.all_tiles = plan.groups(M), _cdiv(M, ROWS)
        self.copies = plan.low is not None and keys.dtype != plan.low
        # Rows begin at 16 bytes.
        stride = _cdiv(C, 8) * 8
        held = LOW_BYTES // (2 * stride * plan.tiles * ROWS) * plan.tiles
        self.step = max(plan.tiles, min(self.all_tiles, held)) if self.copies else self.all_tiles
        self.low = keys.new_empty(min(M, self.step * ROWS), stride, dtype=plan.low) if self.copies else keys
        self.norms = keys.new_empty(self.all_tiles, dtype=torch.float32)
        self.residues = torch.empty_like(self.norms) if self.copies else None
        self.capacity = power(4 * topk + 64)
        self.measured = False  # and, where there is a copy, copied in one piece

    def maxima(self, query: Tensor, rules: tuple) -> Tensor:
        B, C = query.shape
        plan, tile = self.plan, self.tile
        found = query.new_empty(B, 2, self.groups, dtype=torch.float32)
        blocks = _cdiv(B, tile.rows)
        for first in range(0, self.all_tiles, self.step):
            last = min(first + self.step, self.all_tiles)
            if not plan.few and not self.measured:
                launching.launch(
                    kernels._measure_bank_kernel, last - first,
                    (_strided(self.keys), _strided(self.low) if self.copies else None, self.norms, self.residues, first,
                     self.keys.shape[0]),
                    4, 1, WIDTH=C, BLOCK_D=min(64, power(C)),
                )  # fmt: skip
                self.measured = self.step == self.all_tiles
            # As many programs as keep the device busy, each with whole groups.
            pieces = _cdiv(last - first, plan.tiles)
            per_program = max(1, pieces * blocks // (8 * self.multiprocessors)) * plan.tiles
            launching.launch(
                kernels._group_maxima_kernel, _cdiv(last - first, per_program) * blocks,
                (_strided(query), _strided(self.low), rules, self.norms if plan.few else None, found,
                 self.groups, first, last, per_program, blocks),
                tile.warps, tile.stages, WIDTH=C, BLOCK_R=tile.rows, BLOCK_D=min(tile.inner, power(C)),
                TILES=plan.tiles, LANES=plan.lanes, FEW=plan.few, HELD=plan.low is not None and C <= self.held,
            )  # fmt: skip
        return found


def _list(query: Tensor, keys: Tensor, topk: int, rules: tuple, search: _Search | None, scores: Tensor,
          indices: Tensor) -> None:  # fmt: skip
    """Fills scores and indices of these queries."""
    B, C = query.shape
    M = keys.shape[0]
    capacity = min(topk, M) if search is None else search.capacity
    found = query.new_empty(B, capacity, dtype=torch.int32)
    ranks = query.new_empty(B, capacity, dtype=torch.float32)
    counts, lost = query.new_empty(B, dtype=torch.int32), query.new_zeros(B, dtype=torch.int32)
    rows, inner, warps = EXACT
    if search is not None:
        plan = search.plan
        low = None if plan.low in (None, query.dtype) else query.to(plan.low)
        wide = query.float() if plan.low is None else query if low is None else low
        launching.launch(
            kernels._candidates_kernel, B,
            (_strided(query), None if low is None else _strided(low), rules, (search.norms, search.residues),
             search.maxima(wide, rules), found, counts, search.groups, topk),
            search.warps, 1, WIDTH=C, BLOCK_D=min(256, power(C)), TILES=plan.tiles, LANES=plan.lanes,
            EXACT=search.exact, BUCKETS=min(4096, power(max(32, 8 * topk))), CAPACITY=capacity,
        )  # fmt: skip
        blocks = _cdiv(capacity, rows)
        launching.launch(
            kernels._candidate_scores_kernel, B * blocks,
            (_strided(query), _strided(keys), rules, found, ranks, counts, blocks, capacity),
            warps, 1, WIDTH=C, BLOCK_L=rows, BLOCK_D=inner,
        )  # fmt: skip
    programs = max(1, min(B, SCRATCH_BYTES // (4 * M), 2 * launching.part_of(query)[1]))
    launching.launch(
        kernels._search_all_kernel, programs,
        (_strided(query), _strided(keys), rules, found, ranks, counts, lost,
         query.new_empty(programs, M, dtype=torch.float32), topk, capacity),
        warps, 1, ALL=search is None, WIDTH=C, BLOCK_L=rows, BLOCK_D=inner, BLOCK_M=min(1024, power(M)),
    )  # fmt: skip
    blocks = _cdiv(max(capacity, topk), 64)
    launching.launch(
        kernels._order_kernel, B * blocks, (found, ranks, counts, lost, scores, indices, topk, blocks, capacity), 4, 1,
        BLOCK_I=64, BLOCK_J=64,
    )  # fmt: skip


def _weigh(values: Tensor, scores: Tensor, indices: Tensor, scale: tuple, out: Tensor, copies: Tensor | None) -> None:
    B, E = out.shape
    if not E:
        return
    cols = min(128, power(E))
    blocks = _cdiv(E, cols)
    launching.launch(
        kernels._weigh_rows_kernel, B * blocks,
        (_strided(values), scores, indices, scale, out, copies, scores.shape[1], blocks), 4, 1,
        WIDTH=E, BLOCK_L=16, BLOCK_E=cols,
    )  # fmt: skip


def bank_retrieval_backward(query, grad_retrieved, grad_scores, key_rows, value_rows, scores, indices, scale, factor,
                            bank_size, rows_grad):  # fmt: skip
    """Operator ``hivilt::bank_retrieval_backward`` without its backend argument."""
    B, C = query.shape
    topk, own = indices.shape[1], value_rows is not None
    rows = (value_rows if own else key_rows).contiguous()
    key_rows = key_rows.contiguous()
    E = rows.shape[2]
    grad_query = query.new_empty(B, C)
    grad_keys = key_rows.new_empty((bank_size, C) if rows_grad else (0,))
    grad_values = value_rows.new_empty(bank_size, E) if rows_grad and own else key_rows.new_empty(0)
    blank = scores.new_empty(0)
    if not B:
        return grad_query, grad_keys.zero_(), grad_values.zero_(), blank if scale is None else scores.new_zeros(())
    query = launching.rows(query)
    scores, indices = scores.contiguous(), indices.contiguous()
    shares, of_scores = torch.empty_like(scores), torch.empty_like(scores)
    of_scale = scores.new_empty(B)
    upstream = None if grad_retrieved is None else (grad_retrieved, *grad_retrieved.stride())
    to_scores = None if grad_scores is None else (grad_scores, *grad_scores.stride())
    launching.launch(
        backward_kernels._bank_score_gradient_kernel, B,
        (upstream, to_scores, rows, scores, indices, (factor, scale), shares, of_scores, of_scale, topk),
        4, 1, WIDTH=E, BLOCK_L=16, BLOCK_E=min(64, power(E)),
    )  # fmt: skip
    cols = min(128, power(C))
    blocks = _cdiv(C, cols)
    if C:
        launching.launch(
            backward_kernels._bank_query_gradient_kernel, B * blocks,
            (key_rows, indices, of_scores, grad_query, topk, blocks), 4, 1, WIDTH=C, BLOCK_L=32, BLOCK_E=cols,
        )  # fmt: skip
    if rows_grad and bank_size:
        kept, entries = indices.flatten().sort(stable=True)
        starts = torch.searchsorted(kept, torch.arange(bank_size + 1, device=kept.device))
        of_query, of_row = (query, *query.stride()), None if upstream is None else upstream
        if own:
            _spread((of_query, of_scores), (None, None), entries, starts, topk, grad_keys)
            _spread((of_row, shares), (None, None), entries, starts, topk, grad_values)
        else:
            _spread((of_query, of_scores), (of_row, shares), entries, starts, topk, grad_keys)
    if scale is None:
        return grad_query, grad_keys, grad_values, blank
    return grad_query, grad_keys, grad_values, (of_scale.sum() * factor).to(scores.dtype)


def _spread(first: tuple, second: tuple, entries: Tensor, starts: Tensor, topk: int, grad: Tensor) -> None:
    M, width = grad.shape
    if not width:
        return
    cols = min(128, power(width))
    blocks = _cdiv(width, cols)
    launching.launch(
        backward_kernels._bank_rows_gradient_kernel, M * blocks, (*first, *second, entries, starts, grad, topk, blocks),
        4, 1, WIDTH=width, BLOCK_L=8, BLOCK_E=cols,
    )  # fmt: skip
