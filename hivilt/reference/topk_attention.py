"""Top-k cross-modal attention, the meaning of it: out_i = sum over kept j of softmax_j(s_ij) v_j.

``s_ij = scale <q_i, k_j> + bias_ij``, rounded to fp32 (fp64 for fp64 inputs).  With ``axis="keys"`` query i keeps its
``topk`` best keys (as in arXiv 2106.06899), with ``axis="queries"`` key j keeps its ``topk`` best queries.  Best: score
descending, then index ascending, +0 equal to -0, NaN below every number.  The selection is a constant to autograd.
Sums run in float64 and results are rounded once: no TF32, bf16 or autocast switch reaches them.  Written for reading:
whole Q x N matrices live here.  Derivations: docs/topk_attention.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import counts, philox

INF, NAN = float("inf"), float("nan")


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk: int | None = None,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    select_query: Tensor | None = None,
    select_key: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_indices: bool = False,
    seed: Tensor | int | None = None,
    first: tuple[int, int, int] = (0, 0, 0),
):
    """Select, then attend to what was selected.

    Args:
        query: [B, H, Q, D]; key: [B, G, N, D]; value: [B, G, N, E], H a multiple of G.
        attn_mask: bool (True takes part) or float bias, broadcastable to [B, H, Q, N].
        key_mask, query_mask: bool [B, N], [B, Q].
        select_query, select_key: [B, Q, C], [B, N, C]; their plain dot product then selects, once for all heads.
        seed: of the dropout mask; needed where dropout_p > 0.
        first: (b, h, i) of the first row where the inputs are a slice of a larger call; dropout counts from there.

    Returns:
        out [B, H, Q, E], or a tuple (out[, lse [B, H, Q]][, indices int32]).
    """
    scores = pair_scores(query, key, scale, attn_mask)
    kept = valid_pairs(scores, attn_mask, key_mask, query_mask)
    lost = lost_rows(scores, kept)
    indices = None
    if topk is not None:
        ratings, candidates = scores.detach(), kept
        if select_query is not None:
            ratings, candidates = shared_ratings(select_query, select_key, attn_mask, key_mask, query_mask)
        indices = best(ratings, candidates, topk, axis)
        kept = kept & pairs(indices, scores.shape, axis)
    out, lse = attend(scores, value, kept, lost, dropout_p, seed, first)
    out = out.to(query.dtype)
    result = (out, *([lse] if return_lse else []), *([indices] if return_indices else []))
    return result if len(result) > 1 else out


@torch.no_grad()
def topk_select(
    query: Tensor,
    key: Tensor,
    topk: int,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    select_query: Tensor | None = None,
    select_key: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The selection alone: int32 [B, H, Q, topk] (axis="queries": [B, H, N, topk]; shared selection: H = 1)."""
    if select_query is not None:
        return best(*shared_ratings(select_query, select_key, attn_mask, key_mask, query_mask), topk, axis)
    scores = pair_scores(query, key, scale, attn_mask)
    return best(scores, valid_pairs(scores, attn_mask, key_mask, query_mask), topk, axis)


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | int | None = None,
    first: tuple[int, int, int] = (0, 0, 0),
):
    """Attention over the listed pairs, in any order; -1 lists nothing, a forbidden pair takes no part."""
    scores = pair_scores(query, key, scale, attn_mask)
    kept = valid_pairs(scores, attn_mask) & pairs(indices, scores.shape, axis)
    out, lse = attend(scores, value, kept, lost_rows(scores, kept), dropout_p, seed, first)
    out = out.to(query.dtype)
    return (out, lse) if return_lse else out


# Scores and the pairs that may take part.


def pair_scores(query: Tensor, key: Tensor, scale: float | None, attn_mask: Tensor | None) -> Tensor:
    """s [B, H, Q, N]; a bias of -inf adds nothing here, ``allowed`` leaves the pair out."""
    heads, D = query.shape[1], query.shape[3]
    scale = default_scale(D) if scale is None else scale
    scores = scale * _dot(query.double(), key.double().repeat_interleave(heads // max(1, key.shape[1]), 1))
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + torch.where(attn_mask == -INF, 0.0, attn_mask).double()
    return scores.to(score_dtype(query))


def score_dtype(x: Tensor) -> torch.dtype:
    """The precision of scores and lse."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def default_scale(width: int) -> float:
    """1 / sqrt(D); the score of zero-width vectors is 0 whatever the scale."""
    return 1.0 / math.sqrt(max(1, width))


def allowed(attn_mask: Tensor | None, key_mask: Tensor | None, query_mask: Tensor | None) -> Tensor | bool:
    """What the masks permit, broadcastable to [B, H, Q, N]; True without masks."""
    permitted = True
    if attn_mask is not None:
        permitted = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -INF
    if key_mask is not None:
        permitted = key_mask[:, None, None, :] & permitted
    if query_mask is not None:
        permitted = query_mask[:, None, :, None] & permitted
    return permitted


def valid_pairs(scores, attn_mask=None, key_mask=None, query_mask=None) -> Tensor:
    """Bool [B, H, Q, N]: allowed by every mask, and a score other than -inf."""
    valid, permitted = scores != -INF, allowed(attn_mask, key_mask, query_mask)
    return valid if permitted is True else valid & permitted


def lost_rows(scores: Tensor, valid: Tensor) -> Tensor:
    """Bool [B, H, Q]: rows that a NaN or +inf among their valid scores makes NaN."""
    if not scores.shape[-1]:
        return torch.zeros(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    return ~(torch.where(valid, scores.detach(), 0.0).amax(-1) < INF)


@torch.no_grad()
def shared_ratings(select_query, select_key, attn_mask, key_mask, query_mask) -> tuple[Tensor, Tensor]:
    """Selection scores and candidates [B, 1, Q, N] of the selection that all heads share: no head's score counts."""
    ratings = (select_query.double() @ select_key.double().mT)[:, None].to(score_dtype(select_query))
    candidates = torch.ones_like(ratings, dtype=torch.bool) & allowed(attn_mask, key_mask, query_mask)
    return ratings, candidates


# The selection.


def best(scores: Tensor, valid: Tensor, topk: int, axis: str = "keys") -> Tensor:
    """int32 [..., topk]: the best valid entries of each row (axis="queries": of each column), ascending, -1 padded."""
    if axis == "queries":
        scores, valid = scores.mT, valid.mT
    width = scores.shape[-1]
    number = valid & ~scores.isnan()
    # Stable sorts, the least important criterion first: index, then number before NaN before invalid, then score.
    order = torch.where(number, 0, torch.where(valid, 1, 2)).argsort(stable=True, dim=-1)
    ranked = torch.where(number, scores + 0.0, -INF).gather(-1, order)  # + 0.0 turns -0 into +0
    order = order.gather(-1, ranked.argsort(stable=True, dim=-1, descending=True))[..., :topk]
    slots = torch.where(valid.gather(-1, order), order, width).sort(-1).values
    slots = torch.where(slots == width, -1, slots).to(torch.int32)
    return torch.nn.functional.pad(slots, (0, topk - slots.shape[-1]), value=-1)


def pairs(indices: Tensor, shape: tuple[int, ...], axis: str = "keys") -> Tensor:
    """Bool [B, H|1, Q, N]: the pairs that ``indices`` list; -1 lists nothing."""
    width = shape[-1] if axis == "keys" else shape[-2]
    listed = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool, device=indices.device)
    listed.scatter_(-1, torch.where(indices < 0, width, indices).long(), True)
    return listed[..., :width] if axis == "keys" else listed[..., :width].mT


# Attention over the kept pairs.


def attend(scores, value, kept, lost, dropout_p=0.0, seed=None, first=(0, 0, 0)) -> tuple[Tensor, Tensor]:
    """out (float64) and lse, differentiable; nothing kept: 0 and -inf; a lost row: NaN and NaN."""
    precision = scores.dtype
    scores = torch.where(kept, scores.double(), -INF)
    some = kept.any(-1, keepdim=True)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    top = torch.where(lost[..., None], NAN, torch.where(some, top, 0.0))
    weight = torch.where(kept, (scores - top).exp(), 0.0)
    total = torch.where(some, weight.sum(-1, keepdim=True), 1.0)
    lse = torch.where(some, top + total.log(), -INF).squeeze(-1)
    if dropout_p > 0.0:  # after the normaliser, which counts every kept pair
        keep = dropout_keep(seed, dropout_p, weight.shape, weight.device, first)
        weight = torch.where(keep, weight * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0), 0.0)
    value = value.double().repeat_interleave(weight.shape[1] // max(1, value.shape[1]), 1)
    out = torch.where(some, contract(weight, kept, value) / total, 0.0)
    blank = torch.where(lost, NAN, 0.0)  # added, not put in place: the gradient of a lost row is NaN too
    return out + blank[..., None], (lse + blank).to(precision)


def contract(weight: Tensor, kept: Tensor, x: Tensor) -> Tensor:
    """sum_j weight_ij x_j over the kept pairs; a NaN or infinite x_j touches only the rows that keep j."""
    finite = x.isfinite()
    total = weight @ torch.where(finite, x, 0.0)
    for j in (~finite).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist() if not finite.all() else ():
        wild = torch.where(finite[..., None, j, :], 0.0, x[..., None, j, :])
        total = total + torch.where(kept[..., j, None], weight[..., j, None] * wild, 0.0)
    return total


def dropout_keep(
    seed: Tensor | int,
    dropout_p: float,
    shape: tuple[int, int, int, int],
    device: torch.device | str = "cpu",
    first: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """Bool [B, H, Q, N]: the probabilities that stay.

    Key: the two halves of ``seed``.  Counter: (j >> 2, i, h, b); pair (i, j) takes word j & 3 and stays when that is
    at least floor(dropout_p * 2^32).  A pure function of its arguments: the same mask forward, backward and anywhere.
    """
    B, H, Q, N = shape
    c = [
        counts(n, i, 4, start, device)
        for n, i, start in zip(((N + 3) // 4, Q, H, B), (3, 2, 1, 0), (0, *first[::-1]), strict=True)
    ]
    words = philox(c, seed.to(device) if isinstance(seed, Tensor) else seed)
    words = torch.stack([w.expand(B, H, Q, (N + 3) // 4) for w in words], -1).flatten(-2)[..., :N]
    return words >= math.floor(dropout_p * 2.0**32)


def _dot(query: Tensor, key: Tensor) -> Tensor:
    """<q_i, k_j>, whose gradient never multiplies by a NaN or infinite entry of a pair that is not kept."""
    fine_query, fine_key = query.isfinite(), key.isfinite()
    if fine_query.all() and fine_key.all():
        return query @ key.mT
    dots = torch.where(fine_query, query, 0.0) @ torch.where(fine_key, key, 0.0).mT
    with torch.no_grad():
        wild = ~(fine_query.all(-1)[..., :, None] & fine_key.all(-1)[..., None, :])
        error = torch.where(wild, query @ key.mT - dots, 0.0)
    return dots + error
