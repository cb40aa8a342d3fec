"""Gradients of family A.  The selection is a constant, so one backward serves every forward: it works on the saved
lists, or on all valid pairs of a dense call, and never selects again.  Derivation: docs/topk_attention.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .._backends import Row
from ._running import differentiable_once, run
from ._topk_attention_rows import BACKWARD, SELECTED_ATTENTION, TOPK_ATTENTION

_INT32_MAX = 2**31 - 1
BackwardOnce = differentiable_once(BACKWARD, "hivilt.reference.topk_attention")


class TopkAttention(Function):
    """(operator arguments, backend) -> out, lse, indices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(TOPK_ATTENTION, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        (query, key, value, _, axis, attn_mask, key_mask, query_mask, _, _, cu_q, cu_k, seed, *rest) = inputs
        out, lse, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, indices, attn_mask, key_mask, query_mask, cu_q, cu_k, seed)
        ctx.settings = (axis, *rest)

    @staticmethod
    def backward(ctx, grad_out, grad_lse, _):
        q, k, v, m = _backward(ctx, grad_out, grad_lse, ctx.saved_tensors, attn_mask_at=5)
        return q, k, v, None, None, m, *(None,) * 10


class SelectedAttention(Function):
    """(operator arguments, backend) -> out, lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(SELECTED_ATTENTION, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, indices, axis, attn_mask, cu_q, cu_k, seed, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output, indices, attn_mask, None, None, cu_q, cu_k, seed)
        ctx.settings = (axis, *rest)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        saved = list(ctx.saved_tensors)
        saved[5] = tidy_lists(saved[5], ctx.settings[0], saved[6], saved[0])
        q, k, v, m = _backward(ctx, grad_out, grad_lse, saved, attn_mask_at=5)
        return q, k, v, None, None, m, *(None,) * 6


def _backward(ctx, grad_out, grad_lse, saved, attn_mask_at: int):
    """Gradients of query, key, value and attn_mask, None where none is needed."""
    needs = ctx.needs_input_grad
    wanted = (*needs[:3], needs[attn_mask_at])
    if (grad_out is None and grad_lse is None) or not any(wanted):
        return (None,) * 4
    query, key, value, out, lse, indices, attn_mask, key_mask, query_mask, cu_q, cu_k, seed = saved
    axis, scale, dropout_p, backend = ctx.settings
    backend = backend.name if isinstance(backend, Row) else backend  # of forward; backward has rows of its own
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = (grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask, query_mask, cu_q, cu_k,
            seed, scale, dropout_p, wanted[1] or wanted[2], wanted[3])  # fmt: skip
    # A plain backward records nothing; under create_graph a second backward must fail loudly, not silently.
    grads = BackwardOnce.apply(*args, backend) if torch.is_grad_enabled() else run(BACKWARD, backend, args)
    return tuple(g if wanted[i] else None for i, g in enumerate(grads))


def tidy_lists(indices: Tensor, axis: int, attn_mask: Tensor | None, query: Tensor) -> Tensor:
    """A caller's lists as backward wants them: without the pairs that attn_mask forbids, ascending, -1 at the end."""
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
        if axis == 1:
            allowed = allowed.transpose(2, 3)
        heads = max(indices.shape[1], allowed.shape[1])
        indices = indices.expand(-1, heads, -1, -1)
        at = indices.clamp(min=0).long()
        if allowed.shape[3] == 1:
            at = torch.zeros_like(at)
        allowed = allowed.expand(*indices.shape[:3], allowed.shape[3]).gather(3, at)
        indices = torch.where(allowed, indices, -1)
    ordered = torch.where(indices < 0, _INT32_MAX, indices).sort(-1).values
    return torch.where(ordered == _INT32_MAX, -1, ordered).contiguous()
