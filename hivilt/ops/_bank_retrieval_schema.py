"""Operators of family C as torch sees them: schemas, fakes, flop formulas.

Rows are the kept rows of keys and of values, which backward needs and a later push must not change; they are made when
``save`` is set, value_rows only where values are not the keys.  What nobody asked for has the shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "bank_retrieval": (
        "Tensor query, Tensor keys, Tensor? values, int topk, Tensor? scale, float factor, Tensor? count, "
        "Tensor? mask, Tensor? exclude, Tensor? shadow, str precision, bool save",
        "(Tensor retrieved, Tensor scores, Tensor indices, Tensor key_rows, Tensor value_rows)",
    ),
    # grad_keys, grad_values: (M, C), (M, E); rows_grad says whether they are wanted.
    "bank_retrieval_backward": (
        "Tensor query, Tensor? grad_retrieved, Tensor? grad_scores, Tensor key_rows, Tensor? value_rows, "
        "Tensor scores, Tensor indices, Tensor? scale, float factor, int bank_size, bool rows_grad",
        "(Tensor grad_query, Tensor grad_keys, Tensor grad_values, Tensor grad_scale)",
    ),
}


def score_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    return torch.float64 if torch.promote_types(query.dtype, keys.dtype) == torch.float64 else torch.float32


def _fake(query, keys, values, topk, scale, factor, count, mask, exclude, shadow, precision, save):
    B, C = query.shape
    E = C if values is None else values.shape[1]
    return (
        query.new_empty(B, E),
        query.new_empty(B, topk, dtype=score_dtype(query, keys)),
        query.new_empty(B, topk, dtype=torch.int64),
        keys.new_empty((B, topk, C) if save else (0,)),
        keys.new_empty(0) if values is None or not save else values.new_empty(B, topk, E),
    )


def _fake_backward(query, grad_retrieved, grad_scores, key_rows, value_rows, scores, indices, scale, factor, bank_size,
                   rows_grad):  # fmt: skip
    C = query.shape[1]
    split = rows_grad and value_rows is not None
    return (
        query.new_empty(query.shape),
        key_rows.new_empty((bank_size, C) if rows_grad else (0,)),
        value_rows.new_empty(bank_size, value_rows.shape[2]) if split else key_rows.new_empty(0),
        scores.new_empty(() if scale is not None else (0,)),
    )


FAKES = {"bank_retrieval": _fake, "bank_retrieval_backward": _fake_backward}


def _flops(query, keys, values, topk, *rest, out_shape=None, **_) -> int:
    B, C = query
    return 2 * B * (keys[0] * C + topk * (C if values is None else values[1]))


def _flops_backward(query, grad_retrieved, grad_scores, key_rows, *rest, out_shape=None, **_) -> int:
    return 4 * key_rows[0] * key_rows[1] * key_rows[2]


FLOPS = {"bank_retrieval": _flops, "bank_retrieval_backward": _flops_backward}
