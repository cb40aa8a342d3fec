"""Multi-scale interpolate-and-concat fusion, the meaning of it: out = dropout(act(norm(sum_s U_s f_s W_s^T + b))).

f_s [B, P + prod(grid_s), C_s] are the tokens of scale s in raster order behind P prefix tokens, U_s interpolates its
grid to the output's (prefix tokens stay as they are), and [W_0 | W_1 | ...] are the columns of one Linear's weight: the
fusion layer of a multi-scale model and the decode head of SegFormer (arXiv 2105.15203, 3.2).  Positions and weights of
U are those of torch.nn.functional.interpolate, computed in fp32 (fp64 for fp64); a weight of 0 reads nothing, so NaN
stays where it is.  Sums run in float64 and results are rounded once.  Written for reading: the upsampled and the
concatenated tensors live here.  Derivations: docs/scale_fusion.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import counts, philox

Grid = Sequence[int]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}


def scale_fusion(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grids: Sequence[Grid],
    out_grid: Grid | None = None,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    mode: str = "linear",
    align_corners: bool = False,
    prefix_tokens: int = 0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Interpolate, concatenate, project, normalise, activate, drop.

    Args:
        features: S tensors [B, P + prod(grids[s]), C_s]; one with prod(grids[s]) tokens has no prefix and adds nothing
            there.
        weight: [O, sum C_s]; bias: [O].
        grids: S grids of 1, 2 or 3 sizes; out_grid: grids[0] by default.
        norm: "layer" (LayerNorm over O), "affine" (norm_weight y + norm_bias per channel) or "none".
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "none".
        mode: "linear", "nearest" or "area".
        seed: of the dropout mask; needed where dropout_p > 0.

    Returns:
        [B, P + prod(out_grid), O] in the features' dtype.
    """
    dtype = features[0].dtype
    out_grid = grids[0] if out_grid is None else out_grid
    y = project(features, weight, grids, out_grid, mode, align_corners, prefix_tokens, weight_dtype(dtype))
    y = y if bias is None else y + bias.double()
    return finish(y, norm, norm_weight, norm_bias, eps, activation, dropout_p, seed).to(dtype)


def project(features, weight, grids, out_grid, mode, align_corners, prefix_tokens, precision) -> Tensor:
    """concat_s(U_s f_s) W^T in float64; U_s in ``precision``."""
    aligned = []
    for x, grid in zip(features, grids, strict=True):
        prefix = prefix_tokens if x.shape[1] == prefix_tokens + torch.Size(grid).numel() else 0
        fine = interpolate_tokens(
            x.double(), grid, out_grid, mode=mode, align_corners=align_corners, prefix_tokens=prefix,
            precision=precision,
        )  # fmt: skip
        aligned.append(F.pad(fine, (0, 0, prefix_tokens - prefix, 0)))
    return F.linear(torch.cat(aligned, -1), weight.double())


def finish(y, norm, norm_weight, norm_bias, eps, activation, dropout_p, seed) -> Tensor:
    """dropout(act(norm(y)))."""
    a, b = (None if t is None else t.double() for t in (norm_weight, norm_bias))
    if norm == "layer":
        y = F.layer_norm(y, y.shape[-1:], a, b, eps)
    elif norm == "affine":
        y = y * a + b
    y = ACTIVATIONS[activation](y)
    if dropout_p > 0.0:
        kept = 65536 - dropout_threshold(dropout_p)
        y = torch.where(channel_dropout_keep(seed, dropout_p, y.shape, y.device), y * (65536 / max(1, kept)), 0.0)
    return y


def interpolate_tokens(
    x: Tensor,
    grid: Grid,
    out_grid: Grid,
    *,
    mode: str = "linear",
    align_corners: bool = False,
    prefix_tokens: int = 0,
    precision: torch.dtype | None = None,
) -> Tensor:
    """U x: [B, P + prod(grid), C] to [B, P + prod(out_grid), C], the first P tokens as they are."""
    precision = weight_dtype(x.dtype) if precision is None else precision
    prefix, y = x[:, :prefix_tokens].double(), x[:, prefix_tokens:].double().unflatten(1, tuple(grid))
    for axis, (size, out_size) in enumerate(zip(grid, out_grid, strict=True), 1):
        index, weight = axis_taps(size, out_size, mode, align_corners, precision, x.device)
        shape = [-1 if dim == axis else 1 for dim in range(y.dim())]
        total = 0.0
        for i, w in zip(index.unbind(1), weight.double().unbind(1), strict=True):
            w = w.view(shape)
            total = total + torch.where(w == 0.0, 0.0, w * y.index_select(axis, i))
        y = total
    return torch.cat([prefix, y.flatten(1, len(grid))], 1).to(x.dtype)


def interpolate_add(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    grid: Grid | None = None,
    out_grid: Grid | None = None,
    segments: Sequence[tuple[int, int]] | None = None,
    mode: str = "linear",
    align_corners: bool = False,
) -> Tensor:
    """x + scale U y, x [B, N, C], y [B, n, C]; segments ((n1, N1), ...): each part of y goes to its part of x."""
    if segments is not None:
        parts = y.double().split([n for n, _ in segments], 1)
        fine = [
            interpolate_tokens(part, (n,), (N,), mode=mode, align_corners=align_corners,
                               precision=weight_dtype(x.dtype))
            for part, (n, N) in zip(parts, segments, strict=True)
        ]  # fmt: skip
        fine = torch.cat(fine, 1)
    else:
        fine = interpolate_tokens(
            y.double(), (y.shape[1],) if grid is None else grid, (x.shape[1],) if out_grid is None else out_grid,
            mode=mode, align_corners=align_corners, precision=weight_dtype(x.dtype),
        )  # fmt: skip
    scale = scale.double().reshape(()) if isinstance(scale, Tensor) else scale
    return (x.double() + scale * fine).to(x.dtype)


# Positions and weights along one axis.


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of interpolation weights for tokens of ``dtype``, as in torch."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def axis_taps(
    size: int,
    out_size: int,
    mode: str,
    align_corners: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Which inputs an output reads along an axis, and how much of each: index [out_size, T], weight [out_size, T].

    linear: x = max(0, (o + 1/2) in/out - 1/2), with align_corners x = o (in - 1)/(out - 1); the inputs are i = floor(x)
    and i + 1 (the last twice at the end), their weights 1 - (x - i) and x - i.  nearest: floor(o in/out).
    area: the mean over floor(o in/out) ... ceil((o + 1) in/out) - 1, as in adaptive_avg_pool.
    """
    o = torch.arange(out_size, device=device)
    if size == out_size:
        return o[:, None], torch.ones(out_size, 1, dtype=dtype, device=device)
    if mode == "area":
        start, end = o * size // out_size, ((o + 1) * size + out_size - 1) // out_size
        taps = torch.arange(int((end - start).max()), device=device)
        count = (end - start)[:, None]
        inside = taps < count
        return torch.where(inside, start[:, None] + taps, start[:, None]), inside.to(dtype) / count
    if mode == "nearest":
        ratio = torch.tensor(size / out_size, dtype=dtype, device=device)
        return (o * ratio).floor().long().clamp(max=size - 1)[:, None], torch.ones(
            out_size, 1, dtype=dtype, device=device
        )
    if align_corners:
        ratio = torch.tensor((size - 1) / (out_size - 1) if out_size > 1 else 0.0, dtype=dtype, device=device)
        x = o * ratio
    else:
        ratio = torch.tensor(size / out_size, dtype=dtype, device=device)
        x = ((o.to(dtype) + 0.5) * ratio - 0.5).clamp(min=0.0)
    i = x.long().clamp(max=size - 1)
    part = (x - i).clamp(0.0, 1.0)
    return torch.stack([i, (i + 1).clamp(max=size - 1)], 1), torch.stack([1.0 - part, part], 1)


# Dropout.


def dropout_threshold(dropout_p: float) -> int:
    """The drop probability in steps of 2^-16."""
    return round(dropout_p * 65536)


def channel_dropout_keep(
    seed: Tensor | int, dropout_p: float, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Bool [B, N, O]: the elements that stay.

    Key: the two halves of ``seed``.  Counter: (c >> 3, n, 0, b); channel c takes word (c & 7) >> 1 of it, the low 16
    bits when c is even and the high 16 when it is odd, and stays when they are at least ``dropout_threshold``.
    """
    B, N, width = shape
    c = [
        counts((width + 7) // 8, 2, 3, device=device),
        counts(N, 1, 3, device=device),
        0,
        counts(B, 0, 3, device=device),
    ]
    words = philox(c, seed.to(device) if isinstance(seed, Tensor) else seed)
    words = torch.stack([w.expand(B, N, (width + 7) // 8) for w in words], -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(2)[..., :width]
    return halves >= dropout_threshold(dropout_p)
