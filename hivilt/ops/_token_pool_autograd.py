"""Gradients of token_pool: from the attention weights and the place of each maximum, which forward saved."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .._backends import Row
from ._running import differentiable_once, run
from ._token_pool_rows import BACKWARD, TOKEN_POOL

BackwardOnce = differentiable_once(BACKWARD, "hivilt.reference.token_pool")


class TokenPool(Function):
    """(operator arguments, backend) -> out, pooled, first, attention."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(TOKEN_POOL, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, proj_weight, proj_bias, score_weight, _, pool_weights, mask, ctx.pools, backend = inputs
        ctx.backend = backend.name if isinstance(backend, Row) else backend  # of forward; backward has rows of its own
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, proj_weight, proj_bias, score_weight, pool_weights, mask, *output[1:])

    @staticmethod
    def backward(ctx, grad_out, *_):
        needs = ctx.needs_input_grad
        if grad_out is None:
            return (None,) * len(needs)
        args = (grad_out, *ctx.saved_tensors, ctx.pools)
        if torch.is_grad_enabled():  # under create_graph a second backward must fail loudly, not silently
            grads = BackwardOnce.apply(*args, ctx.backend)
        else:
            grads = run(BACKWARD, ctx.backend, args)
        return *(g if need else None for g, need in zip(grads, needs[:6], strict=True)), None, None, None
