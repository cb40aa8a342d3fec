"""Assertions that judge results by budgets and selections by order; each failure can carry a one-line repro."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .oracle import INF, TINY, Truth, best, lift, pairs_from_indices, row_max


def assert_within(got: Tensor, truth: Tensor, budget: Tensor, what: str = "result", repro: str = "") -> None:
    """Every element within its budget; NaN and infinities exactly where the truth has them."""
    tail = f"\n  repro: {repro}" if repro else ""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}{tail}"
    x = got.double()
    finite = truth.isfinite()
    error = torch.where(finite, (x - truth).abs(), torch.where((x == truth) | (x.isnan() & truth.isnan()), 0.0, INF))
    error = error.nan_to_num(nan=INF, posinf=INF)
    over = error > torch.where(finite, budget, 0.0)
    if over.any():
        ratio = torch.where(over, error / budget.clamp_min(TINY), -1.0)
        at = tuple(int(i) for i in np.unravel_index(int(ratio.flatten().argmax()), ratio.shape))
        raise AssertionError(
            f"{what}: {int(over.sum())} of {x.numel()} elements over budget, worst at {at}: got {float(x[at])!r}, "
            f"expected {float(truth[at])!r}, error / budget {float(ratio[at]):.3g}{tail}"
        )


def assert_topk(
    indices: Tensor,
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
    exact: bool = False,
    repro: str = "",
) -> None:
    """Indices valid, unique, ascending, padded with -1, right in number, and the best up to rounding.

    ``exact`` is for inputs whose scores are exact in float32: then the set must be the lexicographic one.
    """
    tail = f"\n  repro: {repro}" if repro else ""
    shared = select_query is not None
    _, _, _, _, _, valid, source, delta = lift(
        query, key, axis, attn_mask, key_mask, query_mask, select_query, select_key, scale
    )
    B, H, Q, N = valid.shape
    heads = 1 if shared else H
    rows, width = (Q, N) if axis == "keys" else (N, Q)
    assert indices.dtype == torch.int32, f"indices: dtype {indices.dtype}, expected torch.int32{tail}"
    expected = (B, heads, rows, topk)
    assert indices.shape == expected, f"indices: shape {tuple(indices.shape)}, expected {expected}{tail}"
    idx = indices.long()
    assert ((idx >= -1) & (idx < width)).all(), f"indices: outside -1..{width - 1}{tail}"
    ordered = torch.where(idx < 0, width, idx)
    step = ordered[..., 1:] - ordered[..., :-1]
    assert ((step > 0) | (ordered[..., 1:] == width)).all(), f"indices: not ascending and unique, -1 last{tail}"
    chosen = pairs_from_indices(idx, Q, N, heads, axis)
    valid, source, delta = valid[:, :heads], source[:, :heads], delta[:, :heads]
    if axis == "queries":
        chosen, valid, source, delta = chosen.mT, valid.mT, source.mT, delta.mT
    assert not (chosen & ~valid).any(), f"indices: a masked pair was chosen{tail}"
    count = valid.sum(-1).clamp_max(topk)
    assert (chosen.sum(-1) == count).all(), f"indices: wrong number kept in a row{tail}"
    if exact:
        assert (chosen == best(source, valid, topk)).all(), f"indices: not the lexicographic top-{topk}{tail}"
    number = valid & ~source.isnan()
    if topk < source.shape[-1] and source.numel():
        kth = torch.where(number, source, -INF).topk(topk).values[..., -1:]  # -inf: fewer than topk numbers
        slack = 2 * row_max(torch.where(number, delta, 0.0))[..., None]
        late = chosen & ((source < kth - slack) | (source.isnan() & (kth > -INF)))
        assert not late.any(), f"indices: a chosen score lies below the k-th best{tail}"


@dataclass
class Tally:
    """Errors of a whole sweep in units of u * (spread + |value|), beside those of same-precision eager PyTorch."""

    dtype: torch.dtype
    worst: dict[str, list[float]] = field(default_factory=dict)
    square: dict[str, list[float]] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    zeros: list[float] = field(default_factory=list)  # share of zeros in each case's output

    def add(self, truth: Truth, got: dict[str, Tensor], rival: dict[str, Tensor]) -> None:
        for name, value in truth.values.items():
            finite = value.isfinite()
            if name not in got or not finite.any():
                continue
            unit = truth.budget(name, self.dtype, 1)[finite]
            worst, square = self.worst.setdefault(name, [0.0, 0.0]), self.square.setdefault(name, [0.0, 0.0])
            self.count[name] = self.count.get(name, 0) + unit.numel()
            for i, x in enumerate((got[name], rival[name])):
                ratio = (x.double()[finite] - value[finite]).abs() / unit
                worst[i] = max(worst[i], float(ratio.max()))
                square[i] += float(ratio.square().sum())
            if name == "out":
                self.zeros.append(float((value == 0).double().mean()))

    def assert_no_worse(self, repro: str = "") -> None:
        """Max error at most 2x eager's (float32) or 1x (half types); RMS 1.1x or 1x, of float32 gradients 2x."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        most = 1.0 if half else 2.0
        zeros = sum(self.zeros) / max(1, len(self.zeros))
        assert self.zeros and zeros < 0.5, f"mistrusted: {zeros:.0%} of the outputs are zero"
        for name, (ours, theirs) in self.worst.items():
            assert ours <= most * theirs, f"{name}: max error {ours:.3f}, eager {theirs:.3f}, allowed {most}x {repro}"
            a, b = (math.sqrt(s / self.count[name]) for s in self.square[name])
            rms = most if half or name not in ("out", "lse") else 1.1
            assert a <= rms * b, f"{name}: RMS error {a:.4f}, eager {b:.4f}, allowed {rms}x {repro}"
