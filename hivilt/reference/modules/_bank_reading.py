"""How a feature bank is read, in plain PyTorch: query [B, C], bank [M, C], valid bool [M] or [B, M]; results in
float32, or float64 where query is."""

from __future__ import annotations

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")


def attend(query: Tensor, bank: Tensor, scale: float | Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """All valid rows: retrieved [B, C] and log-sum-exp [B]."""
    wide = wide_dtype(query.dtype, bank.dtype)
    query, bank = query.to(wide), bank.to(wide)
    # Gradients and sums run over rows without NaN and infinity, which would meet factors of 0 from queries that do
    # not read their row; who does read it has a score that is not finite.
    rows = torch.where(bank.isfinite(), bank, 0.0)
    with torch.no_grad():
        true = query @ bank.mT
    scores = torch.where(true.isfinite(), query @ rows.mT, true)
    valid = valid & (true != -INF)
    scores = torch.where(valid, scores, 0.0)  # nor may scale, which learns, meet what is not read
    some = valid.any(1, keepdim=True)
    logits = torch.where(valid, scale_of(scale, wide) * scores, torch.where(some, -INF, 0.0))
    lse = torch.where(some[:, 0], logits.logsumexp(1), -INF)
    return torch.where(some, logits.softmax(1) @ rows, 0.0), lse


def select(
    query: Tensor, bank: Tensor, topk: int, scale: float | Tensor, valid: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The topk best valid rows: retrieved [B, C], scores and slots [B, topk]."""
    M, wide = bank.shape[0], wide_dtype(query.dtype, bank.dtype)
    query, width = query.to(wide), min(topk, M)
    with torch.no_grad():
        scores = query @ bank.to(wide).mT
        valid = valid & (scores != -INF)
        if exclude is not None:
            valid = valid & (torch.arange(M, device=query.device) != exclude[:, None])
        lost = (valid & scores.isnan()).any(1, keepdim=True)
        rank = torch.where(scores.isnan(), torch.finfo(wide).min, scores)
        rank, slots = torch.where(valid, rank, -INF).sort(dim=1, descending=True, stable=True)
        listed, slots = rank[:, :width] != -INF, slots[:, :width]
        kept = scores.gather(1, slots)
    rows = torch.where(listed[..., None], bank[slots].to(wide), 0.0)  # a copy: updates do not reach backward
    dots = torch.einsum("bc,bkc->bk", query, rows)
    dots = torch.where(kept.isfinite(), dots + (kept - dots).detach(), kept)  # the numbers that were compared
    dots = torch.where(listed, torch.where(lost, NAN, dots), 0.0)
    some = listed.any(1, keepdim=True)
    logits = torch.where(listed, scale_of(scale, wide) * dots, torch.where(some, -INF, 0.0))
    shares = torch.where(listed, logits.softmax(1), 0.0)
    retrieved = torch.einsum("bk,bkc->bc", shares, rows)
    found = torch.where(listed, dots, -INF), torch.where(listed, slots, -1)
    if topk > M:
        found = tuple(
            torch.cat([x, x.new_full((x.shape[0], topk - M), fill)], 1)
            for x, fill in zip(found, (-INF, -1), strict=True)
        )
    return retrieved, *found


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least; zeros stay zeros.  Divided by the peak first, no square over- or
    underflows; as the quotient does not depend on the peak, neither does the gradient."""
    x = x.to(wide_dtype(x.dtype))
    peak = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(peak > 0, peak, 1.0)
    norm = x.square().sum(-1, keepdim=True)
    return x * torch.where(norm > 0, norm, 1.0).rsqrt()


def scale_of(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return scale.to(dtype).reshape(()) if isinstance(scale, Tensor) else scale
