"""The reference row of family C: the specification in slices of queries, and its gradients by autograd in float64."""

from __future__ import annotations

import torch

from ..reference.bank_retrieval import bank_retrieval as retrieve
from ..reference.bank_retrieval import weigh
from ._bank_retrieval_schema import score_dtype

SLICE = 1 << 24  # scores at a time


def bank_retrieval(query, keys, values, topk, scale, factor, count, mask, exclude, shadow, precision, save):
    step = max(1, SLICE // max(1, keys.shape[0]))
    E = query.shape[1] if values is None else values.shape[1]
    retrieved, scores = query.new_empty(query.shape[0], E), query.new_empty(
        query.shape[0], topk, dtype=score_dtype(query, keys))  # fmt: skip
    indices = query.new_empty(query.shape[0], topk, dtype=torch.int64)
    for first in range(0, query.shape[0], step):
        rows = slice(first, first + step)
        retrieved[rows], scores[rows], indices[rows] = retrieve(
            query[rows],
            keys,
            topk,
            values=values,
            scale=factor if scale is None else factor * scale,
            count=count,
            mask=mask[rows] if mask is not None and mask.dim() == 2 else mask,
            exclude=None if exclude is None else exclude[rows],
        )
    empty = keys.new_empty(0)
    if not save:
        return retrieved, scores, indices, empty, empty
    at = indices.clamp(min=0)
    if not keys.shape[0]:
        return retrieved, scores, indices, keys.new_zeros(*at.shape, keys.shape[1]), (
            empty if values is None else values.new_zeros(*at.shape, E))  # fmt: skip
    return retrieved, scores, indices, keys[at], empty if values is None else values[at]


def bank_retrieval_backward(query, grad_retrieved, grad_scores, key_rows, value_rows, scores, indices, scale, factor,
                            bank_size, rows_grad):  # fmt: skip
    listed = indices >= 0
    with torch.enable_grad():
        q = query.detach().double().requires_grad_()
        k = key_rows.detach().double().requires_grad_()
        v = None if value_rows is None else value_rows.detach().double().requires_grad_()
        s = None if scale is None else scale.detach().double().requires_grad_()
        dots = torch.where(listed, (q[:, None] * torch.where(listed[..., None], k, 0.0)).sum(-1), 0.0)
        # The values of forward: rounded, and NaN all over a query that met one.
        dots = dots + (torch.where(listed, scores.double(), 0.0) - dots).detach()
        out = weigh(dots, k if v is None else v, listed, factor if s is None else factor * s)
        total = out.new_zeros(())
        if grad_retrieved is not None:
            total = total + (out * grad_retrieved.double()).sum()
        if grad_scores is not None:
            total = total + torch.where(listed, dots * torch.where(listed, grad_scores.double(), 0.0), 0.0).sum()
    asked = [t for t in (q, k, v, s) if t is not None]
    found = iter(torch.autograd.grad(total, asked, allow_unused=True))
    of_q, of_k, of_v, of_s = (None if t is None else next(found) for t in (q, k, v, s))
    empty = key_rows.new_empty(0)

    def spread(rows, like):
        bank = (
            rows.new_zeros(bank_size, like.shape[2]) if rows is not None else like.new_zeros(bank_size, like.shape[2])
        )
        if rows is not None and bank_size:
            bank.index_add_(0, indices.clamp(min=0).flatten(), torch.where(listed[..., None], rows, 0.0).flatten(0, 1))
        return bank.to(like.dtype)

    return (
        torch.zeros_like(query) if of_q is None else of_q.to(query.dtype),
        spread(of_k, key_rows) if rows_grad else empty,
        spread(of_v, value_rows) if rows_grad and v is not None else empty,
        scores.new_empty(0) if s is None else scores.new_zeros(()) if of_s is None else of_s.to(scores.dtype),
    )
