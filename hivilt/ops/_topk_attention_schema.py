"""Operators of family A as torch sees them: schemas, fakes, batching rules, flop formulas.

``hivilt::<name>`` chooses its backend when it runs, on real tensors; ``hivilt::<name>_cpu`` is the C++ implementation
with the same arguments minus ``backend``.  topk -1 means dense, then ``indices`` has the shape (0,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from ._running import in_turn

_SELECTION = "Tensor? attn_mask, Tensor? key_mask, Tensor? query_mask, Tensor? select_query, Tensor? select_key, "
_PACKED = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
SCHEMAS = {
    "topk_attention": (
        f"Tensor query, Tensor key, Tensor value, int topk, int axis, {_SELECTION}{_PACKED}Tensor? seed, float scale, "
        "float dropout_p",
        "(Tensor out, Tensor lse, Tensor indices)",
    ),
    "topk_select": (f"Tensor query, Tensor key, int topk, int axis, {_SELECTION}{_PACKED}float scale", "Tensor"),
    "selected_attention": (
        f"Tensor query, Tensor key, Tensor value, Tensor indices, int axis, Tensor? attn_mask, {_PACKED}Tensor? seed, "
        "float scale, float dropout_p",
        "(Tensor out, Tensor lse)",
    ),
    # key_grad: whether gradients of key and value are wanted; what is not wanted has the shape (0,).
    "topk_attention_backward": (
        "Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        f"Tensor indices, int axis, Tensor? attn_mask, Tensor? key_mask, Tensor? query_mask, {_PACKED}Tensor? seed, "
        "float scale, float dropout_p, bool key_grad, bool bias_grad",
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    ),
}


def define(name: str, run: Callable) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The opaque operator, run by ``run`` on CPU and CUDA tensors, and its C++ twin."""
    arguments, results = SCHEMAS[name]
    fake, flops = FAKES[name], FLOPS.get(name)
    twin = _library.define(f"{name}_cpu({arguments}) -> {results}", fake=fake, flops=flops)
    opaque = _library.define(
        f"{name}({arguments}, str backend) -> {results}",
        fake=lambda *args: fake(*args[:-1]),
        run=run,
        vmap=_batching_rule(name, len(arguments.split(", "))),
        flops=flops,
    )
    return opaque, twin


# Fakes: results are stored token by token, so that merging heads moves nothing.


def _token_major(like: Tensor, width: int) -> Tensor:
    B, H, T, _ = like.shape
    return like.new_empty(B, T, H, width).transpose(1, 2)


def _attention_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _token_major(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=dtype)


def _lists(query: Tensor, key: Tensor, topk: int, axis: int, select_query: Tensor | None) -> Tensor:
    heads = query.shape[1] if select_query is None else 1
    shape = (query.shape[0], heads, (query, key)[axis].shape[2], topk) if topk >= 0 else (0,)
    return query.new_empty(shape, dtype=torch.int32)


def _fake_topk_attention(query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query, *_):
    return *_attention_results(query, value), _lists(query, key, topk, axis, select_query)


def _fake_topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, *_):
    return _lists(query, key, topk, axis, select_query)


def _fake_selected_attention(query, key, value, *_):
    return _attention_results(query, value)


def _fake_backward(grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, *rest):
    grad_bias = attn_mask.new_empty(attn_mask.shape) if rest[-1] else query.new_empty(0)
    of_keys = [_token_major(x, x.shape[3]) if rest[-2] else x.new_empty(0) for x in (key, value)]
    return _token_major(query, query.shape[3]), *of_keys, grad_bias


FAKES = {
    "topk_attention": _fake_topk_attention,
    "topk_select": _fake_topk_select,
    "selected_attention": _fake_selected_attention,
    "topk_attention_backward": _fake_backward,
}


# Flops, as a multiply and an add per product; selection compares and is not counted.


def _flops_topk_attention(query, key, value, topk, axis, *rest, out_shape=None, **_) -> int:
    B, H, Q, D = query
    N, E = value[2:]
    kept = Q * N if topk < 0 else (Q, N)[axis] * topk
    return 2 * B * H * (Q * N * D + kept * E)


def _flops_topk_select(query, key, topk, axis, *rest, out_shape=None, **_) -> int:
    select_query = rest[3] if len(rest) > 3 else None
    B, H, Q, D = query
    return 2 * B * Q * key[2] * (select_query[-1] if select_query is not None else H * D)


def _flops_selected_attention(query, key, value, indices, *rest, out_shape=None, **_) -> int:
    B, H, _, D = query
    return 2 * B * H * indices[2] * indices[3] * (D + value[3])


def _flops_backward(grad_out, grad_lse, query, key, value, out, lse, indices, *rest, out_shape=None, **_) -> int:
    key_grad = rest[9]
    B, H, Q, D = query
    N, E = value[2:]
    kept = Q * N if len(indices) == 1 else indices[2] * indices[3]
    return 2 * B * H * kept * (2 * D + E + key_grad * (D + E))  # scores again, dQ, dP; dK, dV


FLOPS = {
    "topk_attention": _flops_topk_attention,
    "topk_select": _flops_topk_select,
    "selected_attention": _flops_selected_attention,
    "topk_attention_backward": _flops_backward,
}


# vmap: the mapped axis joins the batch where nothing but the batch tells samples apart, otherwise samples run in turn.


def _batching_rule(name: str, backend_at: int) -> Callable:
    names = [argument.split()[1] for argument in SCHEMAS[name][0].split(", ")]
    at = {argument: i for i, argument in enumerate(names)}
    assert len(names) == backend_at

    def rule(info, in_dims, *args):
        op = getattr(torch.ops.hivilt, name).default
        # Dropout counts batches, so joined samples would draw other masks than samples in turn.
        if args[at["cu_seqlens_q"]] is not None or ("dropout_p" in at and args[at["dropout_p"]] > 0):
            return in_turn(op, info.batch_size, in_dims, args)
        return _joined(op, info.batch_size, in_dims, args, at)

    return rule


def _joined(op, size: int, in_dims, args, at: dict[str, int]):
    args = list(args)
    query, dim = args[at["query"]], in_dims[at["query"]]
    batch = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    bias_grad = "bias_grad" in at and args[at["bias_grad"]]
    mask_batch = 0
    for i, (x, d) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(x, Tensor):
            continue
        one_mask = i == at["attn_mask"]
        if i == at.get("indices") and (x.dim() if d is None else x.dim() - 1) == 1:  # dense
            args[i] = x if d is None else x.select(d, 0)
            continue
        if one_mask:
            mask_batch = x.shape[0] if d is None else x.movedim(d, 0).shape[1]
            if d is None and mask_batch == 1 and not bias_grad:
                continue  # broadcasts over the joined batch as it is
        x = x.unsqueeze(0) if d is None else x.movedim(d, 0)
        args[i] = x.expand(size, batch if one_mask else x.shape[1], *x.shape[2:]).flatten(0, 1)
    results = op(*args)
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, batch)), 0
    # Empty 1-D results (lists of a dense call, no bias gradient) hold nothing per sample.
    split = [r.unflatten(0, (size, batch)) if r.dim() > 1 else r.expand(size, 0) for r in results]
    if bias_grad and mask_batch == 1 and batch != 1:
        split[-1] = split[-1].sum(1, keepdim=True)
    return tuple(split), (0,) * len(split)
