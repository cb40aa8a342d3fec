"""Gradients of family D, from the row and column log-sum-exps: backward computes the logits again."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .._backends import Row
from ._contrastive_loss_rows import BACKWARD, CONTRASTIVE_LOSS
from ._running import differentiable_once, run

BackwardOnce = differentiable_once(BACKWARD, "hivilt.reference.contrastive_loss")


class ContrastiveLoss(Function):
    """(operator arguments, backend) -> row_lse, column_lse, target."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(CONTRASTIVE_LOSS, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, scale, ctx.factor, bias, ctx.offset, labels, ctx.columns, ctx.kind, backend = inputs
        ctx.backend = backend.name if isinstance(backend, Row) else backend  # of forward; backward has rows of its own
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, scale, bias, labels, *output[:2])

    @staticmethod
    def backward(ctx, of_rows, of_columns, of_target):
        needs = ctx.needs_input_grad
        # A compiled graph passes zeros for what nobody used, empty ones for what is not there.
        grads = (of_rows, of_columns if ctx.columns else None, of_target if ctx.kind == "infonce" else None)
        if all(g is None for g in grads):
            return (None,) * len(needs)
        x, y, scale, bias, labels, row_lse, column_lse = ctx.saved_tensors
        args = (x, y, scale, ctx.factor, bias, ctx.offset, labels, ctx.kind, row_lse, column_lse, *grads, needs[0],
                needs[1])  # fmt: skip
        if torch.is_grad_enabled():  # under create_graph a second backward must fail loudly, not silently
            found = BackwardOnce.apply(*args, ctx.backend)
        else:
            found = run(BACKWARD, ctx.backend, args)
        of_x, of_y, of_scale, of_bias = found
        named = (of_x, of_y, of_scale, None, of_bias)
        return *(g if need else None for g, need in zip(named, needs, strict=False)), *(None,) * (len(needs) - 5)
