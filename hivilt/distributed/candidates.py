"""The arithmetic of a sharded retrieval on one rank: which rows may win, which do, and what they add up to.

Rows are ordered as in one bank: score descending, NaN below every number, then global slot ascending.  Slot g lives on
rank g mod W at local row g div W, so local order is global order.  Sums run in float64; winners are kept as a flat
list, query by query, never as a B x topk x C tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import bank_retrieval

INF, NAN = float("inf"), float("nan")
CHUNK = 1 << 22  # elements of a temporary


def shard_rows(slots: int, rank: int, size: int) -> int:
    """How many of the global slots 0 .. slots - 1 live on a rank."""
    return max(0, (slots - rank + size - 1) // size)


def order_key(scores: Tensor) -> Tensor:
    """What scores are compared by: NaN as -inf, which no valid row has as its score; -0 as 0."""
    return torch.where(scores.isnan(), -INF, scores) + 0.0


def local_best(
    query: Tensor, shard: Tensor, topk: int, count: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best valid rows of one shard, best first.

    Returns:
        scores [B, k], k = min(topk, rows), NaN only where that very row's is; rows int64 [B, k], -1 where they run out;
        lost bool [B]: a NaN is among the query's valid scores.
    """
    topk = min(topk, count)
    if topk == 0:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        none = query.new_zeros(query.shape[0], 0, dtype=wide)
        return none, none.long(), none.new_zeros(query.shape[0], dtype=torch.bool)
    shard = shard[:count]
    if exclude is not None:
        exclude = torch.where(exclude < count, exclude, -1)
    _, scores, rows = bank_retrieval(query, shard, topk, exclude=exclude)
    lost = scores[:, 0].isnan()
    asked = lost.nonzero().flatten()
    step = max(1, CHUNK // count)
    for first in range(0, asked.shape[0], step):
        at = asked[first : first + step]
        scores[at], rows[at] = _best_beside_nan(query[at], shard, topk, None if exclude is None else exclude[at])
    return scores, rows, lost


def _best_beside_nan(query: Tensor, shard: Tensor, topk: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers first, as if the rows with NaN were not there; then those, by index.  The operator reports a query that
    meets a NaN as NaN all over, which orders nothing."""
    nan = torch.empty(query.shape[0], shard.shape[0], dtype=torch.bool, device=query.device)
    step = max(1, CHUNK // max(1, shard.shape[1]))
    wide = query.double()
    for first in range(0, shard.shape[0], step):
        nan[:, first : first + step] = (wide @ shard[first : first + step].double().mT).isnan()
    _, scores, rows = bank_retrieval(query, shard, topk, mask=~nan, exclude=exclude)
    if exclude is not None:
        nan &= torch.arange(shard.shape[0], device=query.device) != exclude[:, None]
    number = (rows >= 0).sum(1, keepdim=True)
    behind = (~nan).to(torch.uint8).argsort(dim=1, stable=True)[:, :topk]  # the rows with NaN, ascending
    place = torch.arange(topk, device=query.device) - number
    taken = (place >= 0) & (place < nan.sum(1, keepdim=True))
    rows = torch.where(taken, behind.gather(1, place.clamp(min=0)), rows)
    return torch.where(taken, NAN, scores), rows


def bounds(scores: Tensor, rows: Tensor, topk: int, size: int) -> Tensor:
    """[2, B], to be joined by the maximum: the score of this shard's topk-th row, and minus that of its
    ceil(topk / W)-th.  If every shard has that many rows at or above a score, topk rows in all are."""
    key, B = torch.where(rows >= 0, order_key(scores), -INF), rows.shape[0]
    share = -(-topk // size)
    last = [key[:, n - 1] if key.shape[1] >= n else key.new_full((B,), -INF) for n in (topk, share)]
    return torch.stack([last[0], -last[1]])


def surviving(scores: Tensor, rows: Tensor, joined: Tensor) -> Tensor:
    """Bool [B, k]: the candidates that can be among the global topk."""
    cut = torch.maximum(joined[0], -joined[1])
    return (rows >= 0) & (order_key(scores) >= cut[:, None])


def merge(counts: Tensor, scores: Tensor, rows: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best of all shards.

    Args:
        counts: [W, B], candidates of each shard for each query; scores, rows: [n], shard by shard, query by query.

    Returns:
        scores [B, topk], indices int64 [B, topk] of global slots, -inf and -1 where they run out; keys [B], what the
        topk-th is compared by, -inf where fewer are listed.
    """
    W, B = counts.shape
    device = scores.device
    number = counts.flatten()
    shard = torch.arange(W, device=device).repeat_interleave(B).repeat_interleave(number)
    query = torch.arange(B, device=device).repeat(W).repeat_interleave(number)
    slots, key = rows * W + shard, order_key(scores)
    # Stable sorts, the least important criterion first.
    order = slots.argsort(stable=True)
    order = order[key[order].argsort(stable=True, descending=True)]
    order = order[query[order].argsort(stable=True)]
    total = counts.sum(0)
    owner = query[order]
    place = torch.arange(order.shape[0], device=device) - (total.cumsum(0) - total)[owner]
    order, owner, place = (x[place < topk] for x in (order, owner, place))
    found = scores.new_full((B, topk), -INF)
    indices = rows.new_full((B, topk), -1)
    found[owner, place] = scores[order]
    indices[owner, place] = slots[order]
    return found, indices, torch.where(indices[:, -1] >= 0, order_key(found[:, -1]), -INF)


def log_sum(scores: Tensor, indices: Tensor, lost: Tensor, scale: Tensor) -> Tensor:
    """Log-sum-exp of scale * score over what is listed, float64 [B]; NaN where softmax has no answer; 0, which nobody
    uses, where nothing is listed."""
    listed = indices >= 0
    logits = torch.where(listed, scale * torch.where(listed, scores.double(), 0.0), -INF)
    some = listed.any(1)
    result = torch.where(some[:, None], logits, 0.0).logsumexp(1)
    result = torch.where(result.isfinite() & ~lost, result, NAN)
    return torch.where(some, result, 0.0)


def winning(scores: Tensor, rows: Tensor, rank: int, size: int, last_key: Tensor, last_slot: Tensor) -> Tensor:
    """Bool [B, k], the start of each row: the candidates of this shard up to and with the global topk-th row."""
    key, slots = order_key(scores).double(), rows * size + rank
    upto = (key == last_key[:, None]) & (slots <= last_slot[:, None])
    return (rows >= 0) & ((key > last_key[:, None]) | upto)


def segment_sum(weights: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """sum_j weights_j rows_j of consecutive segments, float64 [Q, C].

    Args:
        weights: float64 [n]; rows: [n, C] of any dtype; counts: int64 [Q], the lengths of the segments.

    One addition after the other, in the order of the list: the bits depend on no neighbour and no number of threads.
    """
    result = rows.new_zeros(counts.shape[0], rows.shape[1], dtype=torch.float64)
    start = counts.cumsum(0) - counts
    for j in range(int(counts.max()) if counts.numel() else 0):
        active = (counts > j).nonzero().flatten()
        at = start[active] + j
        result[active] += weights[at, None] * rows[at].double()
    return result


def segment_dots(x: Tensor, rows: Tensor, owner: Tensor) -> Tensor:
    """<x[owner_j], rows_j>, float64 [n]; x: [Q, C], rows: [n, C], owner: int64 [n]."""
    result = x.new_empty(rows.shape[0], dtype=torch.float64)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        result[part] = (x[owner[part]].double() * rows[part].double()).sum(1)
    return result
