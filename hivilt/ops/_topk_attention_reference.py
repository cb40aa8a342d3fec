"""The reference behind the operators of family A: hivilt.reference walked in slices of the pairs, so that no Q x N
tensor of a large call ever exists, and the backward written out (dS = P (dP - delta), docs/topk_attention.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.topk_attention import (
    attend,
    contract,
    dropout_keep,
    lost_rows,
    pair_scores,
    pairs,
    shared_ratings,
    valid_pairs,
)
from . import _checks

PAIRS = 1 << 21  # pairs of one slice; about eight temporaries of this many elements live at a time
ALL = slice(None)


class Inputs(NamedTuple):
    """What a call reads, without its selection."""

    query: Tensor
    key: Tensor
    value: Tensor | None = None
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    select_query: Tensor | None = None
    select_key: Tensor | None = None

    def cut(self, b: slice, h: slice, g: slice, i: slice = ALL, j: slice = ALL) -> Inputs:
        """The part of batches b, heads h with their key heads g, queries i and keys j."""
        mask = self.attn_mask
        return Inputs(
            self.query[b, h, i],
            self.key[b, g, j],
            None if self.value is None else self.value[b, g, j],
            None if mask is None else _cut_broadcast(mask, b, h, i, j),
            None if self.key_mask is None else self.key_mask[b, j],
            None if self.query_mask is None else self.query_mask[b, i],
            None if self.select_query is None else self.select_query[b, i],
            None if self.select_key is None else self.select_key[b, j],
        )


def _cut_broadcast(mask: Tensor, *part: slice) -> Tensor:
    """A part of [B, H, Q, N] of a mask in which any of these may be 1."""
    return mask[tuple(s if n > 1 else ALL for s, n in zip(part, mask.shape, strict=True))]


def topk_attention(query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key,
                   cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p):  # fmt: skip
    """Operator ``hivilt::topk_attention`` without its backend argument."""
    x = Inputs(query, key, value, attn_mask, key_mask, query_mask, select_query, select_key)
    out, lse = _blank_results(query, value)
    indices = _blank_lists(x, topk, axis)
    for b, part, i, j in _segments(x, cu_seqlens_q, cu_seqlens_k):
        lists = None
        if topk >= 0:
            lists = indices[:, :, (i, j)[axis]]
            _select(part, topk, axis, scale, lists)
        _attend(part, lists, axis, scale, dropout_p, seed, out[:, :, i], lse[:, :, i], b)
    return out, lse, indices


def topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, cu_seqlens_q,
                cu_seqlens_k, scale):  # fmt: skip
    """Operator ``hivilt::topk_select`` without its backend argument."""
    x = Inputs(query, key, None, attn_mask, key_mask, query_mask, select_query, select_key)
    indices = _blank_lists(x, topk, axis)
    for _, part, i, j in _segments(x, cu_seqlens_q, cu_seqlens_k):
        _select(part, topk, axis, scale, indices[:, :, (i, j)[axis]])
    return indices


def selected_attention(query, key, value, indices, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p):
    """Operator ``hivilt::selected_attention`` without its backend argument."""
    x = Inputs(query, key, value, attn_mask)
    out, lse = _blank_results(query, value)
    for b, part, i, j in _segments(x, cu_seqlens_q, cu_seqlens_k):
        lists = indices[:, :, (i, j)[axis]]
        check_lists(lists, (part.key if axis == 0 else part.query).shape[2])
        _attend(part, lists, axis, scale, dropout_p, seed, out[:, :, i], lse[:, :, i], b, listed_only=True)
    return out, lse


def topk_attention_backward(grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask,
                            query_mask, cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p, key_grad,
                            bias_grad):  # fmt: skip
    """Operator ``hivilt::topk_attention_backward`` without its backend argument."""
    sparse = indices.dim() > 1
    if sparse:  # the lists already honour every mask; a float bias still enters the scores
        key_mask = query_mask = None
        attn_mask = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
    x = Inputs(query, key, value, attn_mask, key_mask, query_mask)
    grad_query = _token_major(query, query.shape[3])
    grad_key, grad_value = (t.new_zeros(t.shape, dtype=torch.float64) for t in (key, value))
    grad_mask = attn_mask.new_zeros(attn_mask.shape, dtype=torch.float64) if bias_grad else None
    for b, part, i, j in _segments(x, cu_seqlens_q, cu_seqlens_k):
        grads = [grad_query[:, :, i], grad_key[:, :, j], grad_value[:, :, j], grad_mask]
        lists = indices[:, :, (i, j)[axis]] if sparse else None
        upstream = grad_out[:, :, i], None if grad_lse is None else grad_lse[:, :, i], lse[:, :, i]
        _attend_backward(part, lists, axis, scale, dropout_p, seed, upstream, grads, b)
    results = [grad_query]
    for wide, like in ((grad_key, key), (grad_value, value)):
        results.append(_token_major(like, like.shape[3]).copy_(wide) if key_grad else like.new_empty(0))
    results.append(grad_mask.to(attn_mask.dtype) if bias_grad else query.new_empty(0))
    return tuple(results)


# Results, segments, slices.


def _token_major(like: Tensor, width: int) -> Tensor:
    """Zeros [B, H, T, width] whose memory is [B, T, H, width]."""
    B, H, T, _ = like.shape
    return like.new_zeros(B, T, H, width).transpose(1, 2)


def _blank_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _token_major(query, value.shape[3]), query.new_full(query.shape[:3], float("-inf"), dtype=dtype)


def _blank_lists(x: Inputs, topk: int, axis: int) -> Tensor:
    if topk < 0:
        return x.query.new_empty(0, dtype=torch.int32)
    heads = x.query.shape[1] if x.select_query is None else 1
    rows = (x.query if axis == 0 else x.key).shape[2]
    return x.query.new_full((x.query.shape[0], heads, rows, topk), -1, dtype=torch.int32)


def _segments(x: Inputs, cu_seqlens_q, cu_seqlens_k) -> Iterator[tuple[int, Inputs, slice, slice]]:
    """(first batch, inputs, queries, keys): one for a batched call, one per packed segment."""
    if cu_seqlens_q is None:
        yield 0, x, ALL, ALL
        return
    starts_q = _checks.check_offsets("hivilt", "cu_seqlens_q", cu_seqlens_q, x.query.shape[2])
    starts_k = _checks.check_offsets("hivilt", "cu_seqlens_k", cu_seqlens_k, x.key.shape[2])
    for b in range(len(starts_q) - 1):
        i, j = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        part = x._replace(select_query=None, select_key=None).cut(ALL, ALL, ALL, i, j)
        if x.select_query is not None:
            part = part._replace(select_query=x.select_query[None, i], select_key=x.select_key[None, j])
        yield b, part, i, j


def _slices(x: Inputs, by_key: bool = False) -> Iterator[tuple[slice, slice, slice, slice]]:
    """(b, h, g, t): batches, query heads with their key heads, and queries (by_key: keys) of about PAIRS pairs."""
    B, H, Q, _ = x.query.shape
    G, N = x.key.shape[1:3]
    tokens, across = (N, Q) if by_key else (Q, N)
    if B * H * Q * N == 0:
        return
    repeats = H // G
    batches = max(1, PAIRS // (H * Q * N))
    groups = G if H * Q * N <= PAIRS else max(1, PAIRS // (repeats * Q * N))
    step = tokens if repeats * Q * N <= PAIRS else max(1, PAIRS // (repeats * across))
    for b in range(0, B, batches):
        for g in range(0, G, groups):
            some = slice(g, min(G, g + groups))
            heads = slice(some.start * repeats, some.stop * repeats)
            for t in range(0, tokens, step):
                yield slice(b, min(B, b + batches)), heads, some, slice(t, min(tokens, t + step))


def _lists_of(lists: Tensor, axis: int, b: slice, h: slice, i: slice, shape: torch.Size) -> Tensor:
    """The pairs [b, h, i, N] that lists name, as a bool tensor of ``shape``."""
    mine = lists[b, h if lists.shape[1] > 1 else ALL]
    if axis == 0:
        return pairs(mine[:, :, i], shape)
    inside = (mine >= i.start) & (mine < i.stop)
    return pairs(torch.where(inside, mine - i.start, -1), shape, "queries").contiguous()


# The work of one segment.


def best(scores: Tensor, valid: Tensor, topk: int, axis: int) -> Tensor:
    """The lists of hivilt.reference without sorting: all above the topk-th score, then ties with it, then NaN."""
    if axis == 1:
        scores, valid = scores.mT.contiguous(), valid.mT.contiguous()
    *rows, width = scores.shape
    unsorted = valid & scores.isnan()
    number = valid & ~unsorted
    ranked = torch.where(number, scores, float("-inf"))
    bar = ranked.topk(min(topk, width), sorted=True).values[..., -1:]
    kept, at_bar = ranked > bar, number & (ranked == bar)
    for candidates in (at_bar, unsorted):
        room = topk - kept.sum(-1, keepdim=True)
        if (candidates.sum(-1, keepdim=True) > room).any():
            candidates = candidates & (candidates.cumsum(-1) <= room)  # the lower index first
        kept = kept | candidates
    slot = torch.where(kept, kept.cumsum(-1, dtype=torch.int32) - 1, topk).long()
    lists = scores.new_full((*rows, topk + 1), -1, dtype=torch.int32)
    index = torch.arange(width, dtype=torch.int32, device=scores.device).expand_as(slot)
    return lists.scatter_(-1, slot, index)[..., :topk]


def _select(x: Inputs, topk: int, axis: int, scale: float, lists: Tensor) -> None:
    for b, h, g, t in _slices(x, by_key=axis == 1):
        part = x.cut(b, h, g, t) if axis == 0 else x.cut(b, h, g, ALL, t)
        masks = part.attn_mask, part.key_mask, part.query_mask
        if x.select_query is None:
            scores = pair_scores(part.query, part.key, scale, part.attn_mask)
            lists[b, h, t] = best(scores, valid_pairs(scores, *masks), topk, axis)
        elif h.start == 0:  # once for all heads
            lists[b, :, t] = best(*shared_ratings(part.select_query, part.select_key, *masks), topk, axis)


def _attend(x, lists, axis, scale, dropout_p, seed, out, lse, batch, listed_only=False) -> None:
    """``lists`` None: dense. A NaN or +inf score loses its row; ``listed_only``: only where it is listed."""
    for b, h, g, i in _slices(x):
        part = x.cut(b, h, g, i)
        scores = pair_scores(part.query, part.key, scale, part.attn_mask)
        valid = kept = valid_pairs(scores, part.attn_mask, part.key_mask, part.query_mask)
        if lists is not None:
            kept = valid & _lists_of(lists, axis, b, h, i, scores.shape)
        lost = lost_rows(scores, kept if listed_only else valid)
        first = (batch + b.start, h.start, i.start)
        out[b, h, i], lse[b, h, i] = attend(scores, part.value, kept, lost, dropout_p, seed, first)


def _attend_backward(x, lists, axis, scale, dropout_p, seed, upstream, grads, batch) -> None:
    """Adds to grad_key, grad_value and grad_mask, writes grad_query. P is rebuilt from the saved lse."""
    grad_out, grad_lse, lse = upstream
    grad_query, grad_key, grad_value, grad_mask = grads
    repeats = x.query.shape[1] // max(1, x.key.shape[1])
    for b, h, g, i in _slices(x):
        part = x.cut(b, h, g, i)
        scores = pair_scores(part.query, part.key, scale, part.attn_mask)
        kept = valid_pairs(scores, part.attn_mask, part.key_mask, part.query_mask)
        if lists is not None:
            kept = kept & _lists_of(lists, axis, b, h, i, scores.shape)
        query, key, value = (t.double() for t in (part.query, part.key, part.value))
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        some, mine = kept.any(-1, keepdim=True), lse[b, h, i, None].double()
        # A lost row has lse NaN, so its P and all that it hands back is NaN; a row that keeps nothing hands back 0.
        p = (torch.where(kept, scores.double(), float("-inf")) - torch.where(some, mine, 0.0)).exp()
        g_out = torch.where(some, grad_out[b, h, i].double(), 0.0)
        dropped, dp = p, g_out @ value.mT
        if dropout_p > 0.0:
            keep = dropout_keep(seed, dropout_p, p.shape, p.device, (batch + b.start, h.start, i.start))
            factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
            dropped, dp = torch.where(keep, p * factor, 0.0), torch.where(keep, dp * factor, 0.0)
        tame = p.isfinite().all() and dp.isfinite().all()  # then a pair that is not kept has p = 0 and adds 0
        if not tame:
            p, dp, dropped = (torch.where(kept, t, 0.0) for t in (p, dp, dropped))
        ds = dp - (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            ds = ds + torch.where(some, grad_lse[b, h, i, None], 0.0)
        ds = p * ds if tame else torch.where(kept, p * ds, 0.0)
        grad_query[b, h, i] = (scale * contract(ds, kept, key)).to(grad_query.dtype)
        of_group = (g.stop - g.start, repeats)
        grad_key[b, g] += scale * contract(ds.mT, kept.mT, query).unflatten(1, of_group).sum(2)
        grad_value[b, g] += contract(dropped.mT, kept.mT, g_out).unflatten(1, of_group).sum(2)
        if grad_mask is not None:
            mine = _cut_broadcast(grad_mask, b, h, i, ALL)
            mine += ds.sum_to_size(mine.shape)


def check_lists(lists: Tensor, width: int) -> None:
    if not lists.numel():
        return
    low, high = (int(v) for v in lists.aminmax())
    if low < -1 or high >= width:
        _checks.refuse(ValueError, "hivilt", "indices", f"values from -1 to {width - 1}", low if low < -1 else high)
    ordered = lists.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        _checks.refuse(ValueError, "hivilt", "indices", "no value twice in a row", _checks.Said("a repeated value"))
