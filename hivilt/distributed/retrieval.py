"""One retrieval across shards, forward and backward.

    forward   queries to every shard -> local topk -> cut -> candidates (score, row) to the query's home -> exact merge
              -> (last score, last slot, log-sum-exp) to every shard -> weighted sums of a shard's winners to the home
    backward  (gradient, delta) of a query to the shards that hold its winners -> their part of dq to the home

Both ends know who owns which winner once the merge is done, so only shards with a winner of a query send or get a row
for it: at most min(W, topk) rows of C per query, and never one of the topk rows itself.  Parts are added in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import candidates
from .exchange import Exchange, ShardError
from .handshake import OPERATIONS, agree


@dataclass
class Call:
    """One forward call on this rank, agreed upon: who passes how many queries, and what they are looked up in."""

    exchange: Exchange
    rows: list[int]  # queries of each rank
    shard: Tensor | None  # [local rows, C]; None once forward is done
    count: int  # of its rows that hold a feature
    topk: int
    exclude: Tensor | None  # int64 [B], global slots
    scale: float  # where no tensor gives it
    wire: torch.dtype  # of scores and sums: float64 for float64, else float32
    number: int  # of this call, by which backward names it
    saved: dict[str, Tensor] = field(default_factory=dict)  # what only backward reads


class ShardedRetrieval(Function):
    """(query, scale or None, call) -> retrieved, scores, indices.  The selection is a constant."""

    @staticmethod
    def forward(ctx, query, scale, call):
        retrieved, scores, indices = retrieve(call, query, scale, save=True)
        ctx.call, ctx.names = call, tuple(call.saved)
        ctx.dtypes = query.dtype, None if scale is None else (scale.dtype, scale.shape)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved.values())
        call.saved, call.shard = {}, None  # the bank may change or go before backward
        return retrieved, scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_retrieved, grad_scores, _):
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        of_query, of_scale = retrieve_backward(ctx.call, saved, grad_retrieved, grad_scores)
        dtype, scale = ctx.dtypes
        return of_query.to(dtype), None if scale is None else of_scale.to(scale[0]).reshape(scale[1]), None


def retrieve(call: Call, query: Tensor, scale: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """retrieved [B, C] in query's dtype, scores [B, topk], indices int64 [B, topk], of this rank's own queries."""
    exchange, rows, W, wire = call.exchange, call.rows, call.exchange.size, call.wire
    mine = rows[exchange.rank]
    if scale is None:
        scale = torch.tensor(call.scale, dtype=torch.float64, device=query.device)
    else:  # rounded as the operator rounds it
        scale = scale.detach().to(wire).double().reshape(())
    every = exchange.all_gather_rows(query, rows, "queries")
    exclude = None
    if call.exclude is not None:
        slots = exchange.all_gather_rows(call.exclude, rows, "exclude")
        here = (slots >= 0) & (slots % W == exchange.rank) & (slots // W < call.count)
        exclude = torch.where(here, slots // W, -1)

    # Own candidates, and the cut below which no shard has to send any. A rank that failed says so here, once.
    failure = None
    try:
        scores, slots, lost = candidates.local_best(every, call.shard, call.topk, call.count, exclude)
        bounds = candidates.bounds(scores, slots, call.topk, W)
    except Exception as error:
        failure, bounds = error, torch.zeros(2, every.shape[0], dtype=wire, device=query.device)
    flag = bounds.new_full((1,), 0.0 if failure is None else 1.0)
    joined = exchange.all_max(torch.cat([bounds.flatten(), flag]), "cut")
    if joined[-1] != 0:
        exchange.turn_back()
    if failure is not None:
        raise failure
    if joined[-1] != 0:
        raise ShardError("ShardedFeatureBank.forward: the retrieval of another rank's shard failed there")
    alive = candidates.surviving(scores, slots, joined[:-1].view(2, -1))

    # To the queries' homes: how many candidates (~n where a NaN was met), then those.
    number = alive.sum(1)
    counts = exchange.all_to_all(
        torch.where(lost, ~number, number).to(torch.int32), rows, [mine] * W, "counts"
    ).view(W, mine).long()  # fmt: skip
    met_nan = (counts < 0).any(0)
    counts = torch.where(counts < 0, ~counts, counts)
    packed = torch.cat([scores[alive, None].to(wire).view(torch.int32), slots[alive, None].to(torch.int32)], 1)
    send = _by_home(number, rows)
    packed = exchange.all_to_all(packed, send, counts.sum(1).tolist(), "candidates")
    found, indices, last = candidates.merge(
        counts, packed[:, :-1].reshape(-1).view(wire), packed[:, -1].long(), call.topk
    )
    lse = candidates.log_sum(found, indices, met_nan, scale)

    # Back to every shard: where the list of a query ends. float64 holds scores and slots exactly.
    end = torch.where(indices[:, -1] >= 0, indices[:, -1], torch.iinfo(torch.int32).max * W)
    ends = exchange.all_gather_rows(torch.stack([last.double(), end.double(), lse], 1), rows, "merged")
    won = candidates.winning(scores, slots, exchange.rank, W, ends[:, 0], ends[:, 1])
    per_query = won.sum(1)
    owner = (per_query > 0).nonzero().flatten()  # queries with a winner here
    lengths = per_query[owner]
    segment = torch.arange(owner.shape[0], device=query.device).repeat_interleave(lengths)
    winners = call.shard[slots[won]]
    own_scores = scores[won].double()
    weights = (scale * own_scores - ends[owner, 2][segment]).exp()

    # Parts of the sums, from the shards with a winner only.
    home = _winners_by_shard(indices, W)  # [W, B]
    to_homes = _by_home((per_query > 0).long(), rows)
    from_shards = (home > 0).sum(1).tolist()
    parts = candidates.segment_sum(weights, winners, lengths).to(wire)
    total = _add_parts(exchange.all_to_all(parts, to_homes, from_shards, "sums"), home)
    listed = indices >= 0
    scores_out = torch.where(met_nan[:, None] & listed, candidates.NAN, found)
    retrieved = total.to(query.dtype)
    if save:
        call.saved = {
            "winners": winners, "own_scores": own_scores, "weights": weights, "lengths": lengths, "segment": segment,
            "per_query": per_query, "total": total, "indices": indices, "home": home, "scale": scale,
        }  # fmt: skip
    return retrieved, scores_out, indices


def retrieve_backward(
    call: Call, saved: dict[str, Tensor], grad_retrieved: Tensor | None, grad_scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of this rank's queries: dq [B, C] and the gradient of scale (), float64.

    With p the weights, g the upstream gradient of retrieved and delta = <g, retrieved>:
    t_j = p_j (<g, row_j> - delta),  dq = sum_j (scale t_j + dscore_j) row_j,  dscale = sum_j t_j score_j.
    """
    exchange, rows, wire = call.exchange, call.rows, call.wire
    total, indices, home = saved["total"], saved["indices"], saved["home"]
    own = {"grad_retrieved": int(grad_retrieved is not None), "grad_scores": int(grad_scores is not None)}
    header = {"operation": OPERATIONS.index("backward"), "of_call": call.number, **own}
    with exchange.call("backward"):
        agree(exchange, header, None, total.device)
        if max(rows) == 0:
            return total, total.new_zeros(())
        asked = (home > 0).sum(1).tolist()  # rows that go to each shard and come back
        here = _by_home((saved["per_query"] > 0).long(), rows)
        query = (home > 0).nonzero()[:, 1]  # shard by shard
        weights = saved["weights"]
        t = torch.zeros_like(weights)
        if grad_retrieved is not None:
            g = grad_retrieved.double()
            message = torch.cat([g, (g * total).sum(1, keepdim=True)], 1)[query].to(wire)
            message = exchange.all_to_all(message, asked, here, "gradients")
            C = total.shape[1]
            dots = candidates.segment_dots(message[:, :C], saved["winners"], saved["segment"])
            t = weights * (dots - message[:, C].double()[saved["segment"]])
        of_rows = saved["scale"] * t
        if grad_scores is not None:
            # A shard's winners of a query stand in its list in the order in which they stand in the merged one.
            shard = torch.where(indices >= 0, indices % exchange.size, exchange.size).flatten()
            order = shard.argsort(stable=True)[: int((indices >= 0).sum())]
            ds = grad_scores.to(wire).flatten()[order]
            send = home.sum(1).tolist()
            of_rows = of_rows + exchange.all_to_all(
                ds, send, _by_home(saved["per_query"], rows), "score_gradients"
            ).double()  # fmt: skip
        parts = candidates.segment_sum(of_rows, saved["winners"], saved["lengths"])
        of_scale = candidates.segment_sum(t, saved["own_scores"][:, None], saved["lengths"])
        parts = exchange.all_to_all(torch.cat([parts, of_scale], 1).to(wire), here, asked, "sums")
        result = _add_parts(parts, home)
        return result[:, :-1], result[:, -1].sum()


def _by_home(number: Tensor, rows: list[int]) -> list[int]:
    """Sums of a per-query number [sum(rows)] over the queries of each rank."""
    upto = torch.cat([number.new_zeros(1), number.cumsum(0)])
    ends = torch.tensor([0, *rows], device=number.device).cumsum(0)
    return upto[ends].diff().tolist()


def _winners_by_shard(indices: Tensor, size: int) -> Tensor:
    """int64 [W, B]: how many of a query's listed slots live on each rank."""
    B = indices.shape[0]
    shard = torch.where(indices >= 0, indices % size, size)
    counts = indices.new_zeros(B, size + 1).scatter_add_(1, shard, torch.ones_like(shard))
    return counts[:, :size].T.contiguous()


def _add_parts(parts: Tensor, home: Tensor) -> Tensor:
    """float64 [B, C]: the rows of all shards, added in rank order; home: [W, B], where a shard has a part."""
    result = parts.new_zeros(home.shape[1], parts.shape[1], dtype=torch.float64)
    first = 0
    for has in home > 0:
        at = has.nonzero().flatten()
        result[at] += parts[first : first + at.shape[0]].double()
        first += at.shape[0]
    return result
