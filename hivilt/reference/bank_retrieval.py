"""Retrieval from a feature bank, the meaning of it: the topk best rows of a bank, and what they say together.

    s_j = <q, key_j>,  K = the topk best valid rows
    p = softmax over K of scale s_j,  retrieved = sum over K of p_j value_j

Best: score descending, then index ascending, +0 equal to -0.  A row is valid where ``count``, ``mask`` and ``exclude``
allow it and its score is not -inf.  A NaN among a query's valid scores makes that query's result NaN.  Sums run in
float64; scores are rounded to fp32 (fp64 for fp64) before they are compared, results once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .topk_attention import best

INF, NAN = float("inf"), float("nan")


def bank_retrieval(
    query: Tensor,
    keys: Tensor,
    topk: int,
    *,
    values: Tensor | None = None,
    scale: float | Tensor = 1.0,
    count: int | Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select, then weigh.

    Args:
        query: [B, C]; keys: [M, C]; values: [M, E], the keys by default.
        count: rows from this one on are not valid.
        mask: bool [M] or [B, M], True takes part; exclude: int [B], a row that is not valid for a query, -1 is none.

    Returns:
        retrieved [B, E], scores [B, topk] descending, indices int64 [B, topk]; -inf and -1 where rows run out.
    """
    scores = bank_scores(query, keys)
    valid = valid_rows(scores, count, mask, exclude)
    indices = ranked(scores, valid, topk)
    listed = indices >= 0
    kept = scores.gather(1, indices.clamp(min=0)) if keys.shape[0] else scores.new_zeros(indices.shape)
    lost = (valid & scores.isnan()).any(1, keepdim=True)
    blank = torch.where(lost, NAN, 0.0)
    kept = torch.where(listed, kept + blank, -INF)
    values = keys if values is None else values
    rows = values.double()[indices.clamp(min=0)] if keys.shape[0] else values.new_zeros(*indices.shape, values.shape[1])
    return weigh(kept, rows.double(), listed, scale).to(query.dtype), kept, indices


def weigh(scores: Tensor, rows: Tensor, listed: Tensor, scale: float | Tensor) -> Tensor:
    """sum_j softmax(scale scores)_j rows_j over the listed entries, in float64; nothing listed: 0."""
    some = listed.any(1, keepdim=True)
    factor = scale.double().reshape(()) if isinstance(scale, Tensor) else scale
    logits = factor * torch.where(listed, scores.double(), 0.0)
    logits = torch.where(listed, logits, torch.where(some, -INF, 0.0))
    shares = torch.where(listed, logits.softmax(1), 0.0)
    return torch.where(listed[..., None], shares[..., None] * rows, 0.0).sum(1)


def bank_attention(
    query: Tensor,
    keys: Tensor,
    *,
    values: Tensor | None = None,
    scale: float | Tensor = 1.0,
    count: int | Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All valid rows, by softmax: retrieved [B, E] and the log-sum-exp of scale s_j [B]; no valid row: 0 and -inf."""
    scores = bank_scores(query, keys)
    valid = valid_rows(scores, count, mask, None)
    some = valid.any(1, keepdim=True)
    factor = scale.double().reshape(()) if isinstance(scale, Tensor) else scale
    logits = torch.where(valid, factor * torch.where(valid, scores.double(), 0.0), torch.where(some, -INF, 0.0))
    values = keys if values is None else values
    shares = torch.where(valid, logits.softmax(1), 0.0)
    lse = torch.where(some.squeeze(1), logits.logsumexp(1) if keys.shape[0] else logits.sum(1), -INF)
    finite = torch.where(values.isfinite(), values.double(), 0.0)
    out = shares @ finite
    for j in (~values.isfinite()).any(1).nonzero().flatten().tolist():  # a row that is not valid touches nothing
        out = out + torch.where(valid[:, j, None], shares[:, j, None] * (values[j].double() - finite[j]), 0.0)
    return out.to(query.dtype), lse.to(scores.dtype)


def bank_scores(query: Tensor, keys: Tensor) -> Tensor:
    """<q, key_j> [B, M], whose gradient never multiplies by what is not finite in a row that is not kept."""
    wide = torch.promote_types(query.dtype, keys.dtype)
    fine_query, fine_keys = query.isfinite(), keys.isfinite()
    scores = torch.where(fine_query, query, 0.0).double() @ torch.where(fine_keys, keys, 0.0).double().mT
    if not (fine_query.all() and fine_keys.all()):
        with torch.no_grad():
            wild = ~(fine_query.all(1)[:, None] & fine_keys.all(1))
            error = torch.where(wild, query.double() @ keys.double().mT - scores, 0.0)
        scores = scores + error
    return scores.to(torch.float64 if wide == torch.float64 else torch.float32)


def valid_rows(scores: Tensor, count: int | Tensor | None, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    """Bool [B, M]."""
    valid, slots = scores != -INF, torch.arange(scores.shape[1], device=scores.device)
    if count is not None:
        valid = valid & (slots < count)
    if mask is not None:
        valid = valid & mask
    return valid if exclude is None else valid & (slots != exclude[:, None])


@torch.no_grad()
def ranked(scores: Tensor, valid: Tensor, topk: int) -> Tensor:
    """int64 [B, topk]: the best valid rows, best first, NaN below every number; -1 where they run out."""
    slots = best(scores, valid, topk).long()  # ascending
    if not scores.shape[1]:
        return slots
    found = torch.where(slots >= 0, scores.gather(1, slots.clamp(min=0)), -INF)
    rank = torch.where(found.isnan(), -INF, found + 0.0)
    rank = torch.where(slots >= 0, rank, -INF)
    # Stable sorts, the least important criterion first: index, then number before NaN before nothing, then score.
    order = torch.where(slots < 0, 2, found.isnan().int()).argsort(stable=True, dim=-1)
    order = order.gather(-1, rank.gather(-1, order).argsort(stable=True, dim=-1, descending=True))
    return slots.gather(-1, order)


def ring_push(
    keys: Tensor, pointer: int, filled: int, features: Tensor, values: Tensor | None = None, rows: Tensor | None = None
) -> tuple[int, int]:
    """Writes features[i] to slot (pointer + i) mod M, one after the other, the last M of them at most.

    Returns:
        The new pointer and the new number of filled slots.
    """
    M = keys.shape[0]
    for i in range(max(0, features.shape[0] - M), features.shape[0]):
        keys[(pointer + i) % M] = features[i].to(keys.dtype)
        if values is not None:
            values[(pointer + i) % M] = rows[i].to(values.dtype)
    return (pointer + features.shape[0]) % M, min(M, filled + features.shape[0])
