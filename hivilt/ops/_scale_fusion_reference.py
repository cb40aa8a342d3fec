"""The reference row of family B: the specification, and its gradients by autograd in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.scale_fusion import finish, project, weight_dtype
from ..reference.scale_fusion import interpolate_tokens as interpolate_one
from ..reference.scale_fusion import scale_fusion as fuse
from ._scale_fusion_schema import parts


def scale_fusion(features, weight, bias, norm_weight, norm_bias, seed, grids, out_grid, norm, eps, activation,
                 dropout_p, mode, align_corners, prefix_tokens, impl, save):  # fmt: skip
    def run(**settings):
        return fuse(
            features, weight, bias, grids=parts(grids, len(out_grid)), out_grid=out_grid, mode=mode,
            align_corners=align_corners, prefix_tokens=prefix_tokens, **settings,
        )  # fmt: skip

    out = run(norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, activation=activation,
              dropout_p=dropout_p, seed=seed)  # fmt: skip
    return out, run(norm="none", activation="none") if save else features[0].new_empty(0)


def scale_fusion_backward(grad_out, features, weight, norm_weight, norm_bias, linear, seed, grids, out_grid, norm, eps,
                          activation, dropout_p, mode, align_corners, prefix_tokens, impl, features_grad,
                          parameters_grad):  # fmt: skip
    """Everything once more in float64; forward's ``linear`` stands in for the bias and for its own rounding."""
    dtype = features[0].dtype
    with torch.enable_grad():
        wide = [x.detach().double().requires_grad_() for x in features]
        w = weight.detach().double().requires_grad_()
        a, b = (None if t is None else t.detach().double().requires_grad_() for t in (norm_weight, norm_bias))
        # A table in fp32 for fp32 tokens, whatever the precision of the sums.
        y = project(wide, w, parts(grids, len(out_grid)), out_grid, mode, align_corners, prefix_tokens,
                         weight_dtype(dtype))  # fmt: skip
        shift = linear.double() - y.detach() if linear.dim() == 3 else torch.zeros_like(y)
        shift.requires_grad_()
        out = finish(y + shift, norm, a, b, eps, activation, dropout_p, seed)
    wanted = [*(wide if features_grad else []), *([w, shift, a, b] if parameters_grad else [])]
    present = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(out, present, grad_out.double(), allow_unused=True) if present else ())
    grads = [None if t is None else next(found) for t in wanted]

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if like is None:
            return weight.new_empty(0)
        return torch.zeros_like(like) if grad is None else grad.to(like.dtype)

    empties = [x.new_empty(0) for x in features]
    of_features = [cast(g, x) for g, x in zip(grads, features, strict=False)] if features_grad else empties
    if not parameters_grad:
        return of_features, *(weight.new_empty(0) for _ in range(4))
    g_w, g_shift, g_a, g_b = grads[-4:]
    g_bias = (torch.zeros_like(shift) if g_shift is None else g_shift).sum((0, 1))
    return of_features, cast(g_w, weight), g_bias.to(weight.dtype), cast(g_a, norm_weight), cast(g_b, norm_bias)


def interpolate_tokens(x, base, scale, factor, grid, out_grid, rank, mode, align_corners, transposed):
    out = _transposed(x, grid, out_grid, rank, mode, align_corners) if transposed else _interpolated(
        x.double(), x.dtype, grid, out_grid, rank, mode, align_corners)  # fmt: skip
    out = factor * out if scale is None else factor * scale.double() * out
    return (out if base is None else base.double() + out).to(x.dtype)


def interpolate_tokens_dot(grad, x, factor, grid, out_grid, rank, mode, align_corners):
    fine = _interpolated(x.double(), x.dtype, grid, out_grid, rank, mode, align_corners)
    return (factor * (grad.double() * fine).sum()).to(weight_dtype(x.dtype))


def _interpolated(x: Tensor, dtype: torch.dtype, grid, out_grid, rank, mode, align_corners) -> Tensor:
    """U x in float64, with the tables that tokens of ``dtype`` get."""
    pairs = list(zip(parts(grid, rank), parts(out_grid, rank), strict=True))
    pieces = x.split([torch.Size(a).numel() for a, _ in pairs], 1)
    fine = [
        interpolate_one(piece, a, b, mode=mode, align_corners=align_corners, precision=weight_dtype(dtype))
        for piece, (a, b) in zip(pieces, pairs, strict=True)
    ]
    return torch.cat(fine, 1)


def _transposed(y: Tensor, grid, out_grid, rank, mode, align_corners) -> Tensor:
    """U^T y in float64: the gradient of <U x, y> with respect to x."""
    count = sum(torch.Size(a).numel() for a in parts(grid, rank))
    with torch.enable_grad():
        x = torch.zeros(y.shape[0], count, y.shape[2], dtype=torch.float64, device=y.device, requires_grad=True)
        fine = _interpolated(x, y.dtype, grid, out_grid, rank, mode, align_corners)
    return torch.autograd.grad(fine, x, y.double())[0]
