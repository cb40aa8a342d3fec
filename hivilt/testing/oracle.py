"""Float64 truth of top-k attention, its error budgets, and the rivals it is compared with.

Inputs are rounded to the tested dtype first and then lifted to float64; the truth is computed there from the kernel's
*own* indices, so a legal choice between two almost equal scores is never an error.  Written independently of
``hivilt.reference``.  Budget of a value, u the unit roundoff: ``c * u * ((2 S + 2) * sum_j p_j |v_j| + |out|)`` with
``S = max_j scale * sum_d |q_d k_jd|`` over the kept keys; gradients take the sum of their absolute contributions.
It does not grow with the row length: long sums of one sign are judged against same-precision eager PyTorch instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = 2.0**-102  # u * TINY is the smallest normal float32: a smaller probability may be flushed to zero
NAN, INF = float("nan"), float("inf")


@dataclass
class Truth:
    """What a call owes in float64, and for each value the two terms of its error budget."""

    kept: Tensor  # bool [B, H, Q, N]
    values: dict[str, Tensor] = field(default_factory=dict)  # out, lse, query, key, value, attn_mask
    spread: dict[str, Tensor] = field(default_factory=dict)  # (2 S + 2) * absolute contributions

    def budget(self, name: str, dtype: torch.dtype, c: float | None = None, tight: bool = False) -> Tensor:
        """Largest error allowed per element; ``tight`` charges half types only float32 error plus one rounding."""
        if name == "lse":
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
        half = dtype in (torch.float16, torch.bfloat16)
        if c is None:
            c = (1 if half else 2) * (1 if name in ("out", "lse") else 2) * (2 if dtype == torch.float64 else 1)
        u, size = UNIT[dtype], self.values[name].abs()
        inner = 2 * UNIT[torch.float32] if tight and half else c * u
        last_bit = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # smallest subnormal
        return inner * self.spread[name] + c * u * size + last_bit


def pairs_from_indices(indices: Tensor, queries: int, keys: int, heads: int, axis: str = "keys") -> Tensor:
    """Bool [B, H, Q, N] of the pairs that ``indices`` lists; -1 lists nothing."""
    width = keys if axis == "keys" else queries
    listed = torch.zeros(*indices.shape[:3], width + 1, dtype=torch.bool, device=indices.device)
    slot = torch.where(indices < 0, width, indices).long()
    listed = listed.scatter(-1, slot, torch.ones_like(slot, dtype=torch.bool))[..., :width]
    return (listed if axis == "keys" else listed.mT).expand(-1, heads, -1, -1)


def best(scores: Tensor, valid: Tensor, topk: int, axis: str = "keys") -> Tensor:
    """The ``topk`` best valid pairs per query (or per key): score descending, index ascending, NaN last."""
    if axis == "queries":
        return best(scores.mT, valid.mT, topk).mT
    number = valid & ~scores.isnan()
    rank = torch.where(number, 0, torch.where(valid, 1, 2))
    order = rank.argsort(dim=-1, stable=True)
    ordered = torch.where(number, scores + 0.0, -INF).gather(-1, order)  # + 0.0 makes -0 a +0
    order = order.gather(-1, ordered.argsort(dim=-1, descending=True, stable=True))
    kept = torch.zeros_like(valid).scatter(-1, order[..., :topk], True)
    return kept & valid


def lift(query, key, axis, attn_mask, key_mask, query_mask, select_query, select_key, scale):
    """Float64 attention scores, selection scores, their absolute sums, and the valid pairs, all [B, H, Q, N]."""
    B, H, Q, D = query.shape
    N = key.shape[2]
    q, k = query.double(), key.double().repeat_interleave(H // key.shape[1], 1)
    scale = 1 / math.sqrt(D) if scale is None else scale
    scores, size = scale * (q @ k.mT), abs(scale) * (q.abs() @ k.abs().mT)
    valid = torch.ones(B, H, Q, N, dtype=torch.bool, device=q.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        valid = valid & attn_mask
    elif attn_mask is not None:
        valid = valid & (attn_mask != -INF)
        bias = torch.where(attn_mask == -INF, 0.0, attn_mask.double())
        scores, size = scores + bias, size + bias.abs()
    if key_mask is not None:
        valid = valid & key_mask[:, None, None, :]
    if query_mask is not None:
        valid = valid & query_mask[:, None, :, None]
    valid = valid & (scores != -INF)
    source, source_size, width = scores, size, D
    if select_query is not None:
        a, b = select_query.double()[:, None], select_key.double()[:, None]
        source, source_size, width = a @ b.mT, a.abs() @ b.abs().mT, select_query.shape[-1]
        source, source_size = source.expand(-1, H, -1, -1), source_size.expand(-1, H, -1, -1)
    return q, k, scale, scores, size, valid, source, UNIT[torch.float32] * (width + 2) * source_size


def row_max(x: Tensor) -> Tensor:
    return x.amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def oracle(
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
    indices: Tensor | None = None,
    keep: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> Truth:
    """Attention over the kept pairs in float64, with gradients when ``grad_out`` is given.

    ``indices`` freezes the selection; ``keep`` [B, H, Q, N] multiplies the probabilities (dropout).
    """
    H, G, N = query.shape[1], key.shape[1], key.shape[2]
    q, k, scale, scores, size, valid, source, _ = lift(
        query, key, axis, attn_mask, key_mask, query_mask, select_query, select_key, scale
    )
    if indices is not None:
        kept = pairs_from_indices(indices, query.shape[2], N, H, axis) & valid
    else:
        kept = valid if topk is None else best(source, valid, topk, axis)
    lost = (valid & (scores.isnan() | (scores == INF))).any(-1)
    kept_size = torch.where(kept & ~lost[..., None], size, 0.0)
    scores = torch.where(kept & ~lost[..., None], scores, -INF)
    lse = torch.logsumexp(scores, -1) if N else scores.new_full(scores.shape[:-1], -INF)
    p = torch.where(scores > -INF, (scores - lse[..., None]).exp(), 0.0)
    keep = torch.ones_like(p) if keep is None else keep.double()
    floor = torch.where(scores > -INF, p + TINY, 0.0)
    v = value.double().repeat_interleave(H // G, 1)
    bad = v.isnan() | v.isinf()
    v = torch.where(bad, 0.0, v)
    weight = 2 * row_max(kept_size)[..., None] + 2  # [B, H, Q, 1]

    truth = Truth(kept)
    out = torch.where((kept.double() @ bad.double() > 0) | lost[..., None], NAN, (p * keep) @ v)
    truth.values = {"out": out, "lse": torch.where(lost, NAN, lse)}
    truth.spread = {"out": weight * ((floor * keep) @ v.abs()), "lse": weight[..., 0]}
    if grad_out is None:
        return truth

    def per_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (G, H // G)).sum(2)

    g = grad_out.double()
    g = torch.where(kept.any(-1, keepdim=True), g, 0.0)  # a row that keeps nothing hands nothing back
    gl = torch.zeros_like(lse) if grad_lse is None else torch.where(kept.any(-1), grad_lse.double(), 0.0)
    dp, dp_size = keep * (g @ v.mT), keep * (g.abs() @ v.abs().mT)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) + gl[..., None])
    ds_size = weight * floor * (dp_size + (p * dp_size).sum(-1, keepdim=True) + gl.abs()[..., None])
    clean_q = torch.where(kept.any(-1, keepdim=True), q, 0.0)
    clean_k = torch.where(kept.any(-2)[..., None], k, 0.0)
    truth.values["query"], truth.spread["query"] = scale * (ds @ clean_k), abs(scale) * (ds_size @ clean_k.abs())
    truth.values["key"] = per_group(scale * (ds.mT @ clean_q))
    truth.spread["key"] = per_group(abs(scale) * (ds_size.mT @ clean_q.abs()))
    truth.values["value"] = per_group((p * keep).mT @ g)
    truth.spread["value"] = per_group((weight * floor * keep).mT @ g.abs())
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        truth.values["attn_mask"] = ds.sum_to_size(attn_mask.shape)
        truth.spread["attn_mask"] = ds_size.sum_to_size(attn_mask.shape)
    return truth


def eager(query, key, value, kept, *, scale=None, attn_mask=None, grad_out=None, grad_lse=None) -> dict[str, Tensor]:
    """Plain same-precision PyTorch over the pairs ``kept``: the error a user has today."""
    float_mask = attn_mask is not None and attn_mask.dtype != torch.bool
    named = {"query": query, "key": key, "value": value} | ({"attn_mask": attn_mask} if float_mask else {})
    leaves = {name: t.detach().contiguous().requires_grad_(grad_out is not None) for name, t in named.items()}
    repeats = query.shape[1] // key.shape[1]
    k, v = leaves["key"].repeat_interleave(repeats, 1), leaves["value"].repeat_interleave(repeats, 1)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (leaves["query"] @ k.mT) * scale
    if float_mask:
        bias = leaves["attn_mask"]
        scores = scores + torch.where(bias == -INF, 0.0, bias).to(scores.dtype)
    some = kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept & some, -INF)
    out = torch.where(some, scores.softmax(-1), 0.0) @ v
    lse = torch.where(some[..., 0], scores.logsumexp(-1), -INF)
    got = {"out": out, "lse": lse}
    if grad_out is not None:
        upstream = grad_lse if grad_lse is not None else torch.zeros_like(lse)
        grads = torch.autograd.grad(
            [out, torch.where(some[..., 0], lse, 0.0)], list(leaves.values()), [grad_out, upstream.to(lse.dtype)]
        )
        got |= dict(zip(leaves, grads, strict=True))
    return {name: t.detach() for name, t in got.items()}


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): counter uint32 [..., 4] -> four uint32 words."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def dropout_keep(seed: int, p: float, shape: tuple[int, int, int, int], first_batch: int = 0) -> Tensor:
    """Multiplier [B, H, Q, N] (0 or 1 / (1 - p)) that dropout applies to the probabilities for ``seed``."""
    B, H, Q, N = shape
    seed &= 0xFFFFFFFFFFFFFFFF
    grid = np.meshgrid(np.arange(first_batch, first_batch + B), np.arange(H), np.arange(Q), np.arange((N + 3) // 4),
                       indexing="ij")  # fmt: skip
    words = philox(np.stack(grid[::-1], -1).astype(np.uint32), (seed & 0xFFFFFFFF, seed >> 32))
    words = words.reshape(B, H, Q, 4 * ((N + 3) // 4))[..., :N].astype(np.uint64)
    kept = torch.from_numpy(words >= np.uint64(math.floor(p * 2.0**32)))
    return kept.double() / (1 - p) if p < 1 else torch.zeros(shape, dtype=torch.float64)
