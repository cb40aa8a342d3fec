"""Operators of family B as torch sees them: schemas, fakes, flop formulas.

``hivilt::<name>`` chooses its backend when it runs, ``hivilt::<name>_cpu`` is the C++ implementation.  Grids travel as
flat lists: ``grids`` holds as many sizes per scale as ``out_grid`` has.  Tensors nobody asked for have the shape (0,).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_FUSION = (
    "Tensor? seed, int[] grids, int[] out_grid, str norm, float eps, str activation, float dropout_p, str mode, "
    "bool align_corners, int prefix_tokens, str impl"
)
_RESIZE = "int[] grid, int[] out_grid, int rank, str mode, bool align_corners"
SCHEMAS = {
    # linear: what norm was applied to, for backward, when save is set.
    "scale_fusion": (
        f"Tensor[] features, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, {_FUSION}, bool save",
        "(Tensor out, Tensor linear)",
    ),
    "scale_fusion_backward": (
        "Tensor grad_out, Tensor[] features, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor linear, "
        f"{_FUSION}, bool features_grad, bool parameters_grad",
        "(Tensor[] grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_norm_weight, "
        "Tensor grad_norm_bias)",
    ),
    # base + factor * scale * U x, or U^T x when transposed. grid and out_grid list parts of `rank` sizes, one behind
    # the other along the tokens; each part is interpolated by itself.
    "interpolate_tokens": (
        f"Tensor x, Tensor? base, Tensor? scale, float factor, {_RESIZE}, bool transposed",
        "Tensor",
    ),
    # factor * sum(grad * U x), the gradient of scale, in float32 (float64 for float64).
    "interpolate_tokens_dot": (f"Tensor grad, Tensor x, float factor, {_RESIZE}", "Tensor"),
}


def parts(sizes: list[int], rank: int) -> list[tuple[int, ...]]:
    """A flat list of grids, cut."""
    return [tuple(sizes[i : i + rank]) for i in range(0, len(sizes), rank)]


def tokens(sizes: list[int], rank: int) -> int:
    return sum(prod(part) for part in parts(sizes, rank))


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _fake_fusion(features, weight, bias, norm_weight, norm_bias, seed, grids, out_grid, *rest):
    x = features[0]
    prefix_tokens, save = rest[6], rest[8]
    shape = (x.shape[0], prefix_tokens + prod(out_grid), weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if save else _empty(x)


def _fake_fusion_backward(grad_out, features, weight, norm_weight, norm_bias, linear, *rest):
    features_grad, parameters_grad = rest[-2:]
    O = weight.shape[0]  # noqa: E741
    grads = [x.new_empty(x.shape) if features_grad else _empty(x) for x in features]
    if not parameters_grad:
        return grads, *(_empty(weight) for _ in range(4))
    norms = [_empty(weight) if t is None else t.new_empty(O) for t in (norm_weight, norm_bias)]
    return grads, weight.new_empty(weight.shape), weight.new_empty(O), *norms


def _fake_interpolate(x, base, scale, factor, grid, out_grid, rank, mode, align_corners, transposed):
    return x.new_empty(x.shape[0], tokens(grid if transposed else out_grid, rank), x.shape[2])


def _fake_dot(grad, x, *rest):
    return x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


FAKES = {
    "scale_fusion": _fake_fusion,
    "scale_fusion_backward": _fake_fusion_backward,
    "interpolate_tokens": _fake_interpolate,
    "interpolate_tokens_dot": _fake_dot,
}


# Flops of the matrix products, as a multiply and an add per product, each scale projected where it has fewer tokens.


def _products(features, weight, out_grid, prefix_tokens: int) -> int:
    rows = prefix_tokens + prod(out_grid)
    return sum(2 * B * min(N, rows) * C * weight[0] for B, N, C in features)


def _flops_fusion(features, weight, bias, norm_weight, norm_bias, seed, grids, out_grid, *rest, out_shape=None, **_):
    return _products(features, weight, out_grid, rest[6])


def _flops_backward(grad_out, features, weight, norm_weight, norm_bias, linear, seed, grids, out_grid, *rest,
                    out_shape=None, **_):  # fmt: skip
    prefix_tokens, features_grad, parameters_grad = rest[6], rest[8], rest[9]
    return _products(features, weight, out_grid, prefix_tokens) * (features_grad + parameters_grad)


FLOPS = {"scale_fusion": _flops_fusion, "scale_fusion_backward": _flops_backward}
