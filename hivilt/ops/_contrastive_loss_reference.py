"""The reference row of family D: the specification in slices of images, in float64, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.contrastive_loss import best_dots

SLICE = 1 << 24  # dot products at a time


def _slices(x: Tensor, y: Tensor):
    step = max(1, SLICE // max(1, x.shape[1] * y.shape[0]))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def _numbers(scale, factor, bias, offset) -> tuple[float | Tensor, float | Tensor]:
    """The scale and the bias as the operator means them."""
    return factor if scale is None else factor * scale.double(), offset if bias is None else offset + bias.double()


def _own(labels: Tensor | None, x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) if labels is None else labels


def _log_sum(s: Tensor, dim: int) -> Tensor:
    """NaN where a logit is infinite, as the softmax of cross_entropy has it; torch.logsumexp gives infinity."""
    top = s.amax(dim, keepdim=True)
    base = torch.where(top == float("-inf"), 0.0, top)
    return (base + (s - base).exp().sum(dim, keepdim=True).log()).squeeze(dim)


def contrastive_loss(x, y, scale, factor, bias, offset, labels, columns, kind):
    a, b = _numbers(scale, factor, bias, offset)
    own, wide = _own(labels, x), y.double()
    row_lse = x.new_empty(x.shape[0], dtype=torch.float64)
    target = x.new_empty(0 if kind == "siglip" else x.shape[0], dtype=torch.float64)
    column_lse = x.new_full((y.shape[0] if columns else 0,), float("-inf"), dtype=torch.float64)
    for rows in _slices(x, y):
        s = a * best_dots(x[rows].double(), wide)[0] + b
        at = own[rows, None]
        if kind == "siglip":
            # Not softplus, which drops log1p(exp(-20)) and less: float64 has digits for them.
            row_lse[rows] = -torch.nn.functional.logsigmoid((-s).scatter(1, at, s.gather(1, at))).sum(1)
            continue
        row_lse[rows], target[rows] = _log_sum(s, 1), s.gather(1, at)[:, 0]
        if columns:
            column_lse = torch.logaddexp(column_lse, _log_sum(s, 0))
    return row_lse, column_lse, target


def contrastive_loss_backward(x, y, scale, factor, bias, offset, labels, kind, row_lse, column_lse, grad_rows,
                              grad_columns, grad_target, x_grad, y_grad):  # fmt: skip
    a, b = _numbers(scale, factor, bias, offset)
    own, wide = _own(labels, x), y.double()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else x.new_empty(0)
    of_y = torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    of_scale, of_bias = wide.new_zeros(()), wide.new_zeros(())
    for rows in _slices(x, y):
        images = x[rows].double()
        dots, which = best_dots(images, wide)
        s, at = a * dots + b, own[rows, None]
        d = torch.zeros_like(s)
        if kind == "siglip":
            if grad_rows is not None:
                sign = torch.ones_like(s).scatter(1, at, -1.0)
                d = grad_rows[rows, None] * sign * torch.sigmoid(sign * s)
        else:
            if grad_rows is not None:
                d = d + grad_rows[rows, None] * (s - row_lse[rows, None]).exp()
            if grad_columns is not None:
                d = d + grad_columns * (s - column_lse).exp()
            if grad_target is not None:
                d = d.scatter_add(1, at, grad_target[rows, None])
        of_scale, of_bias = of_scale + (d * dots).sum(), of_bias + d.sum()
        spread = torch.zeros(images.shape[0], x.shape[1], y.shape[0], dtype=torch.float64, device=x.device)
        spread.scatter_(1, which[:, None], (a * d)[:, None])
        if x_grad:
            grad_x[rows] = (spread @ wide).to(x.dtype)
        of_y += torch.einsum("irj,irc->jc", spread, images)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        grad_x,
        of_y.to(y.dtype) if y_grad else y.new_empty(0),
        x.new_empty(0, dtype=dtype) if scale is None else (factor * of_scale).to(dtype),
        x.new_empty(0, dtype=dtype) if bias is None else of_bias.to(dtype),
    )
