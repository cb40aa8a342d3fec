"""Multi-scale interpolate-and-concat fusion: out = dropout(act(norm(sum_s U_s f_s W_s^T + b))).

The public functions ``scale_fusion``, ``interpolate_tokens`` and ``interpolate_add``: they check, fill in defaults and
call.  Meaning: hivilt/reference/scale_fusion.py; why: docs/scale_fusion.md.  Neither an upsampled nor a concatenated
tensor is ever in memory, forward or backward; the backward gathers, so it gives the same bits every time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._checks import (
    INT32_MAX,
    Said,
    autocast,
    check_flag,
    check_index,
    check_number,
    check_tensor,
    check_vector,
    refuse,
)
from ._running import draw_seed, eager, record, records, run
from ._scale_fusion_autograd import ScaleFusion, interpolate
from ._scale_fusion_rows import INTERPOLATE, SCALE_FUSION

NORMS = ("layer", "affine", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "none")
MODES = ("linear", "nearest", "area")
IMPLS = ("auto", "prologue", "epilogue", "reference")
Grid = Sequence[int]


def scale_fusion(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grids: Sequence[Grid] | None = None,
    out_grid: Grid | None = None,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    mode: str = "linear",
    align_corners: bool = False,
    prefix_tokens: int = 0,
    impl: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Brings the tokens of several scales to one grid, concatenates and projects them: one fused operation.

    Args:
        features: S tensors, float32, bfloat16, float16 or float64 [B, P + prod(grids[s]), C_s], any strides.  A scale
            with prod(grids[s]) tokens has no prefix and adds nothing to the prefix tokens.
        weight: same dtype [O, C_0 + ... + C_(S-1)], one Linear's; bias: [O].
        grids: S tuples of 1, 2 or 3 sizes (sequence, image, video).  Left out (with prefix_tokens = 0), every scale is
            a square image; where a wider image would fit all scales too, this is said once.
        out_grid: the output's grid, grids[0] by default; any scale may be finer or coarser.
        norm: "layer" (over O; norm_weight and norm_bias optional), "affine" (norm_weight y + norm_bias, a BatchNorm in
            eval mode) or "none".  norm_weight, norm_bias: [O], float32 or weight's dtype.
        eps: of the layer norm.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "none".
        dropout_p: applied when ``training``; in steps of 2^-16, kept elements scaled by the reciprocal of the exact
            keep probability.
        mode, align_corners: as in torch.nn.functional.interpolate: "linear" (bi-, trilinear), "nearest" or "area".
        prefix_tokens: P class or register tokens before the grid, which no interpolation touches.
        impl: "prologue" interpolates what enters the projection, "epilogue" projects first and interpolates the result,
            "auto" takes the cheaper for each scale, "reference" is backend="reference".
        backend: "reference", "cpu", "triton", "cuda" or "auto"; None obeys use_backend and HIVILT_BACKEND.

    Returns:
        [B, P + prod(out_grid), O] in the features' dtype.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: 2 B O sum_s min(N_s, N) C_s flops for the projections, O(B N O) for all else.  Saved for backward: the inputs
    and one tensor like the output.  Second derivatives raise.
    """
    args, _ = _bind_scale_fusion(features, weight, bias, grids, out_grid, norm, norm_weight, norm_bias, eps, activation,
                                 dropout_p, training, mode, align_corners, prefix_tokens, impl, backend)  # fmt: skip
    if impl == "reference":
        backend = "reference"
    features, *rest = args
    if not records(*features, *rest[:4]):
        return run(SCALE_FUSION, backend, args)[0]
    rest[-1] = not (norm == "none" and activation == "none")
    chosen = _backends.choose(SCALE_FUSION, backend, (features, *rest)) if eager(features[0]) else backend or ""
    return record(ScaleFusion, (*rest, chosen, *features))[0]


def interpolate_tokens(
    x: Tensor,
    grid: Grid,
    out_grid: Grid,
    *,
    mode: str = "linear",
    align_corners: bool = False,
    prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.interpolate for tokens: no transpose, any batch size, deterministic backward.

    Args:
        x: float32, bfloat16, float16 or float64 [B, P + prod(grid), C], tokens of the grid in raster order.
        grid, out_grid: 1, 2 or 3 sizes.
        mode, align_corners, prefix_tokens: as in ``scale_fusion``.

    Returns:
        [B, P + prod(out_grid), C] in x's dtype.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: reads and writes each token a few times.  Differentiable to any order.
    """
    args, _ = _bind_interpolate_tokens(x, grid, out_grid, mode, align_corners, prefix_tokens, backend)
    return interpolate(_row(backend, args), *args)


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
    backend: str | None = None,
) -> Tensor:
    """x + scale U y: the step of a feature pyramid or of progressive fusion, in one pass.

    Args:
        x: float32, bfloat16, float16 or float64 [B, N, C]; y: same dtype [B, n, C].
        scale: a number, or a tensor of one element, which gets a gradient.
        grid, out_grid: of y and of x, 1, 2 or 3 sizes; left out, both are sequences, (n,) and (N,).
        segments: ((n_1, N_1), (n_2, N_2), ...) instead of grids: y and x are parts one behind the other, and each part
            is resized by itself, so that vision and text do not mix.
        mode, align_corners: as in ``scale_fusion``.

    Returns:
        [B, N, C] in x's dtype.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: one pass over x, y and the result.  Differentiable to any order.
    """
    args, _ = _bind_interpolate_add(x, y, scale, grid, out_grid, segments, mode, align_corners, backend)
    return interpolate(_row(backend, args), *args)


def _row(backend: str | None, args: tuple):
    """Backward asks for the backend that ran forward; a traced graph only knows what was asked for."""
    if eager(args[0]):
        return _backends.choose(INTERPOLATE, backend, args)
    return backend or ""


# From public arguments to those of an operator. Each returns (operator arguments, nothing else).


def _bind_scale_fusion(features, weight, bias=None, grids=None, out_grid=None, norm="layer", norm_weight=None,
                       norm_bias=None, eps=1e-5, activation="gelu", dropout_p=0.0, training=False, mode="linear",
                       align_corners=False, prefix_tokens=0, impl="auto", backend=None):  # fmt: skip
    op = "scale_fusion"
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        refuse(TypeError, op, "features", "a list or tuple of tensors (B, N_s, C_s)", features)
    if not features:
        refuse(ValueError, op, "features", "at least one tensor", Said("an empty list"))
    features = list(features)
    if torch._C._is_any_autocast_enabled():
        *features, weight, bias = autocast(*features, weight, bias)
    first = features[0]
    for s, x in enumerate(features):
        check_tensor(op, f"features[{s}]", x, 3, "(B, N_s, C_s)", None if s == 0 else first, "features[0]")
        if x.shape[0] != first.shape[0]:
            refuse(ValueError, op, f"features[{s}]", f"the batch of features[0], {first.shape[0]}", x)
    check_tensor(op, "weight", weight, 2, "(O, sum C_s)", first, "features[0]")
    O, C = weight.shape[0], sum(x.shape[2] for x in features)  # noqa: E741
    if weight.shape[1] != C or O == 0:
        refuse(ValueError, op, "weight", f"shape (O, {C}), O at least 1, to go with the features", weight)
    prefix_tokens = _check_count(op, "prefix_tokens", prefix_tokens, 0)
    grids, out_grid = _check_grids(op, features, grids, out_grid, prefix_tokens)
    for name, x, dtypes in (
        ("bias", bias, (first.dtype,)),
        ("norm_weight", norm_weight, (first.dtype, torch.float32)),
        ("norm_bias", norm_bias, (first.dtype, torch.float32)),
    ):
        if x is not None:
            check_vector(op, name, x, O, first, dtypes)
    _check_choice(op, "norm", norm, NORMS)
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is None and norm == "affine":
            refuse(ValueError, op, name, f"a tensor of shape ({O},), because norm='affine'", x)
        if x is not None and norm == "none":
            refuse(ValueError, op, name, "None, because norm='none'", x)
    if norm_weight is not None and norm_bias is not None and norm_weight.dtype != norm_bias.dtype:
        refuse(TypeError, op, "norm_bias", f"norm_weight's dtype {str(norm_weight.dtype)[6:]}", norm_bias)
    eps = check_number(op, "eps", eps, 0.0)
    _check_choice(op, "activation", activation, ACTIVATIONS)
    dropout_p = check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    check_flag(op, "training", training)
    _check_mode(op, mode, align_corners)
    _check_choice(op, "impl", impl, IMPLS)
    _backends.check_name(backend, f"{op}: backend")
    if impl == "reference" and backend not in (None, "auto", "reference"):
        refuse(ValueError, op, "impl", f"another implementation beside backend={backend!r}", impl)
    dropout_p = dropout_p if training and round(dropout_p * 65536) > 0 else 0.0
    seed = draw_seed(first) if dropout_p > 0.0 else None
    return (features, weight, bias, norm_weight, norm_bias, seed, [n for grid in grids for n in grid], list(out_grid),
            norm, eps, activation, dropout_p, mode, align_corners, prefix_tokens, impl, False), None  # fmt: skip


def _bind_interpolate_tokens(x, grid, out_grid, mode="linear", align_corners=False, prefix_tokens=0, backend=None):
    op = "interpolate_tokens"
    check_tensor(op, "x", x, 3, "(B, N, C)")
    prefix_tokens = _check_count(op, "prefix_tokens", prefix_tokens, 0)
    grid, out_grid = _check_grid(op, "grid", grid), _check_grid(op, "out_grid", out_grid)
    _check_same_rank(op, grid, out_grid)
    if x.shape[1] != prefix_tokens + prod(grid):
        refuse(ValueError, op, "x", f"{prefix_tokens} + {prod(grid)} tokens, prefix_tokens and grid {grid}", x)
    _check_mode(op, mode, align_corners)
    _backends.check_name(backend, f"{op}: backend")
    rank = len(grid)
    # Prefix tokens are a part that keeps its size.
    prefix = (*(1,) * (rank - 1), prefix_tokens) if prefix_tokens else ()
    return (x, None, None, 1.0, [*prefix, *grid], [*prefix, *out_grid], rank, mode, align_corners, False), None


def _bind_interpolate_add(x, y, scale=1.0, grid=None, out_grid=None, segments=None, mode="linear", align_corners=False,
                          backend=None):  # fmt: skip
    op = "interpolate_add"
    if torch._C._is_any_autocast_enabled() and isinstance(x, Tensor) and isinstance(y, Tensor):
        wide = torch.promote_types(x.dtype, y.dtype)  # as torch.add does under autocast
        x, y = x.to(wide), y.to(wide)
    check_tensor(op, "x", x, 3, "(B, N, C)")
    check_tensor(op, "y", y, 3, "(B, n, C)", x, "x")
    B, N, C = x.shape
    if (y.shape[0], y.shape[2]) != (B, C):
        refuse(ValueError, op, "y", f"shape ({B}, n, {C}) to go with x", y)
    n = y.shape[1]
    if segments is not None:
        if grid is not None or out_grid is not None:
            refuse(ValueError, op, "segments", "None, because a grid is given", Said("segments"))
        grid, out_grid = _check_segments(op, segments, n, N)
        rank = 1
    else:
        if (grid is None) != (out_grid is None):
            missing = "grid" if grid is None else "out_grid"
            refuse(ValueError, op, missing, "a grid, because the other one is given", None)
        grid = _check_grid(op, "grid", (n,) if grid is None else grid)
        out_grid = _check_grid(op, "out_grid", (N,) if out_grid is None else out_grid)
        _check_same_rank(op, grid, out_grid)
        rank = len(grid)
        for name, size, tokens, given in (("y", prod(grid), n, y), ("x", prod(out_grid), N, x)):
            if size != tokens:
                refuse(ValueError, op, name, f"{size} tokens, as many as its grid has", given)
    factor = 1.0
    if isinstance(scale, Tensor):
        dense = not scale.is_nested and scale.layout is torch.strided
        if not dense or scale.numel() != 1 or not scale.is_floating_point() or scale.device != x.device:
            refuse(ValueError, op, "scale", f"a number or a dense floating tensor of one element on {x.device}", scale)
        scale = scale.to(torch.float64 if x.dtype == torch.float64 else torch.float32).reshape(())
    else:
        factor, scale = check_number(op, "scale", scale), None
    _check_mode(op, mode, align_corners)
    _backends.check_name(backend, f"{op}: backend")
    return (y, x, scale, factor, list(grid), list(out_grid), rank, mode, align_corners, False), None


# Checks.


def _check_count(op: str, name: str, x: Any, low: int) -> int:
    x = check_index(op, name, x, f"an int of at least {low}")
    if x < low:
        refuse(ValueError, op, name, f"an int of at least {low}", x)
    return x


def _check_grid(op: str, name: str, grid: Any) -> tuple[int, ...]:
    if isinstance(grid, Tensor | str) or not isinstance(grid, Sequence):
        refuse(TypeError, op, name, "a tuple of 1, 2 or 3 sizes", grid)
    if not 1 <= len(grid) <= 3:
        refuse(ValueError, op, name, "1, 2 or 3 sizes", Said(f"{len(grid)}"))
    grid = tuple(_check_count(op, f"{name}[{i}]", n, 1) for i, n in enumerate(grid))
    tokens = prod(grid)
    if isinstance(tokens, int) and tokens > INT32_MAX:  # a traced size keeps its range
        refuse(ValueError, op, name, "fewer than 2^31 tokens in all", Said(f"{tokens}"))
    return grid


def _check_same_rank(op: str, grid: tuple, out_grid: tuple) -> None:
    if len(grid) != len(out_grid):
        refuse(ValueError, op, "out_grid", f"{len(grid)} sizes, as grid has", Said(f"{out_grid}"))


def _check_grids(op, features, grids, out_grid, prefix_tokens) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    given = grids is not None
    if not given:
        if prefix_tokens:
            refuse(ValueError, op, "grids", "a grid per scale, because prefix_tokens is not 0", None)
        grids = [_square(op, s, x) for s, x in enumerate(features)]
    if isinstance(grids, Tensor | str) or not isinstance(grids, Sequence):
        refuse(TypeError, op, "grids", "a list with one tuple of sizes per scale", grids)
    if len(grids) != len(features):
        refuse(ValueError, op, "grids", f"{len(features)} grids, one per scale", Said(f"{len(grids)}"))
    grids = [_check_grid(op, f"grids[{s}]", grid) for s, grid in enumerate(grids)]
    for s, (grid, x) in enumerate(zip(grids, features, strict=True)):
        if len(grid) != len(grids[0]):
            refuse(ValueError, op, f"grids[{s}]", f"{len(grids[0])} sizes, as grids[0] has", Said(f"{grid}"))
        size = prod(grid)
        if x.shape[1] != prefix_tokens + size and x.shape[1] != size:
            counts = f"{prefix_tokens} + {size}" if prefix_tokens else f"{size}"
            refuse(ValueError, op, f"features[{s}]", f"{counts} tokens, to go with grid {grid}", x)
    out_grid = grids[0] if out_grid is None else _check_grid(op, "out_grid", out_grid)
    if len(out_grid) != len(grids[0]):
        refuse(ValueError, op, "out_grid", f"{len(grids[0])} sizes, as the grids have", Said(f"{out_grid}"))
    if not given and any(grid != out_grid for grid in grids):
        _warn_if_ambiguous([grid[0] for grid in grids])
    return grids, out_grid


def _square(op: str, s: int, x: Tensor) -> tuple[int, int]:
    side = math.isqrt(int(x.shape[1]))
    if side == 0 or side * side != x.shape[1]:
        refuse(ValueError, op, f"features[{s}]", "a square number of tokens, because grids is None", x)
    return side, side


_warned: set[tuple[int, ...]] = set()


def _warn_if_ambiguous(sides: list[int]) -> None:
    """Says once that tokens taken as squares could be an image of another shape, the same at every scale."""
    least = min(sides)
    for height in range(least - 1, (least + 1) // 2, -1):  # wider than 1:1, narrower than 4:1
        if all(side * height % least == 0 and side * least % height == 0 for side in sides):
            break
    else:
        return
    if tuple(sides) not in _warned:
        _warned.add(tuple(sides))
        wide = [(side * height // least, side * least // height) for side in sides]
        warnings.warn(
            f"hivilt: scale_fusion takes scales of {[side * side for side in sides]} tokens as squares; grids of "
            f"{wide} would fit them too: pass grids=",
            UserWarning,
            stacklevel=5,
        )


def _check_segments(op: str, segments: Any, n: int, N: int) -> tuple[list[int], list[int]]:
    if isinstance(segments, Tensor | str) or not isinstance(segments, Sequence) or not segments:
        refuse(TypeError, op, "segments", "a list of pairs (n_i, N_i)", segments)
    for i, pair in enumerate(segments):
        if isinstance(pair, Tensor | str) or not isinstance(pair, Sequence) or len(pair) != 2:
            refuse(TypeError, op, f"segments[{i}]", "a pair (n_i, N_i)", pair)
    sizes = [[_check_count(op, f"segments[{i}][{j}]", p[j], 1) for i, p in enumerate(segments)] for j in (0, 1)]
    for side, total, name in zip(sizes, (n, N), ("y", "x"), strict=True):
        if sum(side) != total:
            refuse(ValueError, op, "segments", f"parts of {name} that add up to its {total} tokens", sum(side))
    return sizes[0], sizes[1]


def _check_choice(op: str, name: str, x: Any, legal: tuple[str, ...]) -> None:
    expected = f"one of {', '.join(map(repr, legal))}"
    if not isinstance(x, str):
        refuse(TypeError, op, name, expected, x)
    if x not in legal:
        refuse(ValueError, op, name, expected, x)


def _check_mode(op: str, mode: Any, align_corners: Any) -> None:
    _check_choice(op, "mode", mode, MODES)
    check_flag(op, "align_corners", align_corners)
    if align_corners and mode != "linear":
        refuse(ValueError, op, "align_corners", f"False, because mode is {mode!r}", align_corners)


_backends.explainable(SCALE_FUSION, scale_fusion, _bind_scale_fusion)
_backends.explainable(INTERPOLATE, interpolate_tokens, _bind_interpolate_tokens)
_backends.explainable(INTERPOLATE, interpolate_add, _bind_interpolate_add)
