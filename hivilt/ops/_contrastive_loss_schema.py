"""Operators of family D as torch sees them: schemas, fakes, flop formulas.

x is [B, R, C].  Of "infonce" rows [B] and columns [N] are the log-sum-exps of the logits and target [B] the image's own
logit; of "siglip" rows are the losses of the images.  All are float64, so that the difference of two large logits keeps
its digits.  What is not asked for has the shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "contrastive_loss": (
        "Tensor x, Tensor y, Tensor? scale, float factor, Tensor? bias, float offset, Tensor? labels, bool columns, "
        "str kind",
        "(Tensor row_lse, Tensor column_lse, Tensor target)",
    ),
    "contrastive_loss_backward": (
        "Tensor x, Tensor y, Tensor? scale, float factor, Tensor? bias, float offset, Tensor? labels, str kind, "
        "Tensor row_lse, Tensor column_lse, Tensor? grad_rows, Tensor? grad_columns, Tensor? grad_target, "
        "bool x_grad, bool y_grad",
        "(Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    ),
}


def _fake(x, y, scale, factor, bias, offset, labels, columns, kind):
    def wide(size) -> Tensor:
        return x.new_empty(size, dtype=torch.float64)

    return wide(x.shape[0]), wide(y.shape[0] if columns else 0), wide(0 if kind == "siglip" else x.shape[0])


def _fake_backward(x, y, scale, factor, bias, offset, labels, kind, row_lse, column_lse, grad_rows, grad_columns,
                   grad_target, x_grad, y_grad):  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty((0,) if t is None else (), dtype=dtype)

    return (
        x.new_empty(x.shape if x_grad else (0,)),
        y.new_empty(y.shape if y_grad else (0,)),
        like(scale),
        like(bias),
    )


FAKES = {"contrastive_loss": _fake, "contrastive_loss_backward": _fake_backward}


def _flops(x, y, *rest, out_shape=None, **_) -> int:
    B, R, C = x
    return 2 * B * R * y[0] * C


def _flops_backward(x, y, *rest, out_shape=None, **_) -> int:
    """The logits again, and one product for each side's gradient."""
    grads = [flag for flag in rest if isinstance(flag, bool)][-2:]
    return (1 + sum(grads)) * _flops(x, y)


FLOPS = {"contrastive_loss": _flops, "contrastive_loss_backward": _flops_backward}
