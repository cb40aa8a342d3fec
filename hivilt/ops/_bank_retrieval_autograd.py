"""Gradients of family C.  The selection is a constant; backward works on the kept rows as they were in forward."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .._backends import Row
from ._bank_retrieval_rows import BACKWARD, BANK_RETRIEVAL
from ._running import differentiable_once, run

BackwardOnce = differentiable_once(BACKWARD, "hivilt.reference.bank_retrieval")


class BankRetrieval(Function):
    """(operator arguments, backend) -> retrieved, scores, indices, key_rows, value_rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(BANK_RETRIEVAL, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, keys, values, _, scale, ctx.factor, *_, backend = inputs
        _, scores, indices, key_rows, value_rows = output
        ctx.backend = backend.name if isinstance(backend, Row) else backend  # of forward; backward has rows of its own
        ctx.bank_size = keys.shape[0]
        ctx.mark_non_differentiable(indices, key_rows, value_rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key_rows, None if values is None else value_rows, scores, indices, scale)

    @staticmethod
    def backward(ctx, grad_retrieved, grad_scores, *_):
        needs = ctx.needs_input_grad
        if grad_retrieved is None and grad_scores is None:
            return (None,) * len(needs)
        query, key_rows, value_rows, scores, indices, scale = ctx.saved_tensors
        args = (query, grad_retrieved, grad_scores, key_rows, value_rows, scores, indices, scale, ctx.factor,
                ctx.bank_size, needs[1] or needs[2])  # fmt: skip
        if torch.is_grad_enabled():  # under create_graph a second backward must fail loudly, not silently
            grads = BackwardOnce.apply(*args, ctx.backend)
        else:
            grads = run(BACKWARD, ctx.backend, args)
        of_query, of_keys, of_values, of_scale = grads
        found = (of_query, of_keys, of_values, None, of_scale)
        return *(g if need else None for g, need in zip(found, needs, strict=False)), *(None,) * (len(needs) - 5)
